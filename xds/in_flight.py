"""Requests in flight to each endpoint, as Envoys report them (LRS): a page shows them only seconds later (pure).

    one Envoy's report --read_report--> counts --InFlight.report--> sum over all Envoys

A report is everything its Envoy has under way: an endpoint it does not name has nothing from there. An Envoy that falls
silent counts for MAX_AGE, and one whose stream ends does no longer.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import inf

from xds.model import authority
from xds.wire import endpoint_pb2
from xds.wire import load_stats_pb2 as pb

INTERVAL = 1.0  # seconds between two reports of an Envoy: half of a scrape's, at some 40 bytes an endpoint
MAX_AGE = 5 * INTERVAL  # seconds
# Of one Envoy to one endpoint: ten times its circuit breaker; the sum over all has to fit into a uint64.
MAX_REQUESTS = 1_000_000
MAX_ENDPOINTS = 20_000  # in one report: what more it names is left out
ADDRESSES = 20_000  # kept decoded, some 3 MB: each Envoy names the same ones, each second

Counts = Mapping[str, Mapping[str, int]]  # cluster -> `address:port` -> requests


@dataclass(frozen=True, slots=True)
class Reported:
    """What is in flight to a cluster, over all Envoys; `at` is when the oldest of their reports came in (seconds)."""

    requests: Mapping[str, int]
    at: float

    def to(self, address: str, port: int) -> int:
        """Requests in flight to this endpoint."""
        return self.requests.get(authority(address, port), 0)


def read_report(request: pb.LoadStatsRequest, prefix: str) -> Counts:
    """The counts of one report, of clusters whose names begin with `prefix`. DecodeError: an address is none."""
    counts: dict[str, dict[str, int]] = {}
    left = MAX_ENDPOINTS
    for cluster in request.cluster_stats[:MAX_ENDPOINTS]:
        if cluster.cluster_name.startswith(prefix):
            of_cluster = counts.setdefault(cluster.cluster_name, {})
            for locality in cluster.upstream_locality_stats:
                for endpoint in locality.upstream_endpoint_stats[:left]:
                    key = _authority(endpoint.address)
                    requests = of_cluster.get(key, 0) + endpoint.total_requests_in_progress
                    of_cluster[key] = min(requests, MAX_REQUESTS)
                left -= min(left, len(locality.upstream_endpoint_stats))
    return counts


@lru_cache(ADDRESSES)
def _authority(address: bytes) -> str:
    socket = endpoint_pb2.Address.FromString(address).socket_address
    return authority(socket.address, socket.port_value)


class InFlight:
    """The last report of each Envoy (mutable). An `envoy` is whatever tells one stream from another."""

    def __init__(self) -> None:
        self._reports: dict[Hashable, tuple[float, Counts]] = {}

    def report(self, envoy: Hashable, counts: Counts, now: float) -> None:
        self._reports[envoy] = now, counts

    def forget(self, envoy: Hashable) -> None:
        self._reports.pop(envoy, None)

    def is_reported(self, now: float) -> bool:
        """Whether any Envoy has reported lately."""
        return any(now - at <= MAX_AGE for at, _ in self._reports.values())

    def of(self, cluster: str, now: float) -> Reported | None:
        """What is under way to a cluster; None when no Envoy says so."""
        total: dict[str, int] = {}
        oldest = inf
        for at, counts in self._reports.values():
            if now - at <= MAX_AGE:
                oldest = min(oldest, at)
                for address, requests in counts.get(cluster, {}).items():
                    total[address] = total.get(address, 0) + requests
        return Reported(total, oldest) if oldest < inf else None
