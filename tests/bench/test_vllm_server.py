"""bench/vllm_server.py: simulated pods over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.vllm_engine import EngineConfig
from bench.vllm_server import SimulatedPod

FAST = EngineConfig(speed=100)
LONG = {"prompt": "x", "max_tokens": 20_000, "ignore_eos": True, "stream": True}  # 1.4 s of a FAST pod


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def pod() -> AsyncIterator[SimulatedPod]:
    async with SimulatedPod("pod-a", config=FAST, adapters=("code",)) as pod:
        yield pod


def url(pod: SimulatedPod, path: str = "/v1/completions") -> str:
    return f"http://{pod.address}:{pod.port}{path}"


async def post(http: aiohttp.ClientSession, pod: SimulatedPod, path: str = "/v1/completions", **body: Any) -> Any:
    """The reply's JSON."""
    async with http.post(url(pod, path), json=body) as reply:
        assert reply.status == 200
        return await reply.json()


async def events(reply: aiohttp.ClientResponse) -> list[Any]:
    """The events to the stream's end, which has to be [DONE]."""
    lines = [line.removeprefix("data: ") for line in (await reply.text()).split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def metrics(http: aiohttp.ClientSession, pod: SimulatedPod) -> dict[str, float]:
    """The page's samples; of several with one name, their sum."""
    values: dict[str, float] = {}
    async with http.get(url(pod, "/metrics")) as reply:
        assert reply.headers["content-type"] == "text/plain; version=1.0.0; charset=utf-8"
        for family in text_string_to_metric_families(await reply.text()):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


async def test_a_completion(http: aiohttp.ClientSession, pod: SimulatedPod) -> None:
    """The reply has vLLM's shape, the id the client chose, and the pod's name in a header."""
    body = {"model": "/model/qwen", "prompt": "Los Angeles", "max_tokens": 3}
    async with http.post(url(pod), json=body, headers={"x-request-id": "abc"}) as reply:
        assert (reply.headers["x-sim-pod"], reply.headers["server"]) == ("pod-a", "uvicorn")
        data = await reply.json()
    assert data.pop("created") > 1_700_000_000
    assert data == {
        "id": "cmpl-abc",
        "object": "text_completion",
        "model": "/model/qwen",
        "choices": [
            {"index": 0, "text": " the sun was", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ],
        "usage": {
            "prompt_tokens": 3,
            "total_tokens": 6,
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_a_chat_completion(http: aiohttp.ClientSession, pod: SimulatedPod) -> None:
    """The scenario's curl: a chat.completion object of max_completion_tokens."""
    messages = [{"role": "user", "content": "Write as if you were a critic: Los Angeles"}]
    data = await post(http, pod, "/v1/chat/completions", messages=messages, max_completion_tokens=100, temperature=0)
    assert (data["object"], data["choices"][0]["message"]["role"]) == ("chat.completion", "assistant")
    assert len(data["choices"][0]["message"]["content"].split()) == data["usage"]["completion_tokens"] == 100
    assert data["id"].startswith("chatcmpl-")


async def test_a_streamed_completion(http: aiohttp.ClientSession, pod: SimulatedPod) -> None:
    """One event a token of each prompt, then the usage, then [DONE]; together they say what the plain reply does."""
    body: dict[str, Any] = {"prompt": ["one", "another"], "max_tokens": 40}
    plain = await post(http, pod, **body)
    async with http.post(url(pod), json=body | {"stream": True, "stream_options": {"include_usage": True}}) as reply:
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        *tokens, usage = await events(reply)
    assert (usage["choices"], usage["usage"]) == ([], plain["usage"])
    assert len(tokens) == 80
    for index, choice in enumerate(plain["choices"]):
        mine = [token["choices"][0] for token in tokens if token["choices"][0]["index"] == index]
        assert "".join(token["text"] for token in mine) == choice["text"]
        assert [token["finish_reason"] for token in mine] == [None] * 39 + ["length"]


async def test_a_streamed_chat(http: aiohttp.ClientSession, pod: SimulatedPod) -> None:
    """First the role, then the words; without include_usage no usage."""
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True}
    async with http.post(url(pod, "/v1/chat/completions"), json=body) as reply:
        choices = [event["choices"][0] for event in await events(reply)]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": " the"},
        {"content": " sun"},
    ]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/completions", '{"model": "nope", "prompt": "x"}', (404, "NotFoundError")),
        ("/v1/completions", '{"prompt": ', (400, "Bad Request")),
        ("/v1/completions", "[]", (400, "Bad Request")),
        ("/v1/completions", '{"prompt": "x", "stream": 1}', (400, "Bad Request")),
        ("/v1/completions", '{"prompt": "x", "max_tokens": 40000}', (400, "BadRequestError")),
        ("/v1/completions", '{"prompt": "x", "max_tokens": 0}', (400, "BadRequestError")),
        ("/v1/chat/completions", "{}", (400, "Bad Request")),
        ("/v1/nothing", "{}", (404, "NotFoundError")),
    ],
)
async def test_errors(
    http: aiohttp.ClientSession, pod: SimulatedPod, path: str, body: str, expected: tuple[int, str]
) -> None:
    """vLLM's error JSON, its `code` the HTTP status; the pod goes on answering."""
    async with http.post(url(pod, path), data=body) as reply:
        error = (await reply.json())["error"]
    assert ((reply.status, error["type"]), error["code"]) == (expected, expected[0])
    assert set(error) == {"message", "type", "param", "code"}
    assert (await post(http, pod, prompt="x"))["choices"]


