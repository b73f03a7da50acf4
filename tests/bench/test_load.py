"""bench/load.py: what is sent, when, and what is made of the answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from bench.envoy import free_port
from bench.load import (
    Answer,
    Arrival,
    Workload,
    error_kinds,
    events,
    keep_under_way,
    percentile,
    replay,
    schedule,
    send,
    summarize,
)
from bench.vllm_engine import EngineConfig
from bench.vllm_server import MODEL, SimulatedPod

WORKLOAD = Workload(10.0, 4, (300, 600), 0.9, (2, 3), 20, MODEL)
FAST = EngineConfig(speed=20)
CHAT = "/v1/chat/completions"
TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'


def body(text: str = "hello", tokens: int = 5) -> bytes:
    messages = [{"role": "user", "content": text}]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps({"messages": messages, "max_tokens": tokens, "ignore_eos": True, **options}).encode()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@asynccontextmanager
async def served(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[str]:
    """The URL of a server that answers every POST with `handler`."""
    app = web.Application()
    app.router.add_post("/", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


def test_a_schedule_is_its_seed() -> None:
    """Equal seeds give equal bytes and times, other seeds other ones."""
    assert schedule(WORKLOAD, 10, seed=7) == schedule(WORKLOAD, 10, seed=7)
    assert schedule(WORKLOAD, 10, seed=7) != schedule(WORKLOAD, 10, seed=8)


def test_a_schedule_is_what_the_workload_says() -> None:
    """Ordered times within the duration, the rate, few system prompts of the right size, later turns that go on."""
    arrivals = schedule(WORKLOAD, 60, seed=1)
    times = [arrival.at for arrival in arrivals]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < 60
    assert len(arrivals) == pytest.approx(600, rel=0.1)
    first, last = sum(at < 20 for at in times), sum(at >= 40 for at in times)
    assert first == pytest.approx(last, rel=0.25)

    conversations = [json.loads(arrival.body)["messages"] for arrival in arrivals]
    systems = {messages[0]["content"] for messages in conversations}
    assert len(systems) == 4
    assert all(300 * 4 <= len(system) <= 600 * 4 for system in systems)
    assert {len(messages) for messages in conversations} == {2, 4, 6}  # a system prompt, then turns up to a question
    seen = {json.dumps(messages) for messages in conversations}
    later = [messages for at, messages in zip(times, conversations, strict=True) if len(messages) > 2 and at > 6]
    assert all(json.dumps(messages[:-2]) in seen for messages in later)


@pytest.mark.alone
async def test_an_answer_is_measured(http: aiohttp.ClientSession) -> None:
    """First token before the end, tokens and the pod's name; the second time the prompt is in the prefix cache."""
    async with SimulatedPod("pod-a", config=FAST) as pod:
        url = f"http://{pod.address}:{pod.port}{CHAT}"
        cold, warm = [await send(http, url, body("x" * 4000, tokens=50)) for _ in range(2)]
    assert (cold.error, cold.pod, cold.cached_tokens) == ("", "pod-a", 0)
    assert 0 < cold.ttft < cold.seconds
    assert cold.seconds - cold.ttft > 49 * FAST.step_base / FAST.speed * 0.8  # the other 49 tokens came later
    assert (warm.error, warm.prompt_tokens) == ("", cold.prompt_tokens)
    assert 900 < warm.cached_tokens < warm.prompt_tokens
    assert warm.output_tokens == 50


async def test_errors_are_told_apart(http: aiohttp.ClientSession) -> None:
    """A status, a connection reset in the middle and a refused one are errors, and none of them raises."""

    async def reset(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(TOKEN)
        assert request.transport is not None
        request.transport.abort()
        return response

    async with SimulatedPod("pod-a", config=FAST) as pod:
        url = f"http://{pod.address}:{pod.port}{CHAT}"
        pod.faults.completions = 500
        failed = await send(http, url, body())
    refused = await send(http, f"http://127.0.0.1:{free_port()}/", body())
    async with served(reset) as url:
        broken = await send(http, url, body())
    assert (failed.error, failed.pod) == ("HTTP 500", "pod-a")
    assert refused.error == "ClientConnectorError"
    assert broken.error in {"ClientPayloadError", "ClientOSError", "ServerDisconnectedError"}


async def test_an_error_event_in_a_stream_is_an_error(http: aiohttp.ClientSession) -> None:
    """vLLM answers 200 before it knows whether its queue has room: the refusal is an event, and no success."""
    async with SimulatedPod("pod-a", config=EngineConfig(max_num_queued_reqs=1)) as pod:
        url = f"http://{pod.address}:{pod.port}{CHAT}"
        async with asyncio.timeout(10), http.post(url, data=body(tokens=20_000)) as holding:
            await holding.content.readany()
            refused = await send(http, url, body())
    assert refused.error == "error event: The engine's queue is full (max_num_queued_reqs). Try again later."
    assert summarize([refused]).errors == 1


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"", "stream ended early"),
        (TOKEN, "stream ended early"),
        (TOKEN + b'data: {"error":{"message":"engine dead"}}\n\ndata: [DONE]\n\n', "error event: engine dead"),
        (b"data: [DONE]\n\n", "stream ended early"),
        (b"data: [1]\n\n", "not a chat completion stream"),
        (b"data: {\n\n", "not a chat completion stream"),
        (b'data: {"error":"text"}\n\n', "not a chat completion stream"),
    ],
)
async def test_what_is_no_stream_of_tokens(http: aiohttp.ClientSession, sent: bytes, error: str) -> None:
    """A 200 counts only with a token and [DONE]."""

    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=sent)

    async with served(handler) as url:
        assert (await send(http, url, b"")).error == error


