"""Tells other pickers what this one sends where, and hears them, through one or more management servers.

    Outbox --a batch each PERIOD--> the first server that is there ; every server --> Inbox

Nothing waits for it: what a server does not take fills the Outbox, which is bounded, and a server that is away is tried
again for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf

import grpc
import structlog

from picker.exchange import PERIOD, Inbox, Loss, Outbox
from picker.link import Link, Stream
from picker.memory import SILENT, Memory
from picker.metrics import PickerMetrics
from xds.tls import TlsFiles
from xds.wire.exchange_pb2 import Hello

METHOD = "/vllm_xds.v1.Exchange/Share"
SAY_AGAIN = 60.0  # seconds between two log lines on what is refused

log = structlog.get_logger()


class _Share:
    """The exchange through one server. Mutable."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.joined = False
        self.heard_at = -inf  # seconds
        self.others = 0


class ExchangeClient:
    """The exchange of one process. Mutable.

    `clock` gives seconds, the same as the picker's; `random` floats in [0, 1). `tls` is read at each connection.
    """

    def __init__(
        self,
        servers: Sequence[str],
        hello: Hello,
        outbox: Outbox,
        inbox: Inbox,
        memory: Memory,
        metrics: PickerMetrics,
        *,
        clock: Callable[[], float],
        random: Callable[[], float],
        tls: TlsFiles | None = None,
    ) -> None:
        self._hello = hello
        self._outbox = outbox
        self._inbox = inbox
        self._memory = memory
        self._metrics = metrics
        self._clock = clock
        self._shares = [_Share(Link(server, METHOD, random, tls)) for server in servers]
        self._others = 0
        self._full = 0
        self._refused_at = -inf

    async def run(self) -> None:
        """Take part until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for share in self._shares:
                tasks.create_task(self._take_part(share))

    async def _take_part(self, share: _Share) -> None:
        async def talk(stream: Stream) -> None:
            await stream.write(self._hello.SerializeToString())
            teller = asyncio.create_task(self._tell(share, stream))
            try:
                while (data := await stream.read()) is not grpc.aio.EOF:
                    self._hear(share, data)
            finally:
                teller.cancel()
                await asyncio.wait([teller])

        def ended(reason: str) -> None:
            if share.joined:
                log.warning("exchange lost", server=share.link.address, reason=reason)
            elif share.link.failures == 0:
                log.warning("exchange unreachable", server=share.link.address, reason=reason)
            share.joined, share.heard_at = False, -inf
            self._count()

        await share.link.run(talk, ended)

    async def _tell(self, share: _Share, stream: Stream) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the stream is over: its reader says why
            while True:
                await asyncio.sleep(PERIOD)
                if share is next(iter(self._there()), None) and (batch := self._outbox.take()):
                    self._metrics.exchange_bytes.labels("told").inc(len(batch))
                    self._metrics.exchange_lost.labels(Loss.FULL).inc(self._outbox.full - self._full)
                    self._full = self._outbox.full
                    await stream.write(batch)

    def _there(self) -> list[_Share]:
        """Those of which something was heard lately."""
        now = self._clock()
        return [share for share in self._shares if now - share.heard_at <= SILENT / 1000]

    def _hear(self, share: _Share, message: bytes) -> None:
        now = self._clock()
        heard = self._inbox.hear(message, now)
        if not share.joined:
            share.joined, share.link.failures = True, 0
            log.info("exchange joined", server=share.link.address)
            if not self._there():
                self._outbox.take()  # what nobody was told in time says nothing of now
        share.heard_at, share.others = now, heard.others
        self._count()
        if not self._hello.deaf:
            self._memory.note_peers(self._others, now)
        self._metrics.exchange_bytes.labels("heard").inc(len(message))
        self._metrics.exchange_requests.inc(heard.requests)
        for reason, count in heard.lost.items():
            self._metrics.exchange_lost.labels(reason).inc(count)
        if heard.refusal and now - self._refused_at >= SAY_AGAIN:
            self._refused_at = now
            log.warning("placements refused", reason=heard.refusal)

    def _count(self) -> None:
        """Other pickers that are heard: as many as the server knows that knows most."""
        others = max((share.others for share in self._there()), default=0)
        self._metrics.exchange_peers.set(others)
        if others != self._others and not self._hello.deaf:
            log.info("peers changed", heard=others)
        self._others = others
