"""Learns the pools from the management server: a delta ADS client of two resource types, `PoolLoad` and `PoolConfig`.

    DeltaDiscoveryResponse -> Subscription -> ACK or NACK, loads or settings, removals -> Picker

Each subscription is a wildcard, resumed after a reconnect by the versions already held. While the server is away the
last loads stay and go stale by age. https://www.envoyproxy.io/docs/envoy/v1.40.0/api-docs/xds_protocol#incremental-xds
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite

import grpc
import structlog
from google.protobuf.message import DecodeError

from picker.cost import STALE, Costs, PodLoad, PoolLoad
from picker.link import Link, Stream
from picker.metrics import PickerMetrics
from picker.models import Models, Rule
from picker.pick import Picker, PoolConfig
from xds.tls import TlsFiles
from xds.wire.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status
from xds.wire.load_pb2 import PoolLoad as WirePoolLoad
from xds.wire.pool_config_pb2 import PoolConfig as WirePoolConfig

LOAD = "type.googleapis.com/vllm_xds.v1.PoolLoad"
CONFIG = "type.googleapis.com/vllm_xds.v1.PoolConfig"
METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
MAX_PODS = 20_000  # pods, and pools, of all reports together: some 200 MB, and seconds to place on the ring
MAX_REFUSAL = 2000  # characters of a refusal: the server keeps no more, and a NACK has to fit into its 4 MiB
MAX_VALUE = 1e30  # of a load: beyond all that a page can add up to, and sums and products of such are finite
WATCH = 1.0  # seconds between looks at the loads' age

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a response leads to. `request` is the ACK, or with `refusal` (not "") the NACK, to be sent."""

    request: DeltaDiscoveryRequest
    values: tuple[PoolLoad | PoolConfig, ...]
    removed: tuple[str, ...]
    refusal: str


class Subscription:
    """The client's side of one wildcard delta subscription, across reconnects. Mutable; does no I/O."""

    def __init__(self, node_id: str, type_url: str = LOAD) -> None:
        self._node_id = node_id
        self._type_url = type_url
        self._versions: dict[str, str] = {}
        self._sizes: dict[str, int] = {}  # pool -> its pods, and itself
        self._size = 0

    def open(self) -> DeltaDiscoveryRequest:
        """The first request of a stream."""
        return DeltaDiscoveryRequest(
            node=Node(id=self._node_id, cluster="picker"),
            type_url=self._type_url,
            initial_resource_versions=self._versions,
        )

    def receive(self, response: DeltaDiscoveryResponse) -> Outcome:
        """Good resources count even when others of the same response are refused."""
        values: list[PoolLoad | PoolConfig] = []
        refusals: list[str] = []
        if response.type_url != self._type_url:
            refusals.append(f"type {response.type_url} was not asked for")
        for encoded in response.resources if not refusals else ():
            try:
                resource = Resource.FromString(encoded)
                value = decode(resource, self._type_url)
                self._count(value.name, 1 + (len(value.pods) if isinstance(value, PoolLoad) else 0))
            except (DecodeError, ValueError) as error:
                refusals.append(str(error))
            else:
                values.append(value)
                self._versions[resource.name] = resource.version
        for name in response.removed_resources:
            self._versions.pop(name, None)
            self._count(name, 0)
        refusal = "; ".join(refusals)[:MAX_REFUSAL]
        request = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        if refusal:
            request.error_detail.CopyFrom(Status(code=grpc.StatusCode.INVALID_ARGUMENT.value[0], message=refusal))
        return Outcome(request, tuple(values), tuple(response.removed_resources), refusal)

    def _count(self, name: str, size: int) -> None:
        total = self._size - self._sizes.get(name, 0) + size
        if size and total > MAX_PODS:
            raise ValueError(f"{name}: more than {MAX_PODS} pods and pools in all")
        self._size, self._sizes[name] = total, size
        if not size:
            del self._sizes[name]


_MOST = dict.fromkeys(("running", "waiting", "prefill_rate", "start_time"), MAX_VALUE) | {"kv_usage": 1.0}


def decode(resource: Resource, type_url: str) -> PoolLoad | PoolConfig:
    """The value of a resource of this type, if it is sane; ValueError or DecodeError says what is wrong with it."""
    name, body = resource.name, resource.resource
    if body.type_url != type_url:
        raise ValueError(f"{name}: type {body.type_url} is not {type_url}")
    wire: WirePoolLoad | WirePoolConfig = _WIRE[type_url].FromString(body.value)
    if not name or wire.name != name:
        raise ValueError(f"{name}: the resource says it is {wire.name!r}")
    return _load(wire) if isinstance(wire, WirePoolLoad) else _config(wire)


_WIRE: Mapping[str, type[WirePoolLoad | WirePoolConfig]] = {LOAD: WirePoolLoad, CONFIG: WirePoolConfig}


