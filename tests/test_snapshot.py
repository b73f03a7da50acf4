"""Versions are content, equal content is shared, and a reference to nothing is found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ads_client import resource
from xds.snapshot import (
    CLUSTER,
    ENDPOINT,
    LISTENER,
    POOL_CONFIG,
    POOL_LOAD,
    ROUTE,
    TYPES,
    Snapshot,
    group_of,
    label,
    make_resource,
    missing,
    version_of,
)
from xds.wire import discovery_pb2 as wire


def test_resource_is_encoded_for_both_variants() -> None:
    """`any` and `entry` carry the same body, type and version, each as its variant wants it."""
    made = make_resource(CLUSTER, "a", b"body", [(ENDPOINT, "a")])
    body = wire.Any(type_url=CLUSTER, value=b"body")
    assert wire.Any.FromString(made.any) == body
    assert wire.Resource.FromString(made.entry) == wire.Resource(name="a", version=made.version, resource=body)
    assert made.refs == ((ENDPOINT, "a"),)


def test_version_is_the_content() -> None:
    """Equal bodies have equal versions on every server, for good: this one is written out. Others differ."""
    assert make_resource(CLUSTER, "a", b"body").version == "06b721c380b2160c50903e9f6c636b28"
    assert make_resource(CLUSTER, "a", b"other").version != make_resource(CLUSTER, "a", b"body").version


@given(st.dictionaries(st.text(max_size=3), st.binary(max_size=3), max_size=5), st.randoms(use_true_random=False))
def test_order_does_not_matter(bodies: dict[str, bytes], random: object) -> None:
    """However resources are given, they are sorted and their version is the same."""
    given_resources = [make_resource(CLUSTER, name, body) for name, body in bodies.items()]
    ordered = Snapshot.of({CLUSTER: given_resources})
    shuffled = list(given_resources)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = Snapshot.of({CLUSTER: shuffled})
    assert list(again.resources[CLUSTER]) == sorted(bodies)
    assert again.versions == ordered.versions
    assert again.versions[CLUSTER] == version_of({made.name: made for made in shuffled})


def test_names_count_in_the_version() -> None:
    """Two sets with the same bodies under other names are other sets."""
    one = {"a": make_resource(CLUSTER, "a", b"x"), "b": make_resource(CLUSTER, "b", b"y")}
    two = {"a": make_resource(CLUSTER, "a", b"y"), "b": make_resource(CLUSTER, "b", b"x")}
    assert version_of(one) != version_of(two)


def _grouped() -> Snapshot:
    """Listener `a` and `b` with routes and clusters of their own and one in common; group x has both, y only `b`."""
    return Snapshot.of(
        {
            LISTENER: [resource(LISTENER, name, refs=[(ROUTE, name), (CLUSTER, "picker")]) for name in "ab"],
            ROUTE: [resource(ROUTE, name, refs=[(CLUSTER, name), (CLUSTER, "both")]) for name in "ab"],
            CLUSTER: [resource(CLUSTER, name, refs=[(ENDPOINT, name)]) for name in ("a", "b", "both")]
            + [resource(CLUSTER, "picker")],
            ENDPOINT: [resource(ENDPOINT, name) for name in ("a", "b", "both")],
            POOL_CONFIG: [resource(POOL_CONFIG, name) for name in ("a", "b")],
            POOL_LOAD: [resource(POOL_LOAD, name) for name in ("a", "b")],
        },
        {"": [], "x": ["a", "b"], "y": ["b"]},
    )


def test_a_view_is_what_the_groups_listeners_need() -> None:
    """Listeners, their routes, clusters and endpoints; all that is for pickers, for these are in no group."""
    whole = _grouped()
    assert whole.view("x").resources == whole.resources
    assert whole.view("x").versions == whole.versions
    of_y = {label(type_url): list(found) for type_url, found in whole.view("y").resources.items()}
    assert of_y == {
        "Cluster": ["b", "both", "picker"],
        "ClusterLoadAssignment": ["b", "both"],
        "Listener": ["b"],
        "RouteConfiguration": ["b"],
        "Secret": [],
        "PoolConfig": ["a", "b"],
        "PoolLoad": ["a", "b"],
    }
    assert {label(type_url): list(found) for type_url, found in whole.view("").resources.items() if found} == {
        "PoolConfig": ["a", "b"],
        "PoolLoad": ["a", "b"],
    }


def test_a_view_shares_what_is_equal_with_the_one_before() -> None:
    """New weights of a cluster of another group are no reason for a look; those of one's own touch endpoints alone."""
    whole = _grouped()
    before = whole.view("y")
    others = [resource(ENDPOINT, "a", "2"), *(whole.resources[ENDPOINT][name] for name in ("b", "both"))]
    assert all(
        found is before.resources[type_url]
        for type_url, found in whole.replace({ENDPOINT: others}).view("y", before).resources.items()
    )
    own = [resource(ENDPOINT, name, "2") for name in ("a", "b", "both")]
    after = whole.replace({ENDPOINT: own}).view("y", before)
    assert {t for t in TYPES if after.resources[t] is not before.resources[t]} == {ENDPOINT}
    assert list(after.resources[ENDPOINT].values()) == own[1:]


