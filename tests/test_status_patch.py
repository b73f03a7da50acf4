"""The patch of a status: what is ours and nothing else, and nothing at all where all is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.apiserver_patch import merge_patch
from tests.objects import parent, ref
from xds.api_wire import Item, Served
from xds.model import (
    CORE,
    GATEWAY,
    INFERENCE_X,
    Condition,
    ConditionType,
    ListenerStatus,
    ObjectRef,
    ParentStatus,
    Status,
)
from xds.status_patch import MAX_MESSAGE, Live, patch, read_address, read_live

OURS, THEIRS = "vllm-xds.dev/gateway-controller", "istio.io/gateway-controller"
BEFORE, NOW = "2026-01-01T00:00:00Z", "2026-02-02T02:02:02Z"
IP, HOST = ("IPAddress", "10.0.0.1"), ("Hostname", "a.io")


def live(status: dict[str, Any] | None = None, generation: int = 1) -> Live:
    return Live("/apis/x", "x/v1", "uid", "77", generation, status or {})


def condition(
    kind: ConditionType = ConditionType.ACCEPTED, status: str = "True", reason: str = "Accepted", generation: int = 1
) -> Condition:
    return Condition(kind, status, reason, "", generation)


def said(
    kind: str = "Accepted", status: str = "True", reason: str = "Accepted", since: str = BEFORE, generation: int = 1
) -> dict[str, Any]:
    """A condition as the API server has it."""
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": "",
        "observedGeneration": generation,
        "lastTransitionTime": since,
    }


def written(of: ObjectRef, status: Status | None, now: Live, **kw: Any) -> dict[str, Any] | None:
    """The status of the patch; None for no patch. What is patched needs no further one."""
    kw = {"controllers": frozenset({OURS}), "addresses": (IP,)} | kw
    found = patch(of, status, now, NOW, **kw)
    if found is None:
        return None
    assert found["metadata"] == {"resourceVersion": "77"}
    after = merge_patch({"status": dict(now.status)}, {"status": found["status"]})["status"]
    assert patch(of, status, replace(now, status=after), "2027-01-01T00:00:00Z", **kw) is None
    assert isinstance(found["status"], dict)
    return found["status"]


CLASS, GW, ROUTE = ref("GatewayClass", "c", ""), ref("Gateway", "gw"), ref("HTTPRoute", "r")
POOL, POOL_X = ref("InferencePool", "p"), ref("InferencePool", "p", group=INFERENCE_X)
MODEL = ref("InferenceModel", "m")


# --- conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], said(since=NOW)),
        ([said(status="Unknown", reason="Pending", since="1970-01-01T00:00:00Z")], said(since=NOW)),
        ([said()], None),
        ([said(reason="Other")], said()),
        ([said(generation=0)], said()),
        ([said() | {"message": "x"}], said()),
        ([said(status="False")], said(since=NOW)),
        ([{"type": "Accepted", "status": "True"}], said(since=NOW)),
    ],
)
def test_transition_time_is_that_of_the_status(before: list[Any], after: Any) -> None:
    """A new reason, message or generation does not change it; nothing is written where nothing is new."""
    found = written(CLASS, Status(CLASS, 1, (condition(),)), live({"conditions": before}))
    assert found == (None if after is None else {"conditions": [after]})


def test_conditions_of_other_types_stay_what_and_where_they_are() -> None:
    """On the Gateway, on its listeners, and in an entry of ours; types of ours that are not wanted go."""
    foreign = said("example.com/Seeded", reason="Seeded", generation=9)
    listener = {"name": "http", "attachedRoutes": 3, "conditions": [foreign, said("OverlappingTLSConfig")]}
    before = {"conditions": [said("Programmed"), foreign, said("Ready")], "listeners": [listener, {"name": "gone"}]}
    status = Status(GW, 1, (condition(),), (ListenerStatus("http", ((GATEWAY, "HTTPRoute"),), 3, (condition(),)),))
    found = written(GW, status, live(before))
    assert found is not None
    assert found["conditions"] == [foreign, said("Ready"), said(since=NOW)]
    assert found["listeners"] == [
        {
            "name": "http",
            "supportedKinds": [{"group": GATEWAY, "kind": "HTTPRoute"}],
            "attachedRoutes": 3,
            "conditions": [foreign, said(since=NOW)],
        }
    ]


def test_a_message_is_bounded() -> None:
    """An Envoy's refusal may be as long as a configuration."""
    wanted = replace(condition(), message="x" * 100_000)
    found = written(CLASS, Status(CLASS, 1, (wanted,)), live())
    assert found is not None
    assert len(found["conditions"][0]["message"]) == MAX_MESSAGE + 3


