"""Does Envoy refuse what we accept? Objects from the edges of their schemas (tests/edges.py) are parsed, and what is
left is served to one running Envoy, case by case, as the server would:

    case -> parse -> resolve -> translate -> publish -> the real Envoy: ACK -> a request to each virtual host

    python -m tests.refusals --examples 5000

Every value listed there is tried in every field it may stand in, then so many examples of Hypothesis with one to three
fields changed; the same seed tries the same ones. A case fails when Envoy refuses a resource, ends, stops serving
somebody else's route, or serves the changed route otherwise than its object says (tests/probes.py).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import hypothesis
import structlog

import bootstrap
from bench.envoy import Envoy, free_port
from tests import edges
from tests.probes import complaints, echo, exchange, request_for
from xds.envoy import Options
from xds.index import Index, Reading
from xds.metrics import Metrics
from xds.model import Forward, Route, Topology
from xds.parse import parse
from xds.resolve import resolve
from xds.server import ManagementServer
from xds.snapshot import Snapshot
from xds.translate import translate

BOUND = 30.0  # seconds until Envoy has answered: it takes milliseconds, or 15 s where a cluster never warms
MANY = 10  # failures after which a run stops
SHOWN = 500  # characters of Envoy's reason, which ends it
SOON = 2.0  # seconds: a timeout below that may be what a probe meets
LOOKS = 3  # at the changed routes: Envoy's workers have them a moment after its main thread says so


class Refusals:
    """One Envoy and its server (mutable). `tried` counts by what became of it."""

    def __init__(self, scratch: Path, *, delta: bool = True) -> None:
        self.scratch = scratch
        self.delta = delta
        self.listen = free_port()
        self.upstream = 0
        self.options = Options(bind="127.0.0.1", pickers=("127.0.0.1:1",))
        self.tried: Counter[str] = Counter()
        self._refusals: list[str] = []
        self._refusal = asyncio.Event()
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        structlog.configure(processors=[self._note])  # before the server's loggers are bound
        self.server = ManagementServer(Metrics())
        (xds,) = await self.server.start(["127.0.0.1:0"])
        self._stack.push_async_callback(self.server.stop, 0.1)
        upstream = await asyncio.start_server(echo, "127.0.0.1", 0)
        self._stack.callback(upstream.close)
        self.upstream = upstream.sockets[0].getsockname()[1]
        admin = f"127.0.0.1:{free_port()}"
        config = self.scratch / "envoy.yaml"
        config.write_text(bootstrap.render(f"127.0.0.1:{xds}", admin=admin, delta=self.delta))
        self.envoy = await self._stack.enter_async_context(Envoy(config, admin, self.scratch / "envoy.log"))
        topology = self.topology(edges.steady(self.listen, self.upstream))
        refusals = await self.offer(translate(topology, self.options, {}))
        assert refusals == []
        await self.envoy.ready(BOUND)
        async with asyncio.timeout(BOUND):  # its workers listen a moment later
            while await self.probe(topology) != []:
                pass

    async def close(self) -> None:
        await self._stack.aclose()

    def _note(self, _: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """The server's log: a refusal ends the wait for Envoy; nothing is printed."""
        if event["event"] == "response refused":
            self._refusals.append(f"{event['type']}: {event['message'][-SHOWN:]}")
            self._refusal.set()
        raise structlog.DropEvent

    def topology(self, case: edges.Case) -> Topology:
        """What the server would make of the case's documents."""
        return resolve(Index().update(Reading(tuple(map(parse, case.documents)))).config())

    async def offer(self, snapshot: Snapshot) -> list[str]:
        """Publish it, and return Envoy's refusals when it has taken everything or refused something."""
        self._refusals.clear()
        self._refusal.clear()
        self.server.publish(snapshot)
        waits = [asyncio.ensure_future(each) for each in (self.server.wait_settled(), self._refusal.wait())]
        done, pending = await asyncio.wait(waits, timeout=BOUND, return_when=asyncio.FIRST_COMPLETED)
        for each in pending:
            each.cancel()
        return list(self._refusals) if done else ["no answer: see the end of Envoy's log", self._log()]

    async def probe(self, topology: Topology) -> list[str]:
        """Ask the first route of each virtual host, where that can be done, and return what is wrong."""
        wrong = []
        for host in topology.listeners[0].virtual_hosts:
            for route in host.routes[:1]:
                request = request_for(route, host.hostname)
                if request is None or not self._can_answer(topology, route):
                    continue
                self.tried["requests"] += 1
                try:
                    reply = await exchange(self.listen, request)
                except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                    return [f"{host.hostname}: {error!r}", self._log()]
                wrong += [f"{host.hostname}: {text}" for text in complaints(route, request, reply)]
        return wrong

    def _can_answer(self, topology: Topology, route: Route) -> bool:
        """Whether the backends are our upstream, and the timeouts leave it the time to answer."""
        if not isinstance(route.action, Forward):
            return True
        action = route.action
        names = {name for name, _, _ in action.clusters}
        clusters = [each for each in topology.clusters if each.name in names]
        times = [action.timeout, action.backend_timeout, action.idle_timeout]
        times += [time for each in clusters for time in (each.connect_timeout, each.connection_idle_timeout)]
        ours = [("127.0.0.1", self.upstream)]
        return (
            "" not in names
            and not any(each.http2 for each in clusters)
            and all([(e.address, e.port) for e in each.endpoints] == ours for each in clusters)
            and all(not time or time > SOON for time in times)
        )

    def _log(self) -> str:
        return "\n".join((self.scratch / "envoy.log").read_text(errors="replace").splitlines()[-5:])

    async def attempt(self, case: edges.Case) -> str:
        """Serve the case; "" when all is well or nothing of it is left to serve, else what is wrong."""
        self.tried["cases"] += 1
        topology = self.topology(case)
        hosts = [host for listener in topology.listeners for host in listener.virtual_hosts]
        if all(route.name.startswith("default/steady/") for host in hosts for route in host.routes):
            self.tried["of them rejected by parse"] += 1
            return ""
        wrong = await self.offer(translate(topology, self.options, {}))
        if not wrong:
            for _ in range(LOOKS):
                wrong = await self.probe(topology)
                if not wrong:
                    break
        return "\n".join([*wrong, str(case)]) if wrong else ""

    async def attempt_options(self, options: dict[str, Any]) -> str:
        """Serve the steady case with these options, unless they are none."""
        self.tried["options"] += 1
        try:
            chosen = Options(**{"bind": self.options.bind, **options})
        except ValueError:
            self.tried["of the options rejected"] += 1
            return ""
        wrong = await self.offer(translate(self.topology(edges.steady(self.listen, self.upstream)), chosen, {}))
        return "\n".join([*wrong, str(options)]) if wrong else ""

    async def sweep(self, cases: Iterable[edges.Case], options: Iterable[dict[str, Any]]) -> list[str]:
        """What is wrong with these, MANY at most."""
        found: list[str] = []
        for case in cases:
            found += filter(None, [await self.attempt(case)])
            if len(found) == MANY:
                return found
        for each in options:
            found += filter(None, [await self.attempt_options(each)])
        return found


def search(runner: asyncio.Runner, refusals: Refusals, examples: int, seed: int) -> None:
    """Try so many examples. AssertionError with the smallest case that fails."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(edges.cases(refusals.listen, refusals.upstream))
    def attempt(case: edges.Case) -> None:
        wrong = runner.run(refusals.attempt(case))
        assert not wrong, wrong

    attempt()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.refusals", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sotw", action="store_true", help="state of the world instead of delta")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, asyncio.Runner() as runner:
        refusals = Refusals(Path(scratch), delta=not args.sotw)
        try:
            runner.run(refusals.start())
            listed = edges.listed(refusals.listen, refusals.upstream)
            found = runner.run(refusals.sweep(listed, edges.OPTIONS))
            if not found:
                search(runner, refusals, args.examples, args.seed)
        except AssertionError as error:
            found = [str(error)]
        finally:
            runner.run(refusals.close())
    print(*found, sep="\n\n", file=sys.stderr)  # noqa: T201 - a command
    said = [f"{count} {what}" for what, count in refusals.tried.items()]
    print(f"{', '.join(said)}; {len(found)} failed; {time.monotonic() - began:.0f} s")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
