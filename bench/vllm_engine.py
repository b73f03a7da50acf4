"""vLLM's V1 scheduler in discrete steps: continuous batching, chunked prefill, paged KV, prefix cache, preemption.

    submit --> input queue --schedule--> waiting --schedule--> running --finish_step--> finished
                                            ^------ preempted ----'

A driver alternates `schedule(now)`, which builds a batch and says how long it takes, and `finish_step(now)` at that
time, which hands out one token for each sequence of the batch whose prompt is computed. Nothing here knows real time.
A driver in virtual time may ask for several steps at once, and get them where they are all alike.

Rules kept from vLLM (vllm/v1/core/sched/scheduler.py):
- Running sequences are served before waiting ones, and waiting ones first come, first served. When blocks run out the
  youngest running sequence is preempted: it goes back to the head of the queue and computes again what was evicted.
- A prompt is computed in chunks of what the token budget leaves; at least its last token is always computed.
- Full blocks are findable as soon as they are scheduled, so a second request for the same prefix in the same step hits.
- A prompt is let in only when all of its blocks fit.
- Gauges are written when a step ends. What arrived since it began is in none of them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from bench.kv_cache import KVCache
from bench.vllm_stats import EngineStats


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """vLLM's options by their names, and the time model. The defaults are near one H100 with a 7-8B model in bf16.

    A step takes `step_base + prefill tokens * step_per_prefill_token + decoding sequences * step_per_sequence`
    seconds, divided by `speed`. `max_num_queued_reqs` bounds requests in flight, waiting or running; 0 = no bound.
    """

    block_size: int = 16  # tokens
    num_gpu_blocks: int = 27_000  # about 55 GB left for KV at 128 KiB a token (8 KV heads, 32 layers)
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 32_768
    max_num_queued_reqs: int = 0
    step_base: float = 0.007  # seconds: 16 GB of weights read once
    step_per_prefill_token: float = 0.000_04  # seconds: 25,000 tokens/s
    step_per_sequence: float = 0.000_06  # seconds: the KV of about 1,500 tokens read once
    speed: float = 1.0

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "step_base", "speed"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.num_gpu_blocks < 2:
            raise ValueError(
                f"num_gpu_blocks must be at least 2 (block 0 is the null block), not {self.num_gpu_blocks}"
            )

    @property
    def context_tokens(self) -> int:
        """The longest prompt plus output that one request may ask for."""
        return min(self.max_model_len, (self.num_gpu_blocks - 1) * self.block_size)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate.

    `hashes` are the chained hashes of its full blocks (`kv_cache.block_hashes`), of the prompt and, where the output
    is known beforehand, of the output that follows it. `owner` is the driver's own and not looked at.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[int, ...] = ()
    finish_reason: str = "length"
    max_tokens: int = 0
    adapter: str = ""
    owner: Any = None


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of a request in the engine; read it, don't write it. Times are the driver's, 0.0 = not yet."""

    request: EngineRequest
    arrived: float
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    length: int = 0  # tokens so far: prompt plus generated
    computed: int = 0  # of these, tokens with KV
    generated: int = 0
    cached_tokens: int = 0  # of the prompt, found in the prefix cache when first scheduled
    blocks: int = 0  # held, of which the first `published` by hash
    published: int = 0
    preemptions: int = 0
    finished: bool = False


@dataclass(slots=True)
class _Batch:
    """What the step under way computes."""

    complete: list[Sequence] = field(default_factory=list)  # get a token when it ends
    prefill_tokens: int = 0
    decodes: int = 0
    steps: int = 1  # above 1: so many steps that only decode, one like the other
    began: float = 0.0  # seconds