def test_a_version_nobody_has_judged_is_waited_for() -> None:
    """The object has changed since: what is known is of the version before."""
    assert written(CLASS, Status(CLASS, 1, (condition(),)), live(generation=2)) is None
    assert written(ROUTE, None, live({"parents": [entry()]}, generation=2)) == {"parents": []}


# --- Gateways and classes ---------------------------------------------------------------------------------------------


def test_class() -> None:
    """Its features are a list of names."""
    found = written(CLASS, Status(CLASS, 1, (condition(),), features=("A", "B")), live())
    assert found == {"conditions": [said(since=NOW)], "supportedFeatures": [{"name": "A"}, {"name": "B"}]}


@pytest.mark.parametrize(
    ("bundle", "said_so"),
    [("v1.0.0", False), ("v1.1.1", False), ("v1.2.0", True), ("v1.6.1", True), ("v1.10.0", True), ("", True)],
)
def test_features_are_left_out_where_they_are_something_else(bundle: str, said_so: bool) -> None:
    """CRDs of before v1.2 would refuse objects, and with them that the class is accepted."""
    found = written(CLASS, Status(CLASS, 1, (condition(),), features=("A",)), live(), bundle=bundle)
    assert found is not None
    assert found["conditions"][0]["type"] == "Accepted"
    assert ("supportedFeatures" in found) is said_so


@pytest.mark.parametrize(
    ("bundle", "status", "reason"),
    [
        ("v1.0.0", "True", "SupportedVersion"),
        ("v1.6.1", "True", "SupportedVersion"),
        ("v1.6.0-rc.1", "True", "SupportedVersion"),
        ("v1.7.0", "False", "UnsupportedVersion"),
        ("v0.8.1", "False", "UnsupportedVersion"),
        ("v2.0.0", "False", "UnsupportedVersion"),
        ("", "False", "UnsupportedVersion"),
        ("x" * 1000, "False", "UnsupportedVersion"),
    ],
)
def test_the_version_of_the_crds(bundle: str, status: str, reason: str) -> None:
    """A class says whether it is known; where it is not to be found out, what the class says of it stays."""
    wanted = Status(CLASS, 1, (condition(),))
    found = written(CLASS, wanted, live({"conditions": [said()]}), bundle=bundle)
    assert found is not None
    one = found["conditions"][1]
    assert (one["type"], one["status"], one["reason"]) == ("SupportedVersion", status, reason)
    assert len(one["message"]) < 200
    assert written(CLASS, wanted, live({"conditions": [said()]})) is None
    assert written(CLASS, wanted, live({"conditions": [said(), one]})) is None


PROGRAMMED = condition(ConditionType.PROGRAMMED, reason="Programmed")
INVALID = condition(ConditionType.PROGRAMMED, "False", "Invalid")


@pytest.mark.parametrize(
    ("asked", "known", "assigned", "programmed"),
    [
        ((), (IP, HOST), (IP, HOST), ("True", "Programmed")),
        ((), (IP, IP), (IP,), ("True", "Programmed")),
        ((), (), (), ("False", "AddressNotAssigned")),
        ((IP,), (IP, HOST), (IP,), ("True", "Programmed")),
        ((("Hostname", ""),), (IP, HOST), (HOST,), ("True", "Programmed")),
        ((("Hostname", ""),), (IP,), (), ("False", "AddressNotAssigned")),
        ((("IPAddress", "10.9.9.9"), IP), (IP, HOST), (IP,), ("False", "AddressNotUsable")),
        ((IP,), (), (), ("False", "AddressNotUsable")),
    ],
)
def test_addresses(asked: Any, known: Any, assigned: Any, programmed: tuple[str, str]) -> None:
    """Those of the Envoys, of which a Gateway may want some; with none, or not with those, it is not programmed."""
    status = Status(GW, 1, (PROGRAMMED,), addresses=asked)
    found = written(GW, status, live(), addresses=known)
    assert found is not None
    assert found.get("addresses", []) == [{"type": kind, "value": value} for kind, value in assigned]
    (one,) = found["conditions"]
    assert (one["status"], one["reason"]) == programmed
    assert bool(one["message"]) == (programmed[0] == "False")


