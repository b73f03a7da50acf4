"""A simulated vLLM pod: the engine of `vllm_engine` in real time behind vLLM's HTTP API. No GPU, no model.

    POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics   GET /version
    POST /reset_prefix_cache (as with VLLM_SERVER_DEV_MODE=1)

Every reply carries `x-sim-pod: <name>`. As a library:

    async with SimulatedPod("pod-0") as pod:
        ...  # http://{pod.address}:{pod.port}

One timer per pod drives the engine; a step's tokens are written straight to the streams' transports, so a stream
wakes its HTTP handler once at its end and not once a token.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self

from aiohttp import web

from bench import vllm_api as api
from bench.kv_cache import block_hashes
from bench.vllm_engine import Engine, EngineConfig, EngineRequest, Sequence
from bench.vllm_page import CONTENT_TYPE, MetricsPage
from bench.vllm_stats import HttpStats

MODEL = "/model/qwen"
VERSION = "0.32.0"  # of the vLLM that is simulated
MAX_BODY = 64 << 20  # bytes
MAX_LAG = 0.1  # seconds that steps may run late and catch up; a busier machine makes the pod slower instead
KEEP_ALIVE = 5.0  # seconds until an idle connection is closed: VLLM_HTTP_TIMEOUT_KEEP_ALIVE
CLOSE_TIMEOUT = 2.0  # seconds for handlers to write their last bytes when the server stops

COUNTED = ("/v1/completions", "/v1/chat/completions", "/v1/models")  # paths in the http_* families of the page

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Page = Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]  # what is answered in place of a metrics page


@dataclass(slots=True)
class Faults:
    """What a test makes of a pod, at any time. A status of 200 means that the pod answers as it should.

    `hang` accepts every request and never answers; a request that hangs does so until its client or the pod is gone.
    `page` answers a request for the metrics page, given the right one.
    """

    health: int = 200
    metrics: int = 200
    completions: int = 200
    hang: bool = False
    page: Page | None = None


class _Reply:
    """One HTTP reply under way: its choices still open, and how it ended (None, or an error)."""

    __slots__ = ("cached_tokens", "ended", "open", "transport")

    def __init__(self, choices: int, transport: asyncio.Transport | None) -> None:
        self.open = choices
        self.transport = transport  # None: not streamed
        self.cached_tokens = 0
        self.ended: asyncio.Future[api.ApiError | None] = asyncio.get_running_loop().create_future()

    def end(self, error: api.ApiError | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a sequence of the engine belongs to."""

    reply: _Reply
    frames: api.Frames | None  # None: not streamed