class Engine:
    """One vLLM engine; mutable, single-threaded. Times must not go backwards from call to call."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.cache = KVCache(config.num_gpu_blocks)
        self.stats = EngineStats()
        self._sequences: dict[str, Sequence] = {}
        self._input: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._batch = _Batch()
        self._step_ended = 0.0
        self._adapters = False  # whether any request ever named one

    @property
    def in_flight(self) -> int:
        """Requests submitted and not yet finished or aborted."""
        return len(self._sequences)

    def submit(self, request: EngineRequest, now: float) -> bool:
        """Put a request into the input queue; False when `max_num_queued_reqs` refuses it.

        Raises ValueError for one that can never fit or whose id is in flight: the driver's mistake.
        """
        tokens = request.prompt_tokens + request.output_tokens
        if request.prompt_tokens < 1 or request.output_tokens < 1 or tokens > self.config.context_tokens:
            raise ValueError(
                f"request {request.request_id}: {request.prompt_tokens} prompt and {request.output_tokens} output "
                f"tokens, each at least 1, must not exceed the context of {self.config.context_tokens}"
            )
        if request.request_id in self._sequences:
            raise ValueError(f"request {request.request_id} is already in flight")
        if 0 < self.config.max_num_queued_reqs <= len(self._sequences):
            self.stats.rejections += 1
            return False
        sequence = Sequence(request, arrived=now, length=request.prompt_tokens)
        self._sequences[request.request_id] = sequence
        self._input.append(sequence)
        self._adapters |= bool(request.adapter)
        return True

    def abort(self, request_id: str) -> None:
        """Drop a request and give its blocks back; nothing happens for one that is not in flight."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        sequence.finished = True
        for queue in (self._input, self._waiting, self._running):
            if sequence in queue:
                queue.remove(sequence)
        self._release(sequence)
        self.stats.finished["abort"] += 1

    def reset_prefix_cache(self) -> None:
        """Forget every cached block that no sequence holds (vLLM does nothing at all while one is held)."""
        self.cache.clear()

    @property
    def steps(self) -> int:
        """How many steps `schedule` has begun at once."""
        return self._batch.steps

    def schedule(self, now: float, most: int = 1) -> float:
        """Begin a step: how many seconds it takes, 0.0 when there is nothing to do.

        With `most` above 1 up to so many steps at once, each of these seconds: as long as no prompt is computed, no
        sequence ends and blocks suffice. Whoever submits or aborts meanwhile has to `cut` them before it.
        """
        self._waiting.extend(self._input)
        self._input.clear()
        self._batch = batch = _Batch(began=now)
        budget, size, complete = self.config.max_num_batched_tokens, self.config.block_size, batch.complete
        index = 0
        while index < len(self._running) and budget:
            sequence = self._running[index]
            computed = sequence.computed
            if sequence.generated and computed + 1 == sequence.length and 0 < computed % size < size - 1:
                # Most of all sequences in most steps: one more token into a block that it has and does not fill.
                sequence.computed = computed + 1
                batch.decodes += 1
                complete.append(sequence)
                budget -= 1
                index += 1
                continue
            tokens = min(sequence.length - computed, budget)
            if not self._allocate(sequence, tokens):
                self._preempt()  # it may be `sequence` itself, which was the last one then
                continue
            self._compute(sequence, tokens)
            budget -= tokens
            index += 1
        self._admit(budget, now)
        if not batch.prefill_tokens and not batch.decodes:
            return 0.0
        config = self.config
        if most > 1 and not batch.prefill_tokens:
            batch.steps = min(most, self._alike())
        seconds = config.step_base
        seconds += batch.prefill_tokens * config.step_per_prefill_token + batch.decodes * config.step_per_sequence
        return seconds / config.speed

    def cut(self, steps: int) -> None:
        """Let what `schedule` began be over after so many of its steps."""
        self._batch.steps = min(self._batch.steps, steps)

    def finish_step(self, now: float) -> list[Sequence]:
        """End what `schedule` began: the sequences that got a token, complete ones with `finished` set."""
        stats, batch = self.stats, self._batch
        if batch.steps > 1:
            self._repeat(now)
        self._batch = _Batch()
        produced = [sequence for sequence in batch.complete if not sequence.finished]
        steady = 0  # sequences whose last token came from the step before: all of them waited the same time
        done = False
        for sequence in produced:
            sequence.generated += 1
            sequence.length += 1
            if sequence.generated == 1:
                self._observe_first(sequence, now)
            elif sequence.last_token == self._step_ended:
                steady += 1
            else:
                stats.inter_token.observe(now - sequence.last_token)
            sequence.last_token = now
            if sequence.generated == sequence.request.output_tokens:
                self._finish(sequence, now)
                done = True
        if done:
            self._running = [sequence for sequence in self._running if not sequence.finished]
        if steady:
            stats.inter_token.observe(now - self._step_ended, steady)
        stats.generation_tokens += len(produced)
        stats.step_tokens.observe(batch.prefill_tokens + len(produced))
        self._step_ended = now
        self._write_gauges(now)
        return produced

    # --- scheduling

    def _admit(self, budget: int, now: float) -> None:
        """Move waiting sequences into the batch, in order, until one does not fit."""
        size = self.config.block_size
        while self._waiting and budget and len(self._running) < self.config.max_num_seqs:
            sequence = self._waiting[0]
            hashes = sequence.request.hashes
            hits = self.cache.match(hashes, (sequence.length - 1) // size)
            if not self.cache.fits(hashes[:hits], -(-sequence.length // size)):
                return
            self._waiting.popleft()
            self._running.append(sequence)
            self.cache.hold(hashes[:hits])
            sequence.blocks = sequence.published = hits
            sequence.computed = hits * size
            if not sequence.preemptions:
                sequence.scheduled = now
                sequence.cached_tokens = min(sequence.computed, sequence.request.prompt_tokens)
                self.stats.prefix_queries += sequence.request.prompt_tokens
                self.stats.prefix_hits += sequence.cached_tokens
            tokens = min(sequence.length - sequence.computed, budget)
            self._allocate(sequence, tokens)  # `fits` has said that it can
            self._compute(sequence, tokens)
            budget -= tokens

    def _allocate(self, sequence: Sequence, tokens: int) -> bool:
        need = -(-(sequence.computed + tokens) // self.config.block_size) - sequence.blocks
        if need > 0:
            if not self.cache.take(need):
                return False
            sequence.blocks += need
        return True

    def _compute(self, sequence: Sequence, tokens: int) -> None:
        """Account for `tokens` more of a sequence in this step."""
        batch = self._batch
        if sequence.generated and tokens == 1:
            batch.decodes += 1
        else:
            batch.prefill_tokens += tokens
        sequence.computed += tokens
        if sequence.computed == sequence.length:
            batch.complete.append(sequence)
        self._publish(sequence)

    def _publish(self, sequence: Sequence) -> None:
        """Make the blocks that are full by now findable."""
        full = sequence.computed // self.config.block_size
        if full > sequence.published:
            filled = sequence.request.hashes[sequence.published : full]
            self.cache.publish(filled)
            sequence.published += len(filled)

    def _alike(self) -> int:
        """How many steps that only decode are alike: until a sequence ends, or one might find no block.

        One that comes back from preemption, and so waited longer for its token, makes the first step another.
        """
        running = self._batch.complete
        if any(sequence.last_token != self._batch.began for sequence in running):
            return 1
        ends = min(sequence.request.output_tokens - sequence.generated for sequence in running)
        return min(ends, 1 + self.cache.free // len(running) * self.config.block_size)

    def _repeat(self, now: float) -> None:
        """All steps of the batch but its last."""
        batch, stats = self._batch, self.stats
        more = batch.steps - 1
        seconds = (now - batch.began) / batch.steps
        running = [sequence for sequence in batch.complete if not sequence.finished]
        self._step_ended = now - seconds
        for sequence in running:
            self._allocate(sequence, more)  # `_alike` has said that it can
            sequence.computed += more
            sequence.length += more
            sequence.generated += more
            sequence.last_token = self._step_ended
            self._publish(sequence)
        stats.inter_token.observe(seconds, more * len(running))
        stats.generation_tokens += more * len(running)
        stats.step_tokens.observe(len(running), more)

    def _preempt(self) -> None:
        """Send the youngest running sequence back to the head of the queue, without its blocks."""
        sequence = self._running.pop()
        self._release(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self._waiting.appendleft(sequence)
        self.stats.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.cache.release(sequence.request.hashes[: sequence.published], sequence.blocks - sequence.published)
        sequence.blocks = sequence.published = 0

    # --- measuring

    def _observe_first(self, sequence: Sequence, now: float) -> None:
        sequence.first_token = now
        self.stats.first_token.observe(now - sequence.arrived)
        self.stats.prompt_tokens += sequence.request.prompt_tokens
        self.stats.cached_tokens += sequence.cached_tokens

    def _finish(self, sequence: Sequence, now: float) -> None:
        request, stats = sequence.request, self.stats
        sequence.finished = True
        del self._sequences[request.request_id]
        self._release(sequence)
        stats.finished[request.finish_reason] += 1
        stats.e2e.observe(now - sequence.arrived)
        stats.queue.observe(sequence.scheduled - sequence.arrived)
        stats.inference.observe(now - sequence.scheduled)
        stats.prefill.observe(sequence.first_token - sequence.scheduled)
        stats.decode.observe(now - sequence.first_token)
        if sequence.generated > 1:
            stats.time_per_token.observe((now - sequence.first_token) / (sequence.generated - 1))
        stats.request_prompt_tokens.observe(request.prompt_tokens)
        stats.computed_tokens.observe(request.prompt_tokens - sequence.cached_tokens)
        stats.request_generation_tokens.observe(sequence.generated)
        stats.request_max_tokens.observe(request.max_tokens or request.output_tokens)
        stats.request_n.observe(1)
        stats.request_preemptions.observe(sequence.preemptions)

    def _write_gauges(self, now: float) -> None:
        stats = self.stats
        stats.running = len(self._running)
        stats.waiting = len(self._waiting)
        stats.kv_usage = self.cache.usage
        if not self._adapters:
            return
        running = {sequence.request.adapter for sequence in self._running} - {""}
        waiting = {sequence.request.adapter for sequence in self._waiting} - {""}
        if running or waiting:
            stats.lora[",".join(sorted(running)), ",".join(sorted(waiting))] = now
