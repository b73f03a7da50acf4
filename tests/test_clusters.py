"""What Envoy is told of clusters beyond the golden files: times that belong together."""

from __future__ import annotations

from envoy_data_plane.envoy.config.cluster.v3 import Cluster, ClusterDiscoveryType

from xds.clusters import STAND_IN_WAIT, picker_cluster, stand_in
from xds.envoy import Options, seconds


def test_a_picker_too_late_for_requests_is_too_late_for_its_health_check() -> None:
    """Else one that answers a little late would cost every request the whole timeout, for ever."""
    options = Options(picker_timeout=0.05)
    (check,) = picker_cluster(options).health_checks
    assert check.timeout == seconds(0.05)


def test_a_stand_in_is_warm_without_an_answer() -> None:
    """It has the name it stands in for, takes endpoints over ADS, and waits for them no longer than STAND_IN_WAIT."""
    made = Cluster.parse(stand_in("pool/default/gone"))
    assert (made.name, made.type) == ("pool/default/gone", ClusterDiscoveryType.EDS)
    assert made.eds_cluster_config is not None
    source = made.eds_cluster_config.eds_config
    assert source is not None
    assert source.ads is not None
    assert source.initial_fetch_timeout == seconds(STAND_IN_WAIT)
    assert made.health_checks == []
