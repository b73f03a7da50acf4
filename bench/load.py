"""The load generator: chat completions, sent on schedule or so many at a time, streamed and measured.

An open loop (`replay`): a request is sent when its time has come, however many others are under way, as users do. The
schedule is made beforehand and says everything, later turns' earlier replies included, so two ports can be given the
same bytes at the same times. A closed loop (`keep_under_way`): as many requests at a time as are asked for.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import aiohttp
import jiter

from bench.kv_cache import BYTES_PER_TOKEN
from bench.vllm_api import filler

TIMEOUT = 60.0  # seconds for a whole answer: far above any that is not stuck
GAP = (3.0, 6.0)  # seconds from one turn of a conversation to the next: an answer, and a user who types
RETRY = 1.0  # seconds from an error to a closed loop's next request: what refuses at once is not hammered
QUESTION = (40, 160)  # tokens of a user's message
VOCABULARY = 4096  # words that texts are made of

HEADERS = {"content-type": "application/json"}


@dataclass(frozen=True, slots=True)
class Workload:
    """Conversations that each begin with one of `prompts` system prompts, the k-th chosen k ** -zipf as often.

    `rate` in requests a second, whatever the turns; `prompt_tokens` (least, most) of a system prompt; `turns` (least,
    most) of a conversation; `output_tokens` of every answer.
    """

    rate: float
    prompts: int
    prompt_tokens: tuple[int, int]
    zipf: float
    turns: tuple[int, int]
    output_tokens: int
    model: str


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: the JSON to POST, and when, in seconds from the beginning."""

    at: float
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request; times in seconds. `error` "" means a complete stream with at least one token.

    `ttft` is from sending to the first token, `late` how much later than planned it was sent, `pod` who answered.
    """

    ttft: float = 0.0
    seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    pod: str = ""
    error: str = ""
    late: float = 0.0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """Answers in figures; times in seconds over the answers without error, nan when there are none."""

    requests: int
    errors: int
    hit_ratio: float  # prompt tokens found in a prefix cache, of all
    ttft_p50: float
    ttft_p99: float
    ttft_mean: float


def schedule(workload: Workload, seconds: float, seed: int) -> tuple[Arrival, ...]:
    """The requests of `seconds`, in order of time; the same for the same arguments.

    Conversations begin at random times, some before the first second, so that the rate and the mix of turns are the
    same from beginning to end.
    """
    rng = random.Random(seed)
    words = vocabulary(rng)
    systems = [text(rng, words, rng.randint(*workload.prompt_tokens)) for _ in range(workload.prompts)]
    popularity = [k**-workload.zipf for k in range(1, workload.prompts + 1)]
    reply = filler(workload.output_tokens).decode()
    before = (workload.turns[1] - 1) * GAP[1]
    arrivals = []
    planned = (seconds + before) * workload.rate / (sum(workload.turns) / 2)
    for _ in range(round(planned)):
        messages = [{"role": "system", "content": rng.choices(systems, popularity)[0]}]
        at = rng.uniform(-before, seconds)
        for _ in range(rng.randint(*workload.turns)):
            messages.append({"role": "user", "content": text(rng, words, rng.randint(*QUESTION))})
            if 0 <= at < seconds:
                arrivals.append(Arrival(at, _body(workload, messages)))
            messages.append({"role": "assistant", "content": reply})
            at += rng.uniform(*GAP)
    return tuple(sorted(arrivals, key=lambda arrival: arrival.at))


def vocabulary(rng: random.Random) -> list[str]:
    """Words to make texts of."""
    return [f"{rng.getrandbits(20):x}" for _ in range(VOCABULARY)]


def text(rng: random.Random, words: Sequence[str], tokens: int) -> str:
    """Random words, so many tokens of them."""
    size = tokens * BYTES_PER_TOKEN
    return " ".join(rng.choices(words, k=size // 4))[:size]  # a word and its space are more than 4 bytes


def _body(workload: Workload, messages: list[dict[str, str]]) -> bytes:
    request = {
        "model": workload.model,
        "messages": messages,
        "max_completion_tokens": workload.output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(request).encode()


async def replay(
    http: aiohttp.ClientSession, url: str, arrivals: Sequence[Arrival], on_answer: Callable[[Answer], None]
) -> None:
    """Send every request at its time and wait for all answers; a cancelled replay closes what is under way."""
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for arrival in arrivals:
            await asyncio.sleep(began + arrival.at - time.perf_counter())
            tasks.create_task(_send_and_tell(http, url, arrival.body, began + arrival.at, on_answer))


async def _send_and_tell(
    http: aiohttp.ClientSession, url: str, body: bytes, due: float, on_answer: Callable[[Answer], None]
) -> None:
    on_answer(await send(http, url, body, due))


async def keep_under_way(
    http: aiohttp.ClientSession,
    url: str,
    bodies: Iterator[bytes],
    count: int,
    warm: float,
    seconds: float,
    on_answer: Callable[[float, Answer], None],
) -> None:
    """A closed loop: `count` requests under way, each answer followed by the next request, for `warm + seconds`.

    The first ones are sent one after another over `warm`, so that they do not all end at once. Waits for the last
    answers. `on_answer` is given when a request was sent, too, in seconds from the beginning.
    """
    began = time.perf_counter()

    async def user(place: int) -> None:
        await asyncio.sleep(warm * place / count)
        while (sent := time.perf_counter() - began) < warm + seconds:
            answer = await send(http, url, next(bodies))
            on_answer(sent, answer)
            if answer.error:
                await asyncio.sleep(RETRY)

    async with asyncio.TaskGroup() as users:
        for place in range(count):
            users.create_task(user(place))


async def send(http: aiohttp.ClientSession, url: str, body: bytes, due: float = math.inf) -> Answer:
    """POST one streamed chat completion that was `due` (perf_counter) and read it to its end; never raises for it."""
    began = time.perf_counter()
    late = max(0.0, began - due)
    first, prompt_tokens, cached_tokens, output_tokens = 0.0, 0, 0, 0
    pod = error = ""
    try:
        async with http.post(url, data=body, headers=HEADERS, timeout=aiohttp.ClientTimeout(TIMEOUT)) as reply:
            pod = reply.headers.get("x-sim-pod", "")
            if reply.status != 200:
                return Answer(pod=pod, error=f"HTTP {reply.status}", late=late)
            complete = False
            async for data in events(reply.content.iter_any()):
                if data == b"[DONE]":
                    complete = True
                    continue
                event = jiter.from_json(data)
                if "error" in event:
                    error = f"error event: {event['error']['message']}"
                    continue
                if not first and any(choice["delta"].get("content") for choice in event["choices"]):
                    first = time.perf_counter()
                if usage := event.get("usage"):
                    prompt_tokens, output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
                    cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            if not error and not (complete and first):
                error = "stream ended early"
    except (aiohttp.ClientError, TimeoutError) as failure:
        error = type(failure).__name__
    except (ValueError, KeyError, TypeError, AttributeError):  # JSON of another shape
        error = "not a chat completion stream"
    seconds = time.perf_counter() - began
    ttft = first - began if first else 0.0
    return Answer(ttft, seconds, prompt_tokens, cached_tokens, pod, error, late, output_tokens)


async def events(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The `data:` of each server-sent event, however the stream is cut; fields that vLLM does not use are skipped.

    https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n\n")
        for event in whole:
            if event.startswith(b"data:"):
                yield event[5:].strip()


def summarize(answers: Iterable[Answer]) -> Summary:
    """Count and rank answers."""
    answers = tuple(answers)
    good = [answer for answer in answers if not answer.error]
    ttft = sorted(answer.ttft for answer in good)
    mean = sum(ttft) / len(ttft) if ttft else math.nan
    errors = len(answers) - len(good)
    return Summary(len(answers), errors, hit_ratio(good), percentile(ttft, 50), percentile(ttft, 99), mean)


def hit_ratio(answers: Iterable[Answer]) -> float:
    """Share of the prompts' tokens that a prefix cache had; nan when there are no tokens."""
    answers = tuple(answers)
    tokens = sum(answer.prompt_tokens for answer in answers)
    return sum(answer.cached_tokens for answer in answers) / tokens if tokens else math.nan


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` percent of the sorted values do not exceed (nearest rank); nan when there are none."""
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]


def error_kinds(answers: Iterable[Answer]) -> list[tuple[str, int]]:
    """Each kind of error and how often it was seen, most frequent first."""
    return Counter(answer.error for answer in answers if answer.error).most_common()