async def test_the_small_endpoints(http: aiohttp.ClientSession, pod: SimulatedPod) -> None:
    """/health is an empty 200; /version and /v1/models name what is simulated, adapters with their parent."""
    async with http.get(url(pod, "/health")) as reply:
        assert (reply.status, await reply.read()) == (200, b"")
    async with http.get(url(pod, "/version")) as reply:
        assert await reply.json() == {"version": "0.32.0"}
    async with http.get(url(pod, "/v1/models")) as reply:
        models = (await reply.json())["data"]
    assert [(model["id"], model["parent"]) for model in models] == [("/model/qwen", None), ("code", "/model/qwen")]


async def test_the_prefix_cache_is_seen_from_outside(http: aiohttp.ClientSession, pod: SimulatedPod) -> None:
    """cached_tokens tells a repeat; a salt, an adapter, and a reset each make it cold again."""
    prompt = "What a long prompt this is. " * 20

    async def cached(**body: Any) -> Any:
        reply = await post(http, pod, prompt=prompt, **body)
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [await cached(), await cached()] == [0, 128]
    assert [await cached(cache_salt="s"), await cached(cache_salt="s")] == [0, 128]
    assert [await cached(model="code"), await cached(model="code")] == [0, 128]
    async with http.post(url(pod, "/reset_prefix_cache")) as reply:
        assert reply.status == 200
    assert await cached() == 0
    page = await metrics(http, pod)
    assert (page["vllm:prefix_cache_queries_total"], page["vllm:prefix_cache_hits_total"]) == (7 * 140, 3 * 128)


async def test_the_page_follows_a_stream(http: aiohttp.ClientSession, pod: SimulatedPod) -> None:
    """After the first token a request is running; when its client has left it is gone, and its blocks are free."""
    async with http.post(url(pod), json=LONG) as reply:
        await reply.content.readuntil(b"\n\n")
        assert (await metrics(http, pod))["vllm:num_requests_running"] == 1
        reply.close()
    async with asyncio.timeout(5):
        while (await metrics(http, pod))["vllm:num_requests_running"]:
            pass
    assert pod.engine.cache.free == pod.engine.cache.capacity
    assert pod.engine.stats.finished["abort"] == 1


async def test_the_admission_limit(http: aiohttp.ClientSession) -> None:
    """The surplus gets a true 503 without Retry-After, but a streamed one HTTP 200 with an error event."""
    async with SimulatedPod("full", config=EngineConfig(speed=100, max_num_queued_reqs=1)) as pod:
        async with http.post(url(pod), json=LONG) as first:
            await first.content.readuntil(b"\n\n")
            async with http.post(url(pod), json={"prompt": "x"}) as refused:
                assert (refused.status, "retry-after" in refused.headers) == (503, False)
                assert (await refused.json())["error"]["code"] == 503
            async with http.post(url(pod), json={"prompt": "x", "stream": True}) as refused:
                assert refused.status == 200
                assert [event["error"]["code"] for event in await events(refused)] == [503]
            first.close()
        assert (await metrics(http, pod))["vllm:admission_rejections_total"] == 2


async def test_a_step_takes_the_time_it_says(http: aiohttp.ClientSession) -> None:
    """10 tokens at 10 ms a step take 100 ms and not less; a pod of ten times the speed beats that."""
    took = []
    for speed in (1.0, 10.0):
        async with SimulatedPod("pod", config=EngineConfig(step_base=0.01, speed=speed)) as pod:
            await post(http, pod, prompt="x", max_tokens=10)
            took.append((await metrics(http, pod))["vllm:e2e_request_latency_seconds_sum"])
    assert took[0] > 0.099 > took[1]