class SimulatedPod:
    """One pod; start and stop it, or use it as an async context manager. A second start is a restarted process."""

    def __init__(
        self,
        name: str,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        config: EngineConfig | None = None,
        model: str = MODEL,
        adapters: tuple[str, ...] = (),
        legacy_metrics: bool = False,
    ) -> None:
        self.name = name
        self.address = address
        self.port = port  # 0 until the first start: then the free port that was found, and kept
        self.config = config if config is not None else EngineConfig()
        self.model = model
        self.adapters = adapters
        self.legacy_metrics = legacy_metrics
        self.faults = Faults()
        self._headers = {"server": "uvicorn", "x-sim-pod": name}
        self._ids = itertools.count()
        self._reset()

    def _reset(self) -> None:
        """The state of a fresh process."""
        self.engine = Engine(self.config)
        self._http = HttpStats()
        self._replies: set[_Reply] = set()
        self._draining = False
        self._stopped = asyncio.Event()
        self._timer: asyncio.Handle | None = None
        self._step_end = 0.0

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen. Raises OSError when the address is taken."""
        self._reset()
        self._loop = asyncio.get_running_loop()
        self._epoch = time.time() - time.monotonic()  # engine time is unix time that never jumps
        self._page = MetricsPage(
            self.config,
            self.model,
            time.time(),
            max_lora=len(self.adapters),
            legacy=self.legacy_metrics,
        )
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._front])
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/version", self._version)
        app.router.add_post("/reset_prefix_cache", self._reset_prefix_cache)
        app.router.add_route("*", "/{path:.*}", self._not_found)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=CLOSE_TIMEOUT,
            keepalive_timeout=KEEP_ALIVE,
        )
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self.address, self.port).start()
        except OSError:
            await self._runner.cleanup()
            raise
        self.port = self._runner.addresses[0][1]

    async def stop(self, shutdown_timeout: float = 0.0) -> None:
        """What SIGTERM does under vLLM's --shutdown-timeout (seconds).

        0: streams end with an error event inside their HTTP 200, other requests with HTTP 500. Above 0: requests in
        flight may finish for so long, while /health stays 200 and new completions get HTTP 500.
        """
        self._draining = True
        if shutdown_timeout > 0 and self._replies:
            await asyncio.wait({reply.ended for reply in self._replies}, timeout=shutdown_timeout)
        for reply in self._replies:
            reply.end(api.ENGINE_DEAD)
        await self._close()

    async def kill(self) -> None:
        """What SIGKILL does: every connection is reset."""
        for site in list(self._runner.sites):
            await site.stop()
        for connection in self._runner.server.connections if self._runner.server else ():
            if connection.transport is not None:
                connection.transport.abort()
        await self._close()

    async def _close(self) -> None:
        self._stopped.set()
        await self._runner.cleanup()
        if self._timer is not None:
            self._timer.cancel()

    # --- the engine in real time

    def _now(self) -> float:
        # Not the loop's time: uvloop's has a resolution of a millisecond, longer than a fast pod's step.
        return time.monotonic() + self._epoch

    def _wake(self) -> None:
        """Let the engine begin a step soon, if none is under way: what arrives together is scheduled together."""
        if self._timer is None:
            self._step_end = time.monotonic()
            self._timer = self._loop.call_soon(self._begin_step)

    def _begin_step(self) -> None:
        duration = self.engine.schedule(self._now())
        if duration == 0.0:
            self._timer = None
            return
        now = time.monotonic()
        self._step_end = max(self._step_end, now - MAX_LAG) + duration
        self._timer = self._loop.call_later(max(0.0, self._step_end - now), self._end_step)

    def _end_step(self) -> None:
        for sequence in self.engine.finish_step(self._now()):
            choice: _Choice = sequence.request.owner
            if choice.frames is not None and choice.reply.transport is not None:
                choice.reply.transport.write(choice.frames.token(sequence.generated, last=sequence.finished))
            if sequence.finished:
                _finish(choice.reply, sequence)
        self._begin_step()

    # --- HTTP

    @web.middleware
    async def _front(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Count and time the requests that vLLM's HTTP front does."""
        if self.faults.hang:
            await self._stopped.wait()
        started = time.monotonic()
        response = await handler(request)
        if request.path in COUNTED:
            seconds = time.monotonic() - started
            size = request.content_length or 0
            self._http.observe(request.path, request.method, response.status, size, seconds)
        return response

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        if self.faults.completions != 200:
            return self._error(api.ApiError(self.faults.completions, "Injected fault.", "InternalServerError"))
        chat = http.path == "/v1/chat/completions"
        request = api.parse(await http.read(), chat=chat)
        if isinstance(request, api.ApiError):
            return self._error(request)
        if request.model and request.model != self.model and request.model not in self.adapters:
            return self._error(api.unknown_model(request.model))
        if self._draining:
            return self._error(api.ENGINE_DEAD)
        outputs = []
        for prompt in request.prompts:
            output = request.output(prompt, self.config.context_tokens)
            if isinstance(output, api.ApiError):
                return self._error(output)
            outputs.append(output)
        kind = "chatcmpl" if chat else "cmpl"
        reply_id = f"{kind}-{http.headers.get('x-request-id') or f'{self.name}-{next(self._ids)}'}"
        envelope = api.Envelope(chat, reply_id, request.model or self.model, int(time.time()))
        return await self._generate(http, request, outputs, envelope)

    async def _generate(
        self, http: web.Request, request: api.ApiRequest, outputs: list[tuple[int, str]], envelope: api.Envelope
    ) -> web.StreamResponse:
        stream = None
        if request.stream:
            stream = web.StreamResponse(headers={**self._headers, "content-type": "text/event-stream; charset=utf-8"})
            stream.enable_chunked_encoding()
            await stream.prepare(http)
        reply = _Reply(len(outputs), http.transport if stream else None)
        self._replies.add(reply)
        ids: list[str] = []
        try:
            for index, (prompt, output) in enumerate(zip(request.prompts, outputs, strict=True)):
                frames = envelope.frames(index, output[1]) if stream else None
                engine_request = self._engine_request(request, prompt, output, _Choice(reply, frames))
                if not self.engine.submit(engine_request, self._now()):
                    reply.end(api.OVERLOADED)
                    break
                ids.append(engine_request.request_id)
            self._wake()
            error = await reply.ended
        finally:
            reply.transport = None
            self._replies.discard(reply)
            for request_id in ids:
                self.engine.abort(request_id)  # a client that left, an error, a shutdown
        tokens = sum(api.token_count(prompt) for prompt in request.prompts)
        usage = api.usage(tokens, sum(output for output, _ in outputs), reply.cached_tokens)
        if stream is None:
            if error is not None:
                return self._error(error)
            return self._json(envelope.reply(outputs, usage))
        tail = api.sse(error.body()) if error else envelope.usage_event(usage) if request.include_usage else b""
        await stream.write_eof(tail + api.DONE)
        return stream

    def _engine_request(
        self, request: api.ApiRequest, prompt: bytes, output: tuple[int, str], choice: _Choice
    ) -> EngineRequest:
        tokens, finish_reason = output
        adapter = request.model if request.model in self.adapters else ""
        text = prompt + api.filler(tokens)
        return EngineRequest(
            request_id=str(next(self._ids)),
            prompt_tokens=api.token_count(prompt),
            output_tokens=tokens,
            hashes=block_hashes(text, self.config.block_size, seed=(adapter, request.cache_salt)),
            finish_reason=finish_reason,
            max_tokens=request.max_tokens or 0,
            adapter=adapter,
            owner=choice,
        )

    async def _models(self, _: web.Request) -> web.Response:
        created, limit = int(time.time()), self.config.context_tokens
        base = {"object": "model", "created": created, "owned_by": "vllm", "max_model_len": limit}
        models = [{"id": self.model, "root": self.model, "parent": None, **base}]
        models += [{"id": name, "root": name, "parent": self.model, **base} for name in self.adapters]
        return self._json(json.dumps({"object": "list", "data": models}).encode())

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=self.faults.health, headers=self._headers)

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        if self.faults.metrics != 200:
            return web.Response(status=self.faults.metrics, headers=self._headers)
        page = self._page.render(self.engine.stats, self._http)
        if self.faults.page is not None:
            return await self.faults.page(request, page)
        return web.Response(body=page, headers={**self._headers, "content-type": CONTENT_TYPE})

    async def _version(self, _: web.Request) -> web.Response:
        return self._json(json.dumps({"version": VERSION}).encode())

    async def _reset_prefix_cache(self, _: web.Request) -> web.Response:
        self.engine.reset_prefix_cache()
        return web.Response(headers=self._headers)

    async def _not_found(self, _: web.Request) -> web.Response:
        return self._error(api.NOT_FOUND)

    def _json(self, body: bytes, status: int = 200) -> web.Response:
        return web.Response(body=body, status=status, headers={**self._headers, "content-type": "application/json"})

    def _error(self, error: api.ApiError) -> web.Response:
        return self._json(error.body(), error.status)


def _finish(reply: _Reply, sequence: Sequence) -> None:
    reply.cached_tokens += sequence.cached_tokens
    reply.open -= 1
    if reply.open == 0:
        reply.end(None)
