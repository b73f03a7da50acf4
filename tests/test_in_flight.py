"""What Envoys report as under way: read, summed, and forgotten in time."""

from __future__ import annotations

import pytest

from xds.in_flight import MAX_AGE, MAX_REQUESTS, InFlight, Reported, read_report
from xds.wire import endpoint_pb2
from xds.wire import load_stats_pb2 as pb

POOL = "pool/default/llm"
A, B = ("10.0.0.1", 8000), ("fd00::2", 8000)


def request(cluster: str = POOL, **in_progress: int) -> pb.LoadStatsRequest:
    """A report of one cluster; `a` and `b` are the two endpoints, `b2` is the second again in another locality."""
    message = pb.LoadStatsRequest()
    stats = message.cluster_stats.add(cluster_name=cluster)
    for name, count in in_progress.items():
        address, port = A if name == "a" else B
        socket = endpoint_pb2.SocketAddress(address=address, port_value=port)
        stats.upstream_locality_stats.add().upstream_endpoint_stats.add(
            address=endpoint_pb2.Address(socket_address=socket).SerializeToString(), total_requests_in_progress=count
        )
    return message


def test_a_report_is_read_by_cluster_and_endpoint() -> None:
    """Localities are summed, IPv6 is in brackets, and clusters that are no pools do not count."""
    message = request(a=3, b=1, b2=2)
    message.MergeFrom(request("xds", a=7))
    assert read_report(message, "pool/") == {POOL: {"10.0.0.1:8000": 3, "[fd00::2]:8000": 3}}


def test_a_report_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count no Envoy can have is cut, so that no sum leaves its field; what is beyond MAX_ENDPOINTS is left out."""
    assert read_report(request(a=2**64 - 1, b=2**64 - 1, b2=1), "") == {
        POOL: {"10.0.0.1:8000": MAX_REQUESTS, "[fd00::2]:8000": MAX_REQUESTS}
    }
    monkeypatch.setattr("xds.in_flight.MAX_ENDPOINTS", 2)
    message = request(a=1, b=2)
    message.MergeFrom(request("pool/default/other", a=1))
    assert read_report(message, "") == {POOL: {"10.0.0.1:8000": 1, "[fd00::2]:8000": 2}, "pool/default/other": {}}


def test_what_all_envoys_have_is_summed() -> None:
    """Each Envoy's last report counts; it is as old as the oldest of them; who is not named has nothing under way."""
    in_flight = InFlight()
    assert in_flight.of(POOL, 0.0) is None
    in_flight.report("x", read_report(request(a=3), ""), 1.0)
    in_flight.report("y", read_report(request(a=1, b=2), ""), 2.0)
    assert in_flight.of(POOL, 2.0) == Reported({"10.0.0.1:8000": 4, "[fd00::2]:8000": 2}, 1.0)
    in_flight.report("x", read_report(pb.LoadStatsRequest(), ""), 3.0)
    reported = in_flight.of(POOL, 3.0)
    assert reported == Reported({"10.0.0.1:8000": 1, "[fd00::2]:8000": 2}, 2.0)
    assert (reported.to(*A), reported.to(*B), reported.to("10.0.0.9", 1)) == (1, 2, 0)
    assert in_flight.of("pool/default/other", 3.0) == Reported({}, 2.0)


@pytest.mark.parametrize("ends", [True, False])
def test_an_envoy_that_is_gone_has_nothing_under_way(ends: bool) -> None:
    """Whether its stream ends or it only falls silent: with the last one, nothing is known."""
    in_flight = InFlight()
    in_flight.report("x", read_report(request(a=3), ""), 0.0)
    in_flight.report("y", read_report(request(a=1), ""), 1.0)
    now = MAX_AGE + 0.5
    if ends:
        now = 1.0
        in_flight.forget("x")
        in_flight.forget("x")
    assert in_flight.of(POOL, now) == Reported({"10.0.0.1:8000": 1}, 1.0)
    assert in_flight.is_reported(now)
    assert in_flight.of(POOL, MAX_AGE + 1.5) is None
    assert not in_flight.is_reported(MAX_AGE + 1.5)