def test_addresses_do_not_cover_what_is_worse() -> None:
    """A Gateway that is not served at all says that."""
    found = written(GW, Status(GW, 1, (INVALID,)), live(), addresses=())
    assert found == {"conditions": [said("Programmed", "False", "Invalid", NOW)]}


def test_a_gateway_that_is_not_ours() -> None:
    """It is left alone, as are a class and a model."""
    for of in (GW, CLASS, MODEL):
        assert written(of, None, live({"conditions": [said()], "addresses": [{"value": "x"}]})) is None


@pytest.mark.parametrize(
    ("spec", "ingress", "addresses"),
    [
        ({"clusterIP": "10.0.0.1"}, None, (IP,)),
        ({"clusterIPs": ["10.0.0.1", "fd00::1"]}, None, (IP, ("IPAddress", "fd00::1"))),
        ({"clusterIP": "None", "clusterIPs": ["None"]}, None, ()),
        ({"clusterIP": "10.9.9.9", "type": "LoadBalancer"}, None, ()),
        ({"clusterIP": "10.9.9.9", "type": "LoadBalancer"}, [{"ip": "10.0.0.1"}, {"hostname": "a.io"}], (IP, HOST)),
        ({"type": "LoadBalancer"}, [{}, "x"], ()),
        ({}, None, ()),
    ],
)
def test_addresses_of_a_service(spec: Any, ingress: Any, addresses: Any) -> None:
    """A load balancer's are those it was given, and none before that; any other Service's are its cluster IPs."""
    status = {"loadBalancer": {"ingress": ingress} if ingress else {}}
    document = {"metadata": {"name": "s", "generation": 4}, "spec": spec, "status": status}
    item = Item(("ns", "s"), "u", "5", document)
    assert read_live(item, Served(CORE, "v1", "Service", "services", namespaced=True)) == Live(
        "/api/v1/namespaces/ns/services/s", "v1", "u", "5", 4, status, addresses
    )


def test_reading_an_address() -> None:
    """What is no IP address is a host name."""
    assert read_address("fd00:0::1") == ("IPAddress", "fd00::1")
    assert read_address("a.io") == HOST


# --- entries of parents -----------------------------------------------------------------------------------------------


def entry(name: str = "gw", of: str = OURS, since: str = BEFORE, **parent_ref: Any) -> dict[str, Any]:
    """An entry as the API server has it; of "" for v1alpha2, which does not say whose it is."""
    of_parent = {"group": GATEWAY, "kind": "Gateway", "namespace": "default", "name": name} | parent_ref
    return {"parentRef": of_parent, "conditions": [said(since=since)]} | ({"controllerName": of} if of else {})


def status_at(of: ObjectRef, *parents: Any, by: str = OURS) -> Status:
    return Status(of, 1, parents=tuple(ParentStatus(each, by, (condition(),)) for each in parents))


def test_entries_of_others_stay_what_and_where_they_are() -> None:
    """Ours stays between them, a new one comes behind them, and one whose parent is gone goes."""
    before = [entry(of=THEIRS), entry("gone"), entry("kept"), entry("x", of=THEIRS)]
    found = written(ROUTE, status_at(ROUTE, parent("kept"), parent("new", "https", 443)), live({"parents": before}))
    new = entry("new", since=NOW, sectionName="https", port=443)
    assert found == {"parents": [before[0], before[2], before[3], new]}


