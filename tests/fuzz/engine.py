"""A small coverage-guided fuzzer: inputs that reach a line of the product, or an outcome, not seen before are kept and
changed further. An input is always bytes, so a finding is a file; randomness is an argument, so a run can be repeated.

A finding is an exception (a target's broken invariant is an AssertionError) or more CPU time than the target allows.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
PRODUCT = tuple(str(ROOT / name) for name in ("xds", "picker", "bootstrap"))
LONGEST = 32 * 1024  # bytes of an input that is kept: what breaks a parser is small, and small is fast
LARGE = 1 << 20  # bytes of an inflated input: long enough to tell n from n squared
LARGE_EVERY = 400  # inputs for one inflated: they take as long as the others together
ALWAYS_TRACED, TRACED = 300, 8  # the first inputs, then one of so many: a trace doubles the time, and finds ever less
MINIMISE = 2.0  # seconds of CPU to make a finding smaller

Run = Callable[[bytes], Iterable[Hashable]]  # an input -> what it came to, in few words: a new one is worth keeping


@dataclass(frozen=True, slots=True)
class Form:
    """What inputs are made of: how one becomes another, given the corpus, and how one becomes some LARGE bytes."""

    mutate: Callable[[Random, bytes, Sequence[bytes]], bytes]
    inflate: Callable[[Random, bytes, int], bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """One parser. `open` gives its `Run`, and closes what it needed; every run of it starts from the same state.

    `seconds` of CPU are the most one input may take, `seconds_large` the same for one of some LARGE bytes.
    """

    name: str
    open: Callable[[], AbstractContextManager[Run]]
    seeds: tuple[bytes, ...]
    form: Form
    seconds: float = 0.5
    seconds_large: float = 2.0
    short: int = 150  # inputs in the tests' short form


@dataclass(frozen=True, slots=True)
class Finding:
    """`where` is the error's name and the last line of ours in its trace: two with one `where` are one finding."""

    target: str
    where: str
    data: bytes
    text: str


@dataclass(slots=True)
class Result:
    """What became of one target's run. Mutable until it ends."""

    target: str
    inputs: int = 0
    large: int = 0
    kept: int = 0
    lines: int = 0
    slowest: float = 0.0  # seconds of CPU of one input, inflated ones apart
    slowest_large: float = 0.0
    findings: dict[str, Finding] = field(default_factory=dict)


class Slow(Exception):  # noqa: N818 - it says what the input is
    """An input took more CPU time than its target allows."""


class _Lines:
    """Which lines of the product have run. A function all of whose lines have is not traced again."""

    def __init__(self) -> None:
        self.seen = 0
        self._unseen: dict[int, tuple[CodeType, set[int]]] = {}  # the code object keeps its id from being used again

    @contextmanager
    def traced(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        code = frame.f_code
        known = self._unseen.get(id(code))
        if known is None:
            ours = code.co_filename.startswith(PRODUCT)
            known = self._unseen[id(code)] = (code, {line for *_, line in code.co_lines() if line} if ours else set())
        return self._line if known[1] else None

    def _line(self, frame: FrameType, event: str, _arg: Any) -> Any:
        unseen = self._unseen[id(frame.f_code)][1]
        if event == "line" and frame.f_lineno in unseen:
            unseen.discard(frame.f_lineno)
            self.seen += 1
        return self._line


def fuzz(target: Target, random: Random, *, seconds: float = float("inf"), inputs: float = float("inf")) -> Result:
    """Try inputs until either runs out, first every seed; `seconds` are of CPU, so that no other process takes any."""
    result = Result(target.name)
    lines = _Lines()
    corpus: list[bytes] = []
    outcomes: set[Hashable] = set()
    with target.open() as run:
        end = time.process_time() + seconds
        pending = list(target.seeds)
        while result.inputs < inputs and (pending or time.process_time() < end):
            seed = bool(pending)
            data = pending.pop() if pending else _next(target, random, corpus)
            result.inputs += 1
            before = lines.seen, len(outcomes)
            with lines.traced() if result.inputs <= ALWAYS_TRACED or result.inputs % TRACED == 0 else nullcontext():
                took = _try(target, run, data, target.seconds, result, outcomes)
            result.slowest = max(result.slowest, took)
            if seed or (before != (lines.seen, len(outcomes)) and len(data) <= LONGEST):
                corpus.append(data)
            if result.inputs % LARGE_EVERY == 0:
                result.large += 1
                data = target.form.inflate(random, random.choice(corpus), LARGE)
                took = _try(target, run, data, target.seconds_large, result, set())
                result.slowest_large = max(result.slowest_large, took)
    result.kept, result.lines = len(corpus), lines.seen
    return result


def replay(target: Target, data: bytes) -> Finding | None:
    """What one input comes to; None: nothing is wrong."""
    with target.open() as run:
        result = Result(target.name)
        _try(target, run, data, target.seconds_large, result, set())
    return next(iter(result.findings.values()), None)


def _next(target: Target, random: Random, corpus: Sequence[bytes]) -> bytes:
    chosen = random.choice(corpus[-16:] if random.random() < 0.5 else corpus)  # what is new has been tried least
    return target.form.mutate(random, chosen, corpus)


def _try(target: Target, run: Run, data: bytes, allowed: float, result: Result, outcomes: set[Hashable]) -> float:
    """Run one input and note what is wrong; the CPU seconds it took."""
    began = time.thread_time()
    try:
        with _interrupted_after(8 * allowed):
            outcomes.update(run(data))
    except Exception as error:  # the point of it all: whatever comes out of a target is a finding
        took = time.thread_time() - began
        _note(target, run, data, error, result)
        return took
    took = time.thread_time() - began
    if took > allowed:
        took = min(took, _again(run, data))  # a collection of garbage may fall into any input
        if took > allowed:
            _note(
                target, run, data, Slow(f"{took:.2f} s of CPU for {len(data)} bytes, {allowed} s are allowed"), result
            )
    return took


def _note(target: Target, run: Run, data: bytes, error: Exception, result: Result) -> None:
    where = _where(error)
    if where not in result.findings:
        text = "".join(traceback.format_exception(error))
        small = data if isinstance(error, Slow) else _minimise(run, data, where)
        result.findings[where] = Finding(target.name, where, small, text)


def _again(run: Run, data: bytes) -> float:
    began = time.thread_time()
    list(run(data))
    return time.thread_time() - began


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(str(ROOT)) and not f.filename.endswith("engine.py")]
    ours = [f for f in ours if "/.venv/" not in f.filename]
    last = (ours or frames)[-1:]
    return type(error).__name__ + "".join(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in last)


def _minimise(run: Run, data: bytes, where: str) -> bytes:
    """A smaller input with the same finding: parts are left out, halves first, single bytes last."""
    end = time.process_time() + MINIMISE
    size = len(data) // 2
    while size and time.process_time() < end:
        start = 0
        while start < len(data) and time.process_time() < end:
            shorter = data[:start] + data[start + size :]
            try:
                list(run(shorter))
            except Exception as error:
                if _where(error) == where:
                    data = shorter
                    continue
            start += size
        size //= 2
    return data


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    """Raise Slow in the middle of an input that would take hours; only code that looks for signals is interrupted."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise Slow(f"not done after {seconds:.0f} s of CPU")

    before = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
