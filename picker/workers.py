"""Several picker processes as one: started, watched, started again, ended together, with one page of metrics.

    parent ── settings ──▶ worker 0 ─┐
       │                   worker 1 ─┼── memory they share: what every pod has been sent (picker/memory.py)
       ◀── reports ─────── worker N ─┘

Each worker answers Envoy at an address of its own, and Envoy's round robin spreads the requests. The parent holds the
shared memory, so that it outlives any worker, and is in no request's way.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

import bootstrap
from picker.memory import SIZE
from picker.worker import DRAIN, GRACE, LINE, Settings, encode_question, explaining, on_signals
from xds.status import serve_status

BACKOFF = 0.1  # seconds before a worker is started again, doubled each time it ends before STEADY
MAX_BACKOFF = 5.0  # seconds
STEADY = 10.0  # seconds
SILENT = 30.0  # seconds without a report: it hangs, or will never start, and is killed; Envoy has gone on without it
LAST = 2.0  # seconds more than a drain takes, then a worker is killed

log = structlog.get_logger()


class WorkerError(Exception):
    """A worker ended before it had served; it has said why."""


class _Worker:
    """One worker and its successors. Mutable."""

    def __init__(self, settings: Settings, memory: int) -> None:
        self.settings = settings
        self.serving = False
        self.metrics = ""  # its last page
        self.served = False  # ever
        self._memory = memory
        self._process: asyncio.subprocess.Process | None = None
        self._control: asyncio.StreamWriter | None = None
        self._asked: deque[asyncio.Future[dict[str, Any] | None]] = deque()  # it answers in this order

    async def run(self) -> int:
        """Start it and follow its reports until it ends; its exit status."""
        ours, its = socket.socketpair()
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "picker.worker", str(self._memory), str(its.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(self._memory, its.fileno()),
                process_group=0,  # of its own: Ctrl-C reaches the parent alone, which ends the workers in order
            )
        except BaseException:
            ours.close()
            raise
        finally:
            its.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=LINE)
        try:
            writer.write(self.settings.encode())
            self._control = writer
            await self._follow(reader)
            return await asyncio.wait_for(process.wait(), LAST)
        except TimeoutError:
            log.error("worker hangs", worker=self.settings.worker)  # noqa: TRY400 - no traceback
            self.kill()
            return await process.wait()
        except BaseException:
            self.kill()
            raise
        finally:
            self.serving = False
            self._control = None
            while self._asked:
                _answer(self._asked.popleft(), None)
            writer.close()

    async def _follow(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while line := await asyncio.wait_for(reader.readline(), SILENT):
                report = json.loads(line)
                if explained := report.get("explained"):
                    _answer(self._asked.popleft(), explained)
                    continue
                self.serving, self.metrics = report["serving"], report["metrics"]
                self.served = self.served or self.serving

    async def explain(self, question: bytes) -> dict[str, Any] | None:
        """Its answer to an `encode_question`; None when it ends before."""
        if self._control is None:
            return None
        answered: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        self._asked.append(answered)
        self._control.write(question)
        return await answered

    def terminate(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()


def _answer(asked: asyncio.Future[dict[str, Any] | None], explained: dict[str, Any] | None) -> None:
    if not asked.done():  # whoever asked may have gone
        asked.set_result(explained)


class Workers(Collector):
    """The parent. Mutable. As a collector it yields every worker's series, with the label `worker`."""

    def __init__(self, settings: Settings, count: int) -> None:
        """ValueError: the addresses do not suffice."""
        listen = zip(*(bootstrap.worker_addresses(address, count) for address in settings.listen), strict=True)
        self._memory = os.memfd_create("vllm-xds-picker")
        os.ftruncate(self._memory, SIZE)
        self._workers = [
            _Worker(replace(settings, listen=addresses, worker=index), self._memory)
            for index, addresses in enumerate(listen)
        ]
        self._ending = False
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._restarts = Counter(
            "vllm_xds_picker_worker_restarts", "Workers started again.", ["worker"], registry=self.registry
        )

    @property
    def serving(self) -> bool:
        """Whether requests are welcome: every worker has served, one still does, and they are not asked to end."""
        return (
            not self._ending
            and all(each.served for each in self._workers)
            and any(each.serving for each in self._workers)
        )

    async def explain(self, cluster_name: str, body: bytes, session: str, objective: str) -> dict[str, Any] | None:
        """What one of them would answer to a request, and why; None when none serves."""
        for worker in self._workers:
            if worker.serving:
                return await worker.explain(encode_question(cluster_name, body, session, objective))
        return None

    async def run(self, asked: asyncio.Event) -> None:
        """Keep all of them running until `asked` is set, then end them; WorkerError: one cannot start."""
        ending = asyncio.create_task(self._end(asked))
        try:
            async with asyncio.TaskGroup() as tasks:
                for worker in self._workers:
                    tasks.create_task(self._keep(worker))
        except* WorkerError as errors:
            raise errors.exceptions[0] from None
        finally:
            ending.cancel()

    async def _keep(self, worker: _Worker) -> None:
        loop = asyncio.get_running_loop()
        backoff = BACKOFF
        while True:
            began = loop.time()
            status = await worker.run()
            if self._ending:
                return
            if not worker.served:
                raise WorkerError
            if loop.time() - began > STEADY:
                backoff = BACKOFF
            number = worker.settings.worker
            log.warning("worker lost", worker=number, status=status, again_in=backoff)
            self._restarts.labels(str(number)).inc()
            await asyncio.sleep(backoff)
            backoff = min(MAX_BACKOFF, 2 * backoff)

    async def _end(self, asked: asyncio.Event) -> None:
        """Wait until it is asked for; end all workers, at once when asked again, and by force when they do not."""
        await asked.wait()
        self._ending = True
        for seconds in (DRAIN, GRACE + LAST):
            asked.clear()
            for worker in self._workers:
                worker.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(asked.wait(), seconds)
        for worker in self._workers:
            worker.kill()

    def describe(self) -> Sequence[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for worker in self._workers:
            for family in text_string_to_metric_families(worker.metrics):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {"worker": str(worker.settings.worker), **sample.labels}
                    merged.samples.append(sample._replace(labels=labels))
        yield from families.values()


async def supervise(settings: Settings, count: int, host: str, port: int) -> None:
    """Run `count` workers until SIGTERM or SIGINT; metrics on `host:port`.

    Raises WorkerError, ValueError for addresses that do not suffice, and OSError for metrics that cannot be served.
    """
    workers = Workers(settings, count)
    asked = asyncio.Event()
    on_signals(asked)
    posted = explaining(workers.explain)
    async with serve_status(host, port, workers.registry, lambda: workers.serving, posted=posted) as metrics_port:
        log.info("workers started", workers=count, metrics=f"{host}:{metrics_port}")
        await workers.run(asked)
        log.info("workers stopped")