@pytest.mark.alone
async def test_the_loop_is_open(http: aiohttp.ClientSession) -> None:
    """Requests go out on time though no earlier one has been answered: the server answers none before the last."""
    bodies: list[bytes] = []
    all_there = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        bodies.append(await request.read())
        if len(bodies) == 5:
            all_there.set()
        await all_there.wait()
        return web.Response(body=TOKEN + b"data: [DONE]\n\n")

    arrivals = [Arrival(index * 0.02, b"%d" % index) for index in range(5)]
    answers: list[Answer] = []
    loop = asyncio.get_running_loop()
    async with served(handler) as url, asyncio.timeout(10):
        began = loop.time()
        await replay(http, url, arrivals, answers.append)
    assert loop.time() - began >= 0.08
    assert sorted(bodies) == [b"0", b"1", b"2", b"3", b"4"]
    assert [answer.error for answer in answers] == [""] * 5


async def test_a_closed_loop_keeps_so_many_under_way(http: aiohttp.ClientSession) -> None:
    """Three at a time and never a fourth, each body once and in order, all answered; none is sent after the end."""
    bodies: list[bytes] = []
    under_way = most = 0

    async def handler(request: web.Request) -> web.Response:
        nonlocal under_way, most
        bodies.append(await request.read())
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)  # what an answer takes
        under_way -= 1
        return web.Response(body=TOKEN + b"data: [DONE]\n\n")

    answers: list[tuple[float, Answer]] = []
    numbers = (b"%d" % number for number in itertools.count())
    async with served(handler) as url, asyncio.timeout(10):
        await keep_under_way(http, url, numbers, 3, 0.1, 0.3, lambda *answer: answers.append(answer))
    assert most == 3
    assert sorted(map(int, bodies)) == list(range(len(answers)))
    assert {answer.error for _, answer in answers} == {""}
    assert all(0 <= sent < 0.4 for sent, _ in answers)


async def test_a_closed_loop_does_not_hammer(http: aiohttp.ClientSession) -> None:
    """Each of two that is refused waits before it asks again: two requests in less time than that, not hundreds."""
    answers: list[Answer] = []
    url = f"http://127.0.0.1:{free_port()}/"
    async with asyncio.timeout(10):
        await keep_under_way(http, url, itertools.repeat(b""), 2, 0.0, 0.3, lambda _, answer: answers.append(answer))
    assert [answer.error for answer in answers] == ["ClientConnectorError"] * 2


@given(st.lists(st.binary(max_size=20).filter(lambda data: b"\n" not in data)), st.lists(st.integers(0, 200)))
def test_events_however_cut(texts: list[bytes], cuts: list[int]) -> None:
    """The same events come out wherever the stream is cut; a last one without its end does not."""
    stream = b": comment\n\n" + b"".join(b"data: " + text + b"\n\n" for text in texts) + b"data: unfinished"
    edges = [0, *sorted(cuts), len(stream)]

    async def chunks() -> AsyncIterator[bytes]:
        for start, end in pairwise(edges):
            yield stream[start:end]

    async def collect() -> list[bytes]:
        return [data async for data in events(chunks())]

    assert asyncio.run(collect()) == [text.strip() for text in texts]


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0, 100))
def test_percentile(values: list[float], share: float) -> None:
    """The least of the values that at least `share` percent do not exceed."""
    ordered = sorted(values)
    found = percentile(ordered, share)
    assert sum(value <= found for value in ordered) >= len(ordered) * share / 100 - 1e-9
    below = [value for value in ordered if value < found]
    assert not below or len(below) < len(ordered) * share / 100


def test_summary() -> None:
    """Errors are counted and are in no other figure; tokens weigh, not requests."""
    answers = [Answer(ttft=t / 100, prompt_tokens=100, cached_tokens=50) for t in range(1, 101)]
    answers += [Answer(ttft=9.0, error="HTTP 503"), Answer(error="HTTP 503"), Answer(error="TimeoutError")]
    summary = summarize(answers)
    assert (summary.requests, summary.errors, summary.hit_ratio) == (103, 3, 0.5)
    assert (summary.ttft_p50, summary.ttft_p99) == (0.5, 0.99)
    assert summary.ttft_mean == pytest.approx(0.505)
    assert error_kinds(answers) == [("HTTP 503", 2), ("TimeoutError", 1)]
    empty = summarize([])
    assert (empty.requests, empty.errors) == (0, 0)
    assert all(math.isnan(value) for value in (empty.hit_ratio, empty.ttft_p50, empty.ttft_p99, empty.ttft_mean))