def test_an_entry_is_known_by_all_of_its_parent() -> None:
    """Another section or port is another entry; a namespace that is left out is the route's."""
    before = [entry(sectionName="a"), entry(sectionName="b", port=1), entry()]
    wanted = parent(section="b", port=1), parent()
    found = written(ROUTE, status_at(ROUTE, *wanted), live({"parents": before}))
    assert found == {"parents": before[1:]}
    bare = {"parentRef": {"name": "gw"}, "controllerName": OURS, "conditions": [said()]}
    assert written(ROUTE, status_at(ROUTE, parent()), live({"parents": [bare]})) == {"parents": [entry()]}


def test_nothing_of_ours() -> None:
    """Our entries go, and an object without any is not touched."""
    for of in (ROUTE, POOL):
        assert written(of, None, live({"parents": [entry(), entry(of=THEIRS)]})) == {"parents": [entry(of=THEIRS)]}
        assert written(of, None, live({"parents": [entry(of=THEIRS)]})) is None
        assert written(of, None, live()) is None


def test_a_controller_of_ours_that_changes() -> None:
    """The Gateway has another class of ours now: the entry of the old one goes."""
    both = frozenset({OURS, "other.io/ours"})
    status = status_at(ROUTE, parent(), by="other.io/ours")
    found = written(ROUTE, status, live({"parents": [entry()]}), controllers=both)
    assert found == {"parents": [entry(of="other.io/ours", since=NOW)]}


NOBODY = {"parentRef": {"group": GATEWAY, "kind": "Status", "name": "default"}, "conditions": [said(status="Unknown")]}


def test_a_pool_of_v1alpha2() -> None:
    """Its entries are in `parent` and name no controller; those of others' Gateways stay; the one that its CRD puts
    there for nobody goes with the first, and is back after the last."""

    def others(parent: ObjectRef) -> bool:
        return parent.name == "theirs"

    status = status_at(POOL_X, parent())
    ours = entry(of="", since=NOW)
    assert written(POOL_X, status, live({"parent": [NOBODY]})) == {"parent": [ours]}
    before = [entry("theirs", of=""), entry("deleted", of="")]
    assert written(POOL_X, status, live({"parent": before}), is_others=others) == {"parent": [before[0], ours]}
    assert written(POOL_X, None, live({"parent": before}), is_others=others) == {"parent": before[:1]}
    found = written(POOL_X, None, live({"parent": [ours]}))
    assert found is not None
    assert [each["parentRef"] for each in found["parent"]] == [{"kind": "Status", "name": "default"}]
    assert written(POOL_X, None, live({"parent": [NOBODY]})) is None
    assert written(POOL_X, None, live()) is None


def test_the_number_of_entries_is_bounded() -> None:
    """To what the API takes; others' go first."""
    before = [entry(f"t{i}", of=THEIRS) for i in range(31)]
    found = written(ROUTE, status_at(ROUTE, parent("a"), parent("b")), live({"parents": before}))
    assert found is not None
    assert found["parents"] == [*before, entry("a", since=NOW)]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["", "Accepted", "True", "Gateway", "gw", OURS]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "parents",
                    "parent",
                    "parentRef",
                    "controllerName",
                    "conditions",
                    "type",
                    "status",
                    "name",
                    "listeners",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["parents", "parent", "conditions", "listeners", "addresses"]), JUNK))
def test_whatever_a_status_holds(status: dict[str, Any]) -> None:
    """Nothing of an API server is trusted: no status makes the patch fail, and one patch is enough."""
    gateway = Status(GW, 1, (condition(), PROGRAMMED), (ListenerStatus("http", (), 0, (condition(),)),))
    for of, wanted in (
        (CLASS, Status(CLASS, 1, (condition(),), features=("A",))),
        (GW, gateway),
        (ROUTE, status_at(ROUTE, parent())),
        (POOL_X, status_at(POOL_X, parent())),
        (MODEL, Status(MODEL, 1, (condition(),))),
        (ROUTE, None),
        (POOL_X, None),
    ):
        found = patch(of, wanted, live(status), NOW, controllers=frozenset({OURS}), addresses=(IP,))
        if found is not None:
            after = merge_patch({"status": status}, {"status": found["status"]})["status"]
            again = patch(of, wanted, live(after), NOW, controllers=frozenset({OURS}), addresses=(IP,))
            assert again is None
