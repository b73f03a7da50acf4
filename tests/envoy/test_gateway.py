"""The whole gateway with the real Envoy, in both protocol variants: start, change, loss and return of each part."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace

import aiohttp
import pytest
import structlog

from bench.envoy import Envoy, free_port
from tests.envoy.conftest import Gateway
from xds.control import Control
from xds.metrics import Metrics
from xds.model import HTTPRoute, MatchType, PathMatch, RouteMatch, Strategy
from xds.wire.load_pb2 import PoolLoad

pytestmark = [pytest.mark.envoy, pytest.mark.timeout(90)]

LONG = "You are a careful assistant. " * 1200  # 34 KB, 8,700 tokens: dearer than a few requests in front


class Traffic:
    """Requests one after another on one port, until it is told to stop; a test looks at what came back."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession, port: int) -> None:
        self._gateway, self._session, self._port = gateway, session, port
        self.statuses: Counter[int] = Counter()
        self.errors: list[str] = []
        self._progress = asyncio.Event()
        self._stopping = False
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self._stopping:
            try:
                status, _, _ = await self._gateway.ask(self._session, self._port, f"{LONG} {self.total}")
                self.statuses[status] += 1
            except aiohttp.ClientError as error:
                self.errors.append(repr(error))
            self._progress.set()
            self._progress.clear()

    @property
    def total(self) -> int:
        return self.statuses.total() + len(self.errors)

    async def more(self, count: int = 30) -> None:
        """So many requests have come back since the call."""
        goal = self.total + count
        while self.total < goal:
            await self._progress.wait()

    async def stop(self) -> None:
        self._stopping = True
        await self._task

    def assert_all_answered(self) -> None:
        assert self.errors == []
        assert set(self.statuses) == {200}, self.statuses