async def test_sigterm_ends_streams_inside_their_200(http: aiohttp.ClientSession, pod: SimulatedPod) -> None:
    """By default a stream ends with an error event and [DONE], and a plain request with HTTP 500."""
    plain = asyncio.create_task(http.post(url(pod), json=LONG | {"stream": False}).__aenter__())
    async with http.post(url(pod), json=LONG) as stream:
        await stream.content.readuntil(b"\n\n")
        await pod.stop()
        assert stream.status == 200
        *_, last = await events(stream)
    assert last["error"]["code"] == 500
    async with await plain as reply:
        assert reply.status == 500
    with pytest.raises(aiohttp.ClientConnectorError):
        await http.get(url(pod, "/health"))


async def test_a_shutdown_timeout_lets_work_finish(http: aiohttp.ClientSession) -> None:
    """Meanwhile /health stays 200 and a new completion gets HTTP 500: the trap that a drain has to avoid."""
    async with SimulatedPod("pod", config=EngineConfig(step_base=0.01)) as pod:
        async with http.post(url(pod), json=LONG | {"max_tokens": 30}) as stream:
            await stream.content.readuntil(b"\n\n")
            stopping = asyncio.create_task(pod.stop(shutdown_timeout=30))
            async with http.get(url(pod, "/health")) as reply:
                assert reply.status == 200
            async with http.post(url(pod), json={"prompt": "x"}) as reply:
                assert reply.status == 500
            tokens = await events(stream)
        assert len(tokens) == 29  # the first was read above
        assert not [token for token in tokens if "error" in token]
        await stopping
    with pytest.raises(aiohttp.ClientConnectorError):
        await http.get(url(pod, "/health"))


async def test_a_restart_is_a_fresh_process_at_the_same_address(http: aiohttp.ClientSession, pod: SimulatedPod) -> None:
    """Counters go back, the start time is newer, the prefix cache is cold."""
    await post(http, pod, prompt="x" * 400)
    before, port = await metrics(http, pod), pod.port
    await pod.stop()
    await pod.start()
    after = await metrics(http, pod)
    assert pod.port == port
    assert (before["vllm:prompt_tokens_total"], after["vllm:prompt_tokens_total"]) == (100, 0)
    assert after["process_start_time_seconds"] > before["process_start_time_seconds"]
    reply = await post(http, pod, prompt="x" * 400)
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_a_killed_pod_resets_its_connections(http: aiohttp.ClientSession, pod: SimulatedPod) -> None:
    """No error event, no end of the stream; then nobody listens."""
    async with http.post(url(pod), json=LONG) as stream:
        await stream.content.readuntil(b"\n\n")
        await pod.kill()
        with pytest.raises(aiohttp.ClientError):
            await stream.read()
    with pytest.raises(aiohttp.ClientConnectorError):
        await http.get(url(pod, "/health"))


async def test_faults(http: aiohttp.ClientSession, pod: SimulatedPod) -> None:
    """Each endpoint fails alone and recovers; a killed worker is health 503 with metrics 200."""
    pod.faults.health = 503
    async with http.get(url(pod, "/health")) as reply:
        assert reply.status == 503
    assert await metrics(http, pod)
    pod.faults.health, pod.faults.metrics, pod.faults.completions = 200, 500, 503
    async with http.get(url(pod, "/health")) as reply:
        assert reply.status == 200
    async with http.get(url(pod, "/metrics")) as reply:
        assert reply.status == 500
    async with http.post(url(pod), json={"prompt": "x"}) as reply:
        assert reply.status == 503
    pod.faults.metrics = pod.faults.completions = 200
    assert await post(http, pod, prompt="x")


async def test_a_pod_that_hangs(http: aiohttp.ClientSession, pod: SimulatedPod) -> None:
    """It takes the request and does not answer; the client's timeout ends it."""
    pod.faults.hang = True
    with pytest.raises(TimeoutError):
        await http.get(url(pod, "/health"), timeout=aiohttp.ClientTimeout(total=0.1))
    pod.faults.hang = False
    async with http.get(url(pod, "/health")) as reply:
        assert reply.status == 200


async def test_many_pods_in_one_process(http: aiohttp.ClientSession) -> None:
    """A fleet: each on its own port, each answering for itself."""
    pods = [SimulatedPod(f"pod-{index}", config=FAST) for index in range(30)]
    await asyncio.gather(*(pod.start() for pod in pods))
    try:
        assert len({pod.port for pod in pods}) == 30
        for pod in pods:
            async with http.post(url(pod), json={"prompt": "x"}) as reply:
                assert reply.headers["x-sim-pod"] == pod.name
    finally:
        await asyncio.gather(*(pod.stop() for pod in pods))