@pytest.mark.parametrize(
    ("cluster", "node", "group"),
    [("x", "e", "x"), ("x", "y", "x"), ("other", "y", "y"), ("other", "e", ""), ("", "", "")],
)
def test_a_clients_group(cluster: str, node: str, group: str) -> None:
    """By node.cluster, else by node.id, else it is in none."""
    assert group_of(_grouped().groups, cluster, node) == group


def test_every_type_is_there() -> None:
    """A type that is not given is empty and has a version, and sharing begins there."""
    snapshot = Snapshot.of({})
    assert set(snapshot.resources) == set(snapshot.versions) == set(TYPES)
    assert snapshot.versions[CLUSTER] == version_of({})


def test_replace_shares_what_is_equal() -> None:
    """Types that are not replaced, or replaced by equal content, stay the same objects."""
    first = Snapshot.of({CLUSTER: [resource(CLUSTER, "a")], ENDPOINT: [resource(ENDPOINT, "a")]})
    second = first.replace({CLUSTER: [resource(CLUSTER, "a")], ENDPOINT: [resource(ENDPOINT, "a", "2")]})
    assert second.resources[CLUSTER] is first.resources[CLUSTER]
    assert second.resources[LISTENER] is first.resources[LISTENER]
    assert second.versions[ENDPOINT] != first.versions[ENDPOINT]
    assert first.resources[ENDPOINT]["a"].version == resource(ENDPOINT, "a").version


def test_a_step_names_what_differs() -> None:
    """What was added, changed or taken away, from the very object before; equal content is no step, and hides none."""
    first = Snapshot.of({}).replace({ENDPOINT: [resource(ENDPOINT, name) for name in "abc"]})
    second = first.replace({ENDPOINT: [resource(ENDPOINT, "a"), resource(ENDPOINT, "b", "2"), resource(ENDPOINT, "d")]})
    step = second.steps[ENDPOINT]
    assert step.before is first.resources[ENDPOINT]
    assert step.names == {"b", "c", "d"}
    assert second.replace({CLUSTER: [resource(CLUSTER, "a")]}).steps[ENDPOINT] is step
    assert CLUSTER not in second.steps


def test_impossible_snapshots_are_refused() -> None:
    """A type nobody serves and a name given twice are our bugs, said in a sentence."""
    with pytest.raises(ValueError, match="not a type this server serves"):
        Snapshot.of({"type.googleapis.com/x.Y": []})
    with pytest.raises(ValueError, match="two resources of type Cluster"):
        Snapshot.of({CLUSTER: [resource(CLUSTER, "a"), resource(CLUSTER, "a", "2")]})


def test_missing_references_are_found() -> None:
    """A cluster without its endpoints is named, with what it misses; a complete snapshot has none."""
    cluster = resource(CLUSTER, "a", refs=[(ENDPOINT, "a")])
    assert missing(Snapshot.of({CLUSTER: [cluster]})) == (((CLUSTER, "a"), (ENDPOINT, "a")),)
    assert missing(Snapshot.of({CLUSTER: [cluster], ENDPOINT: [resource(ENDPOINT, "a")]})) == ()


def test_labels_are_bounded() -> None:
    """A type from outside never becomes a metric label of its own."""
    assert [label(type_url) for type_url in (CLUSTER, POOL_LOAD, "type.googleapis.com/x.Y", "")] == [
        "Cluster",
        "PoolLoad",
        "other",
        "other",
    ]