async def test_both_ports_answer(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """The seed's scenario: the same body is answered on the standard port and on the LLM port, whole and streamed."""
    for port in (gateway.plain_port, gateway.llm_port):
        body = {
            "model": "/model/qwen",
            "max_completion_tokens": 5,
            "temperature": 0,
            "messages": [{"role": "user", "content": "Write as if you were a critic: Los Angeles"}],
        }
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        async with session.post(url, json=body) as response:
            assert response.status == 200
            answer = await response.json()
        assert answer["object"] == "chat.completion"
        assert answer["usage"]["completion_tokens"] == 5
        async with session.post(url, json=body | {"stream": True}) as response:
            lines = (await response.read()).decode().split("\n\n")
        assert lines[-2] == "data: [DONE]"
        assert json.loads(lines[0].removeprefix("data: "))["object"] == "chat.completion.chunk"
        async with session.get(f"http://127.0.0.1:{port}/v1/models") as response:
            assert response.status == 200


async def test_one_prefix_lands_on_one_pod(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """With PREFIX_CACHE a family of prompts stays on one pod, several families use several; the plain port spreads."""
    await gateway.start_picker()
    await gateway.picking()
    families = await gateway.pods_of(session, [f"{family} {LONG}" for family in range(8)])
    assert [len(pods) for pods in families] == [1] * 8
    assert len(set.union(*families)) > 1
    plain = {(await gateway.ask(session, gateway.plain_port, f"0 {LONG} {turn}"))[1] for turn in range(8)}
    assert plain == {pod.name for pod in gateway.pods}


async def test_client_can_not_choose_its_pod(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """x-vllm-* headers of a client are dropped before anything reads them: with no picker, such requests spread."""
    url = f"http://127.0.0.1:{gateway.llm_port}/v1/completions"
    pods = set()
    for _ in range(20):
        body = {"model": "/model/qwen", "prompt": "x", "max_tokens": 1}
        async with session.post(url, json=body, headers={"X-Vllm-Pick": "default/pod-0_0"}) as response:
            pods.add(response.headers["x-sim-pod"])
    assert len(pods) > 1


async def test_objects_change_live(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """A route, a pod and the pool's strategy follow their files, without one failed request."""
    await gateway.start_picker()
    await gateway.picking()
    traffic = Traffic(gateway, session, gateway.llm_port)
    await traffic.more()

    # a pod leaves and comes back
    (gateway.config / "pod-3.yaml").unlink()
    await gateway.until(lambda control: _endpoints(control) == 3)
    for turn in range(12):
        assert (await gateway.ask(session, gateway.plain_port, f"gone {turn}"))[1] != "pod-3"
    gateway.write_pod(gateway.pods[3])
    await gateway.until(lambda control: _endpoints(control) == 4)
    await traffic.more()

    # a pod is being deleted: out of new requests, still in EDS
    gateway.write_pod(gateway.pods[3], 'deletionTimestamp: "2026-01-01T00:00:00Z"')
    await gateway.until(lambda control: any(e.draining for e in control.topology.clusters[0].endpoints))
    for turn in range(12):
        assert (await gateway.ask(session, gateway.llm_port, f"{turn} {LONG}"))[1] != "pod-3"

    # another strategy: no pick, least requests
    gateway.write_pool("DEFAULT")
    await gateway.until(lambda control: control.topology.clusters[0].strategy is Strategy.DEFAULT)
    pods = {(await gateway.ask(session, gateway.llm_port, f"same {LONG}"))[1] for _ in range(20)}
    assert len(pods) > 1
    gateway.write_pool("PREFIX_CACHE")
    await gateway.until(lambda control: control.topology.clusters[0].strategy is Strategy.PREFIX_CACHE)
    (pods,) = await gateway.pods_of(session, [f"picked again {LONG}"])
    assert len(pods) == 1
    await traffic.more()

    # a route
    path = gateway.config / "gateway.yaml"
    path.write_text(path.read_text().replace("name: pool}]", "name: nobody}]"))
    await gateway.until(lambda control: bool(control.rejections))
    await traffic.stop()
    traffic_until_here = traffic.statuses.copy()
    assert (await gateway.ask(session, gateway.llm_port, "x"))[0] == 500
    assert set(traffic_until_here) <= {200, 500}  # 500 only from the moment the route had no backend
    assert traffic.errors == []


async def test_weights_reach_envoy(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """A pod with a queue the others do not have gets less, by a logged change, down to Envoy's own endpoint list."""
    pod = gateway.pods[0]
    url = f"http://{pod.address}:{pod.port}/v1/completions"
    body = {"model": "/model/qwen", "prompt": "x", "max_tokens": 30_000, "ignore_eos": True}
    with structlog.testing.capture_logs() as events:
        flood = [asyncio.ensure_future(session.post(url, json=body)) for _ in range(60)]  # 16 run, the others queue
        try:
            await gateway.until(lambda control: _weight(control, "default/pod-0") < 100)
            weight = _weight(gateway.control, "default/pod-0")
            hosts = (await gateway.envoy.get("/clusters?format=json"))["cluster_statuses"]
        finally:
            for request in flood:
                request.cancel()
            await asyncio.gather(*flood, return_exceptions=True)
    pool = next(status for status in hosts if status["name"] == "pool/default/pool")
    weights = {host["address"]["socket_address"]["address"]: host["weight"] for host in pool["host_statuses"]}
    assert weights == {p.address: weight if p is pod else 100 for p in gateway.pods}
    change = next(event for event in events if event["event"] == "weight changed")
    assert change["endpoint"] == "default/pod-0"
    assert change["reason"] == "queue"
    assert change["waiting"] > 1


async def test_envoy_reports_what_no_page_shows_yet(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """Requests that a pod has accepted and not begun are in flight for the management server, and for the picker, while
    the pod's own page has none of them; they are gone when they have been answered."""
    pod = gateway.pods[0]
    pod.engine.config = replace(pod.engine.config, speed=pod.engine.config.step_base / 4)  # a step takes 4 s
    for other in gateway.pods[1:]:
        (gateway.config / f"{other.name}.yaml").unlink()
    await gateway.until(lambda control: _endpoints(control) == 1)
    burst = [asyncio.create_task(gateway.ask(session, gateway.llm_port, f"burst {i}")) for i in range(20)]
    await gateway.until(lambda control: _in_flight(control) == [20])
    (state,) = gateway.control.states()
    assert state.load is not None
    assert (state.load.running, state.load.waiting) == (0, 0)
    pod.engine.config = pod.config
    assert {status for status, _, _ in await asyncio.gather(*burst)} == {200}
    await gateway.until(lambda control: _in_flight(control) == [0])


def _in_flight(control: Control) -> list[int]:
    """Of each pod of the pool, as the picker is told."""
    load = PoolLoad.FromString(control.loads["pool/default/pool"])
    return [endpoint.in_flight for endpoint in load.endpoints] if load.HasField("in_flight") else []


async def test_picker_killed_in_traffic(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """The picker dies while requests run, and comes back: not one of them fails, and picking begins again."""
    await gateway.start_picker()
    await gateway.picking()
    traffic = Traffic(gateway, session, gateway.llm_port)
    await traffic.more()
    gateway.picker.kill()
    await gateway.picker.wait()
    await traffic.more(100)
    await gateway.start_picker()
    await gateway.picking()
    (pods,) = await gateway.pods_of(session, [f"back {LONG}"])
    assert len(pods) == 1
    await traffic.stop()
    traffic.assert_all_answered()


async def test_server_lost_and_back_in_traffic(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """The management server goes and another comes: not one request fails, and nothing is sent that Envoy has."""
    traffic = Traffic(gateway, session, gateway.llm_port)
    await traffic.more()
    await gateway.stop_server()
    await traffic.more(50)
    gateway.metrics = Metrics()
    await gateway.start_server()
    await gateway.settled()
    await traffic.more(50)
    await traffic.stop()
    traffic.assert_all_answered()
    stats = (await gateway.envoy.get("/stats?format=json&filter=listener_manager.listener_(added|modified|removed)"))[
        "stats"
    ]
    counts = {stat["name"].rpartition("_")[2]: stat["value"] for stat in stats}
    assert counts == {"added": 2, "modified": 0, "removed": 0}
    if gateway.delta:
        sent = gateway.metrics.registry.get_sample_value("vllm_xds_response_bytes_total", {"type": "Listener"})
        assert not sent


async def test_server_killed_in_traffic(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """The management server's process is killed, not stopped, and another takes its place: not one request fails."""
    await gateway.stop_server()
    server = await gateway.start_server_process()
    traffic = Traffic(gateway, session, gateway.llm_port)
    await traffic.more()
    server.kill()
    await server.wait()
    await traffic.more(100)
    await gateway.start_server_process()
    await traffic.more(50)
    await traffic.stop()
    traffic.assert_all_answered()


async def test_envoy_restarts(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """A second Envoy, with nothing but the bootstrap, is served everything."""
    await gateway.envoy.stop()
    await gateway.start_envoy()
    await gateway.settled()
    for port in (gateway.plain_port, gateway.llm_port):
        assert (await gateway.ask(session, port, "hello"))[0] == 200


async def test_envoy_on_the_services_for_one_type(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """An Envoy that asks CDS and LDS by themselves, and ADS for the rest, is served and follows a change."""
    await gateway.envoy.stop()
    api = f"api_type: {'DELTA_GRPC' if gateway.delta else 'GRPC'}, transport_api_version: V3"
    source = f"{{api_config_source: {{{api}, grpc_services: [{{envoy_grpc: {{cluster_name: xds}}}}]}}}}"
    await gateway.start_envoy(edit=lambda text: text.replace("{ads: {}, resource_api_version: V3}", source))
    await gateway.settled(clients=3)
    assert sorted([t.type for t in client.types] for client in gateway.server.clients()) == [
        ["Cluster"],
        ["ClusterLoadAssignment", "RouteConfiguration"],
        ["Listener"],
    ]
    for port in (gateway.plain_port, gateway.llm_port):
        assert (await gateway.ask(session, port, "hello"))[0] == 200
    (gateway.config / "pod-3.yaml").unlink()
    await gateway.until(lambda control: _endpoints(control) == 3)
    assert {(await gateway.ask(session, gateway.plain_port, f"gone {turn}"))[1] for turn in range(12)} == {
        "pod-0",
        "pod-1",
        "pod-2",
    }


async def test_a_route_that_envoy_refuses(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """A rule of Envoy that no check of ours knows: a route breaks it, past the parser. Envoy's refusal is turned into a
    rejection of that HTTPRoute, the port's other routes follow further changes, and a new Envoy gets them all."""

    def routes(*paths: str) -> tuple[HTTPRoute, ...]:
        (plain,) = [each for each in config.http_routes if each.meta.ref.name == "plain"]
        return tuple(
            replace(
                plain,
                meta=replace(plain.meta, ref=replace(plain.meta.ref, name=f"extra-{i}")),
                rules=(replace(plain.rules[0], matches=(RouteMatch(PathMatch(MatchType.REGEX, path)),)),),
            )
            for i, path in enumerate(paths)
        )

    config = gateway.control.config

    async def serve(*extra: HTTPRoute) -> None:
        await gateway.control.configure(replace(config, http_routes=(*extra, *config.http_routes)))

    await serve(*routes("/a", "/b("))
    await gateway.until(lambda control: bool(control.rejections))
    (rejection,) = gateway.control.rejections
    assert (rejection.reason, rejection.ref and rejection.ref.name) == ("RefusedByEnvoy", "extra-1")
    assert "missing ): /b(" in rejection.message
    assert await _paths(gateway.envoy, gateway.plain_port) == ["/a", "/"]

    await serve(*routes("/a2", "/b(", "/c"))
    await gateway.settled()
    assert await _paths(gateway.envoy, gateway.plain_port) == ["/a2", "/c", "/"]
    await gateway.envoy.stop()
    await gateway.start_envoy()
    await gateway.settled()
    assert await _paths(gateway.envoy, gateway.plain_port) == ["/a2", "/c", "/"]
    assert (await gateway.ask(session, gateway.plain_port, "hello"))[0] == 200
    assert list(gateway.control.rejections) == [rejection]

    await serve(*routes("/a2", "/b", "/c"))
    await gateway.settled()
    assert await _paths(gateway.envoy, gateway.plain_port) == ["/a2", "/b", "/c", "/"]
    assert not gateway.control.rejections


async def _paths(envoy: Envoy, port: int) -> list[str]:
    """The paths of a port's routes, as Envoy has them."""
    dump = await envoy.get("/config_dump?resource=dynamic_route_configs")
    (found,) = [each["route_config"] for each in dump["configs"] if each["route_config"]["name"] == f"http-{port}"]
    matches = [route["match"] for host in found["virtual_hosts"] for route in host["routes"]]
    return [match.get("prefix") or match["safe_regex"]["regex"] for match in matches]


EDGE = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: edge, annotations: {{vllm-xds/nodes: {nodes}}}}}
spec: {{gatewayClassName: envoy, listeners: [{{name: http, protocol: HTTP, port: {port}}}]}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{name: edge}}
spec:
  parentRefs: [{{name: edge}}]
  rules: [{{backendRefs: [{{name: qwen, port: 8000}}]}}]
"""


async def test_envoys_of_two_groups(gateway: Gateway, session: aiohttp.ClientSession) -> None:
    """A Gateway for the Envoys of one node.cluster is served by them alone; moved to others, it leaves them. A Gateway
    without the annotation is served by all."""
    common, edge_port = {gateway.plain_port, gateway.llm_port}, free_port()
    (gateway.config / "edge.yaml").write_text(EDGE.format(port=edge_port, nodes="edge"))
    await gateway.until(lambda control: control.topology.groups == ("edge",))
    edge = await gateway.another_envoy(free_port(), "edge")
    await gateway.settled(clients=2)
    assert await _ports(gateway.envoy) == common
    assert await _ports(edge) == common | {edge_port}
    assert (await gateway.ask(session, edge_port, "hello"))[0] == 200

    (gateway.config / "edge.yaml").write_text(EDGE.format(port=edge_port, nodes="vllm-xds"))
    await gateway.until(lambda control: control.topology.groups == ("vllm-xds",))
    await gateway.settled(clients=2)
    assert await _ports(gateway.envoy) == common | {edge_port}
    assert await _ports(edge) == common


async def _ports(envoy: Envoy) -> set[int]:
    """Of the listeners that are active: one that drains is not."""
    dump = await envoy.get("/config_dump?resource=dynamic_listeners")
    active = [each["active_state"]["listener"] for each in dump["configs"] if "active_state" in each]
    return {each["address"]["socket_address"]["port_value"] for each in active}


async def test_envoy_refused_nothing(gateway: Gateway) -> None:
    """No response of a whole start-up was rejected, on any type."""
    stats = (await gateway.envoy.get("/stats?format=json&filter=update_rejected"))["stats"]
    assert stats
    assert {stat["value"] for stat in stats} == {0}


def _endpoints(control: Control) -> int:
    return len(control.topology.clusters[0].endpoints)


def _weight(control: Control, key: str) -> int:
    pool = control.pools.get("pool/default/pool")
    return pool.members[key].weight if pool and key in pool.members else 100