def _load(wire: WirePoolLoad) -> PoolLoad:
    name = wire.name
    hash_keys = set()
    for endpoint in wire.endpoints:
        if not endpoint.hash_key or endpoint.hash_key in hash_keys:
            raise ValueError(f"{name}: hash_key {endpoint.hash_key!r} is empty or given twice")
        hash_keys.add(endpoint.hash_key)
        for field, most in _MOST.items():
            value = getattr(endpoint, field)
            if not 0 <= value <= most:  # a NaN is not
                raise ValueError(f"{name}: {endpoint.hash_key}: {field} is {value}")
        if not isfinite(endpoint.age):
            raise ValueError(f"{name}: {endpoint.hash_key}: age is {endpoint.age}")
    if not (isfinite(wire.in_flight.age) and wire.in_flight.age >= 0):
        raise ValueError(f"{name}: in_flight: age is {wire.in_flight.age}")
    return PoolLoad(
        name,
        in_flight_age=wire.in_flight.age if wire.HasField("in_flight") else None,
        pods=tuple(
            PodLoad(
                hash_key=pod.hash_key,
                address=pod.address,
                age=pod.age,
                running=pod.running,
                waiting=pod.waiting,
                kv_usage=pod.kv_usage,
                kv_tokens=pod.kv_tokens,
                prefill_rate=pod.prefill_rate,
                start_time=pod.start_time,
                in_flight=pod.in_flight,
                max_lora=pod.max_lora,
                running_adapters=tuple(pod.running_adapters),
                waiting_adapters=tuple(pod.waiting_adapters),
            )
            for pod in wire.endpoints
        ),
    )


def _config(wire: WirePoolConfig) -> PoolConfig:
    costs, saturation = (
        {field.name: value for field, value in message.ListFields()} for message in (wire.costs, wire.saturation)
    )
    for field, value in (*costs.items(), *saturation.items()):
        if not isfinite(value) or value < 0 or (not value and field != "request_cost"):
            raise ValueError(f"{wire.name}: {field} is {value}")
    rules = {
        rule.name: Rule(tuple((each.name, each.weight) for each in rule.targets), rule.sheddable, rule.critical)
        for rule in wire.models
    }
    for name, rule in rules.items():
        if not all(target and weight for target, weight in rule.targets):
            raise ValueError(f"{wire.name}: model {name!r} has a target without a name or a weight")
    objectives = {each.name: each.priority for each in wire.objectives}
    models = Models(rules, wire.closed, objectives, **saturation)
    return PoolConfig(wire.name, Costs(**costs), picked=not wire.unpicked, models=models)


class LoadsClient:
    """Keeps `picker` informed from the server at `address` (HOST:PORT), for ever.

    `clock` gives seconds, the same as the picker's; `random` floats in [0, 1). `tls` is read at each connection.
    """

    def __init__(
        self,
        address: str,
        picker: Picker,
        metrics: PickerMetrics,
        *,
        node_id: str,
        clock: Callable[[], float],
        random: Callable[[], float],
        tls: TlsFiles | None = None,
    ) -> None:
        self._link = Link(address, METHOD, random, tls)
        self._picker = picker
        self._metrics = metrics
        self._subscriptions = {type_url: Subscription(node_id, type_url) for type_url in (CONFIG, LOAD)}
        self._clock = clock
        self._connected = False
        self._refusals: dict[str, str] = {}  # type -> the last one logged: a server repeats a mistake each round

    async def run(self) -> None:
        """Connect, follow, and connect again; ends only by being cancelled."""
        await self._link.run(self._talk, self._ended)

    def _ended(self, reason: str) -> None:
        if self._connected:
            log.warning("server lost", server=self._link.address, reason=reason)
        elif self._link.failures == 0:
            log.warning("server unreachable", server=self._link.address, reason=reason)
        self._connected = False
        self._metrics.connected.set(0)

    async def _talk(self, stream: Stream) -> None:
        """One stream, from its first request to its end."""
        for subscription in self._subscriptions.values():
            await stream.write(subscription.open().SerializeToString())
        self._connected = True
        self._metrics.connected.set(1)
        log.info("server connected", server=self._link.address)
        while (data := await stream.read()) is not grpc.aio.EOF:
            request = self._apply(DeltaDiscoveryResponse.FromString(data))
            self._link.failures = 0
            await stream.write(request.SerializeToString())

    def _apply(self, response: DeltaDiscoveryResponse) -> DeltaDiscoveryRequest:
        type_url = response.type_url if response.type_url in self._subscriptions else LOAD  # which refuses it
        outcome = self._subscriptions[type_url].receive(response)
        now = self._clock()
        for value in outcome.values:
            if isinstance(value, PoolLoad):
                self._picker.update(value, now)
            else:
                self._picker.configure(value)
        for name in outcome.removed:
            if type_url == CONFIG:
                self._picker.unconfigure(name)
            else:
                self._picker.forget(name)
        if outcome.refusal:
            self._metrics.refused.inc()
            if outcome.refusal != self._refusals.get(type_url):
                if type_url == CONFIG:
                    log.warning("pool config refused", reason=outcome.refusal)
                else:
                    log.warning("load report refused", reason=outcome.refusal)
        self._refusals[type_url] = outcome.refusal
        return outcome.request


async def watch(picker: Picker, metrics: PickerMetrics, clock: Callable[[], float], every: float = WATCH) -> None:
    """Say when a pool's loads go stale and when they are fresh again; ends only by being cancelled.

    A pool that appears has STALE seconds for its first load.
    """
    since: dict[str, float] = {}  # pool -> when it was first seen
    stale: set[str] = set()
    while True:
        now, read_at = clock(), picker.read_at()
        for name in since.keys() - read_at.keys():
            metrics.load_age.remove(name)
        since = {name: since.get(name, now) for name in read_at}
        stale &= since.keys()
        for name, at in read_at.items():
            metrics.load_age.labels(name).set(now - at)
            if (now - max(at, since[name]) > STALE) is not (name in stale):
                stale ^= {name}
                if name in stale:
                    log.warning("pool load stale", pool=name)
                else:
                    log.info("pool load fresh", pool=name)
        metrics.chunks.set(picker.chunks)
        await asyncio.sleep(every)
