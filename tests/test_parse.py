"""parse: whose object a document is, its metadata, the core and inference kinds, and that no input makes it raise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from xds.fields import MAX_LABELS, Reader, describe
from xds.model import (
    INFERENCE,
    INFERENCE_X,
    LLM_D,
    Criticality,
    EndpointSlice,
    InferenceModel,
    InferenceModelRewrite,
    InferenceObjective,
    InferencePool,
    Level,
    ObjectRef,
    Pod,
    Rejection,
    RewriteRule,
    Service,
    ServicePort,
    SliceEndpoint,
    Strategy,
)
from xds.parse import MAX_NOTES, MAX_UNKNOWN, Parsed, parse

# One valid object of every kind, with every field that is read; the mutation test changes them.
OBJECTS: list[Any] = list(
    yaml.safe_load_all("""
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: gc, creationTimestamp: "2025-01-01T00:00:00Z", generation: 2}
spec: {controllerName: example.com/ctl, description: text}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: gw, namespace: a, labels: {l: v}, annotations: {k: v}}
spec:
  gatewayClassName: gc
  listeners:
  - {name: http, port: 8080, protocol: HTTP, hostname: "*.example.com"}
  - name: more
    port: 8081
    protocol: HTTP
    allowedRoutes:
      kinds: [{kind: HTTPRoute}]
      namespaces: {from: Selector, selector: {matchLabels: {team: x}}}
---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: HTTPRoute
metadata: {name: hr}
spec:
  parentRefs: [{name: gw, namespace: a, sectionName: http, port: 8080}]
  hostnames: [www.example.com]
  rules:
  - name: one
    matches:
    - path: {type: RegularExpression, value: "/v[0-9]+/.*"}
      headers: [{name: X-A, value: b}, {name: X-B, type: RegularExpression, value: "[a-z]+"}]
      queryParams: [{name: q, value: "1"}]
      method: POST
    filters:
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: b}], remove: [c]}}
    backendRefs:
    - name: svc
      port: 80
      weight: 3
      filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: a, value: b}]}}]
    timeouts: {request: 10s, backendRequest: 5s}
  - matches: [{path: {value: /a}}]
    filters:
    - {type: URLRewrite, urlRewrite: {hostname: b.c, path: {type: ReplacePrefixMatch, replacePrefixMatch: /b}}}
    backendRefs: [{group: inference.networking.k8s.io, kind: InferencePool, name: p}]
  - filters:
    - type: RequestRedirect
      requestRedirect: {scheme: https, port: 443, statusCode: 301, path: {type: ReplaceFullPath, replaceFullPath: /x}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: ReferenceGrant
metadata: {name: rg}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: a}]
  to: [{group: "", kind: Service, name: svc}]
---
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: BackendTrafficPolicy
metadata: {name: btp}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: gw, sectionName: http}]
  timeout: {tcp: {connectTimeout: 1s}, http: {requestTimeout: 1h, streamIdleTimeout: 0s, connectionIdleTimeout: 1m30s}}
---
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {name: p1, annotations: {inference.networking.x-k8s.io/routing-strategy: PREFIX_CACHE}}
spec:
  selector: {matchLabels: {app: qwen}}
  targetPorts: [{number: 8000}, {number: 8001}]
  appProtocol: kubernetes.io/h2c
  endpointPickerRef: {name: epp, port: {number: 9002}, failureMode: FailOpen}
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferencePool
metadata: {name: vllm-qwen-pool}
spec: {targetPortNumber: 8000, selector: {app: qwen}, extensionRef: {name: inference-gateway-ext-proc}}
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceModel
metadata: {name: inferencemodel-qwen}
spec:
  modelName: /model/qwen
  criticality: Critical
  poolRef: {group: inference.networking.x-k8s.io, kind: InferencePool, name: vllm-qwen-pool}
  targetModels: [{name: /model/qwen, weight: 100}]
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceModelRewrite
metadata: {name: alias}
spec:
  poolRef: {group: inference.networking.k8s.io, kind: InferencePool, name: p1}
  rules:
  - matches: [{model: {type: Exact, value: chat}}, {model: {value: chat-latest}}]
    targets: [{modelRewrite: chat-v1, weight: 9}, {modelRewrite: chat-v2, weight: 1}]
  - matches: []
    targets: [{modelRewrite: base}]
---
apiVersion: llm-d.ai/v1alpha2
kind: InferenceModelRewrite
metadata: {name: alias}
spec: {poolRef: {name: p1}, rules: []}
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceObjective
metadata: {name: low}
spec: {priority: -10, poolRef: {name: p1}}
---
apiVersion: llm-d.ai/v1alpha2
kind: InferenceObjective
metadata: {name: usual}
spec: {poolRef: {group: inference.networking.x-k8s.io, name: p1}}
---
apiVersion: v1
kind: Service
metadata: {name: qwen}
spec:
  selector: {app: qwen}
  type: ClusterIP
  ports:
  - {name: http, port: 8000, targetPort: serve, appProtocol: kubernetes.io/h2c}
  - {name: admin, port: 81, targetPort: 8081, protocol: TCP}
  - {name: dns, port: 53, protocol: UDP}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: qwen-x, labels: {kubernetes.io/service-name: qwen}}
addressType: IPv4
ports: [{name: "", port: 8000, protocol: TCP}]
endpoints:
- addresses: [10.0.0.1]
  conditions: {ready: true, serving: true, terminating: false}
  targetRef: {kind: Pod, name: p0}
- {addresses: [10.0.0.2]}
---
apiVersion: v1
kind: Pod
metadata: {name: p0, namespace: a, labels: {app: qwen}, annotations: {prometheus.io/port: "8000"}}
spec: {containers: [{name: vllm, image: v, ports: [{name: serve, containerPort: 8000}, {containerPort: 9}]}]}
status:
  podIP: 10.0.0.1
  phase: Running
  conditions: [{type: Initialized, status: "True"}, {type: Ready, status: "True"}]
---
apiVersion: v1
kind: Namespace
metadata: {name: team, labels: {team: x}}
""")
)


def _object(kind: str, group: str = "") -> Any:
    found = next(each for each in OBJECTS if each["kind"] == kind and each["apiVersion"].startswith(group))
    return copy.deepcopy(found)


def _only(parsed: Parsed) -> Rejection:
    """The one rejection of a document."""
    (rejection,) = parsed.rejections
    return rejection


@pytest.mark.parametrize("document", OBJECTS, ids=lambda each: f"{each['kind']}-{each['apiVersion'].replace('/', '-')}")
def test_valid_object_is_accepted_without_a_word(document: Any) -> None:
    """Every field the samples use is known: no rejection and no warning comes with the object."""
    parsed = parse(document, "f.yaml:3")
    assert parsed.rejections == ()
    assert parsed.object is not None
    assert parsed.object.meta.ref == parsed.ref
    assert parsed.object.meta.source == "f.yaml:3"


def test_namespace_and_cluster_scope() -> None:
    """No namespace means the default one that was asked for; a cluster-scoped kind has none whatever it says."""
    route = parse(_object("HTTPRoute"), default_namespace="team")
    assert route.ref == ObjectRef("gateway.networking.k8s.io", "HTTPRoute", "team", "hr")
    gateway_class = _object("GatewayClass")
    gateway_class["metadata"]["namespace"] = "a"
    parsed = parse(gateway_class)
    assert parsed.ref == ObjectRef("gateway.networking.k8s.io", "GatewayClass", "", "gc")
    assert parsed.object is not None
    assert (parsed.object.meta.created, parsed.object.meta.generation) == ("2025-01-01T00:00:00Z", 2)


@pytest.mark.parametrize(
    "document",
    [
        None,
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": 3},
        {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": {"name": "x"}},
    ],
)
def test_other_kinds_are_left_alone(document: object) -> None:
    """A whole manifest may lie in the directory: what is not ours is neither an object nor a rejection."""
    assert parse(document, "f.yaml:1") == Parsed("f.yaml:1")


def test_annotations_that_nobody_reads_are_not_kept() -> None:
    """Of ten thousand pods they would be most of the memory; a bad one is a mistake all the same."""
    notes = {"prometheus.io/port": "8000", "kubectl.kubernetes.io/last-applied-configuration": "{}"}
    pod: dict[str, Any] = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "annotations": notes}}
    parsed = parse(pod)
    assert parsed.object is not None
    assert parsed.object.meta.annotations == {"prometheus.io/port": "8000"}


def test_unserved_kind_of_our_groups_is_a_warning() -> None:
    """A GRPCRoute, or a misspelt HTTPRoute, does not vanish without a word."""
    parsed = parse({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "GRPCRoute", "metadata": {"name": "g"}})
    rejection = _only(parsed)
    assert (rejection.reason, rejection.level, rejection.field) == ("UnsupportedKind", Level.WARNING, "kind")
    assert str(rejection.ref) == "GRPCRoute default/g"
    assert (parsed.ref, parsed.object) == (None, None)


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ("text", ""),
        ([1], ""),
        ({}, "apiVersion"),
        ({"apiVersion": "v1"}, "kind"),
        ({"apiVersion": "v1", "kind": "Pod"}, "metadata.name"),
        ({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "UPPER"}}, "metadata.name"),
        ({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x\n"}}, "metadata.name"),
        ({"apiVersion": "v1", "kind": "Pod", "metadata": [1]}, "metadata"),
    ],
)
def test_document_without_identity(document: object, field: str) -> None:
    """What cannot be named is rejected with the field that is missing, and no object."""
    parsed = parse(document, "f.yaml:7")
    rejection = _only(parsed)
    assert (rejection.ref, rejection.reason, rejection.field) == (None, "Invalid", field)
    assert rejection.source == "f.yaml:7"
    assert parsed.object is None


def test_unknown_version_names_the_object() -> None:
    """A known kind of an unknown version is rejected, and its ref is known so that its last good version can stay."""
    document = _object("InferencePool", INFERENCE)
    document["apiVersion"] = f"{INFERENCE}/v9"
    parsed = parse(document)
    assert (_only(parsed).reason, _only(parsed).field) == ("UnsupportedVersion", "apiVersion")
    assert _only(parsed).message == 'expected version v1, found "v9"'
    assert parsed.ref == ObjectRef(INFERENCE, "InferencePool", "default", "p1")
    assert parsed.object is None


def test_message_says_what_was_expected_and_found() -> None:
    """A rejection reads as file, object, field, expectation and finding."""
    document = _object("InferencePool", INFERENCE_X)
    document["spec"]["targetPortNumber"] = "http"
    assert str(_only(parse(document, "pool.yaml:2"))) == (
        "pool.yaml:2: InferencePool default/vllm-qwen-pool: spec.targetPortNumber: "
        'expected an integer from 1 to 65535, found "http" (Invalid)'
    )


def test_unknown_fields_are_named_and_bounded() -> None:
    """A typo in a spec is a warning with its path, at most MAX_UNKNOWN of them; a Pod may hold anything."""
    document = _object("InferencePool", INFERENCE)
    document["spec"]["targetPorts"][1]["numbr"] = 1
    rejection = _only(parse(document))
    assert (rejection.reason, rejection.level) == ("UnknownField", Level.WARNING)
    assert rejection.field == "spec.targetPorts[1].numbr"
    document["spec"] |= {f"x{i}": i for i in range(1000)} | {"a\nb": 1}
    assert len(parse(document).rejections) == MAX_UNKNOWN
    assert all("\n" not in str(each) for each in parse(document).rejections)
    pod = _object("Pod")
    pod["spec"] |= {"nodeName": "n", "anything": {}}
    assert parse(pod).rejections == ()


@pytest.mark.parametrize(
    "metadata",
    [
        {"annotations": {"prometheus.io/port": 8000}},
        {"annotations": {"k": "\ud800"}},
        {"annotations": {"k": "v" * 300_000}},
        {"labels": {"k": "not a label"}},
        {"labels": {f"k{i}": "v" for i in range(MAX_LABELS + 1)}},
        {"labels": {1: "v"}},
        {"labels": {"a\x1b[2J/k": "v"}},
        {"labels": ["k"]},
        {"creationTimestamp": 5},
        {"creationTimestamp": "yesterday"},
        {"generation": -1},
        {"generation": True},
    ],
)
def test_bad_metadata_rejects_the_object(metadata: Any) -> None:
    """Metadata is bounded and typed as an API server would have it, also where YAML makes a number of it."""
    document = _object("Pod")
    document["metadata"] |= metadata
    parsed = parse(document)
    assert parsed.object is None
    assert _only(parsed).reason == "Invalid"
    assert _only(parsed).field.startswith(f"metadata.{next(iter(metadata))}")
    assert len(_only(parsed).message) < 200


def test_inference_pool_v1() -> None:
    """Several ports, h2c, the strategy annotation and the picker's name are read; the picker may be left out."""
    pool = parse(_object("InferencePool", INFERENCE)).object
    assert isinstance(pool, InferencePool)
    assert (pool.ports, pool.http2, pool.strategy, pool.extension) == ((8000, 8001), True, Strategy.PREFIX_CACHE, "epp")
    document = _object("InferencePool", INFERENCE)
    del document["spec"]["endpointPickerRef"], document["spec"]["appProtocol"]
    plain = parse(document).object
    assert isinstance(plain, InferencePool)
    assert (plain.http2, plain.extension) == (False, "")


@pytest.mark.parametrize("version", ["v1alpha2", "v1alpha1"])
def test_inference_pool_alpha(version: str) -> None:
    """The alpha generations: a plain selector and one port number."""
    document = _object("InferencePool", INFERENCE_X)
    document["apiVersion"] = f"{INFERENCE_X}/{version}"
    pool = parse(document).object
    assert isinstance(pool, InferencePool)
    assert (pool.selector, pool.ports, pool.strategy) == ({"app": "qwen"}, (8000,), Strategy.DEFAULT)
    assert pool.extension == "inference-gateway-ext-proc"


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"targetPorts": []}, "spec.targetPorts"),
        ({"targetPorts": [{"number": n} for n in range(1, 10)]}, "spec.targetPorts"),
        ({"targetPorts": [{"number": 1}, {"number": 1}]}, "spec.targetPorts"),
        ({"targetPorts": [{"number": 65536}]}, "spec.targetPorts[0].number"),
        ({"selector": {"matchLabels": {}}}, "spec.selector.matchLabels"),
        ({"selector": {"app": "qwen"}}, "spec.selector.matchLabels"),
        ({"appProtocol": "grpc"}, "spec.appProtocol"),
        ({"endpointPickerRef": {}}, "spec.endpointPickerRef.name"),
        ({"endpointPickerRef": "epp"}, "spec.endpointPickerRef"),
    ],
)
def test_bad_pool(spec: Any, field: str) -> None:
    """What its CRD refuses is refused here, with the field; an empty selector too, it would take in every pod."""
    document = _object("InferencePool", INFERENCE)
    document["spec"] |= spec
    parsed = parse(document)
    assert parsed.object is None
    assert (_only(parsed).reason, _only(parsed).field) == ("Invalid", field)


def test_unknown_strategy_is_a_warning() -> None:
    """A strategy nobody knows is named, and DEFAULT served."""
    document = _object("InferencePool", INFERENCE)
    document["metadata"]["annotations"] = {"inference.networking.x-k8s.io/routing-strategy": "FASTEST"}
    parsed = parse(document)
    assert isinstance(parsed.object, InferencePool)
    assert parsed.object.strategy is Strategy.DEFAULT
    rejection = _only(parsed)
    assert (rejection.reason, rejection.level) == ("UnknownStrategy", Level.WARNING)
    assert rejection.field == "metadata.annotations[inference.networking.x-k8s.io/routing-strategy]"
    assert rejection.message == 'expected DEFAULT or PREFIX_CACHE, found "FASTEST"; DEFAULT is served'


def test_inference_model() -> None:
    """Criticality defaults to Standard, targets without weights share equally, half weighted ones are refused."""
    model = parse(_object("InferenceModel")).object
    assert isinstance(model, InferenceModel)
    assert (model.criticality, model.targets) == (Criticality.CRITICAL, (("/model/qwen", 100),))
    assert model.pool == ObjectRef(INFERENCE_X, "InferencePool", "default", "vllm-qwen-pool")
    document = _object("InferenceModel")
    document["spec"] = {"modelName": "m", "poolRef": {"name": "p"}, "targetModels": [{"name": "a"}, {"name": "b"}]}
    plain = parse(document).object
    assert isinstance(plain, InferenceModel)
    assert (plain.criticality, plain.targets) == (Criticality.STANDARD, (("a", 1), ("b", 1)))
    document["spec"]["targetModels"][0]["weight"] = 2
    assert _only(parse(document)).field == "spec.targetModels"


def test_inference_model_rewrite() -> None:
    """A rule's matches are alternatives, none are every name; the pool's group is the newer one unless given."""
    for group in (INFERENCE_X, LLM_D):
        document = _object("InferenceModelRewrite")
        document["apiVersion"] = f"{group}/v1alpha2"
        del document["spec"]["poolRef"]["group"]
        rewrite = parse(document).object
        assert isinstance(rewrite, InferenceModelRewrite)
        assert rewrite.meta.ref == ObjectRef(group, "InferenceModelRewrite", "default", "alias")
        assert rewrite.pool == ObjectRef(INFERENCE, "InferencePool", "default", "p1")
        assert rewrite.rules == (
            RewriteRule(("chat", "chat-latest"), (("chat-v1", 9), ("chat-v2", 1))),
            RewriteRule((), (("base", 1),)),
        )


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        ({"targets": [{"modelRewrite": "a", "weight": 1}, {"modelRewrite": "b"}]}, "targets"),
        ({"targets": [{"modelRewrite": "a", "weight": 0}]}, "targets[0].weight"),
        ({"targets": [{}]}, "targets[0].modelRewrite"),
        ({"targets": [{"modelRewrite": ""}]}, "targets[0].modelRewrite"),
        ({"matches": [{}]}, "matches[0].model.value"),
        ({"matches": [{"model": {"type": "Prefix", "value": "a"}}]}, "matches[0].model.type"),
        ({"matches": [{"model": {"value": ""}}]}, "matches[0].model.value"),
    ],
)
def test_bad_rewrite(rule: Any, field: str) -> None:
    """An object that breaks its schema is rejected whole, as the API server would."""
    document = _object("InferenceModelRewrite")
    document["spec"]["rules"] = [{}, rule]
    parsed = parse(document)
    assert parsed.object is None
    assert (_only(parsed).reason, _only(parsed).field) == ("Invalid", f"spec.rules[1].{field}")


def test_inference_objective() -> None:
    """Of both groups; without a priority it is 0."""
    for name, group, priority in (("low", INFERENCE_X, -10), ("usual", LLM_D, 0)):
        objective = parse(_object("InferenceObjective", group)).object
        assert isinstance(objective, InferenceObjective)
        assert (objective.meta.ref.name, objective.priority) == (name, priority)
    document = _object("InferenceObjective")
    document["spec"]["priority"] = 2**31
    assert _only(parse(document)).field == "spec.priority"


def test_kinds_of_llm_d_that_are_not_read_are_others() -> None:
    """Its group has kinds of its own, which are no mistake in a directory of ours."""
    document = {"apiVersion": "llm-d.ai/v1alpha1", "kind": "ModelService", "metadata": {"name": "x"}, "spec": {}}
    assert parse(document) == Parsed()


def test_service() -> None:
    """Target ports are a number, a name or the port itself; a UDP port is nothing for Envoy's HTTP."""
    service = parse(_object("Service")).object
    assert isinstance(service, Service)
    assert service.ports == (ServicePort("http", 8000, "serve", "kubernetes.io/h2c"), ServicePort("admin", 81, 8081))
    assert service.selector == {"app": "qwen"}
    document = _object("Service")
    document["spec"] = {"type": "ExternalName", "externalName": "x"}
    external = parse(document).object
    assert isinstance(external, Service)
    assert (external.ports, external.selector) == ((), {})


def test_endpoint_slice() -> None:
    """Missing conditions are ready and not terminating, as the API says; only a Pod's targetRef names a pod."""
    endpoints = parse(_object("EndpointSlice")).object
    assert isinstance(endpoints, EndpointSlice)
    assert (endpoints.service, endpoints.ports) == ("qwen", {"": 8000})
    assert endpoints.endpoints == (
        SliceEndpoint(("10.0.0.1",), ready=True, terminating=False, pod="p0"),
        SliceEndpoint(("10.0.0.2",), ready=True, terminating=False, pod=""),
    )
    document = _object("EndpointSlice")
    document["endpoints"][1]["addresses"] = ["pod.example"]
    assert _only(parse(document)).field == "endpoints[1].addresses[0]"
    document["endpoints"][1]["addresses"] = ["fe80::1%eth0"]
    assert _only(parse(document)).message == 'expected an IP address without a zone, found "fe80::1%eth0"'
    document["addressType"] = "FQDN"
    assert _only(parse(document)).reason == "UnsupportedValue"


@pytest.mark.parametrize(
    ("status", "ready"),
    [
        ({"phase": "Running"}, True),
        ({"phase": "Pending"}, False),
        ({}, False),
        ({"phase": "Running", "conditions": [{"type": "Ready", "status": "False"}]}, False),
        ({"phase": "Running", "conditions": [{"type": "Initialized", "status": "True"}]}, False),
        ({"conditions": [{"type": "Ready", "status": "True"}]}, True),
    ],
)
def test_pod_readiness(status: Any, ready: bool) -> None:
    """The Ready condition decides; without any condition the phase does."""
    document = _object("Pod")
    document["status"] = status | {"podIP": "fd00::1"}
    pod = parse(document).object
    assert isinstance(pod, Pod)
    assert (pod.ready, pod.deleting, pod.ip, pod.ports) == (ready, False, "fd00::1", {"serve": 8000})


def test_pod_without_address_and_deleting() -> None:
    """A pending pod has no address; a deletionTimestamp marks one that terminates; a host name is no address."""
    document = _object("Pod")
    document["metadata"]["deletionTimestamp"] = "2025-01-01T00:00:00Z"
    document["status"] = {"podIP": ""}
    pod = parse(document).object
    assert isinstance(pod, Pod)
    assert (pod.ip, pod.deleting) == ("", True)
    for wrong, expected in (("localhost", ""), ("fe80::1%a b", " without a zone"), ("::1%lo", " without a zone")):
        document["status"]["podIP"] = wrong
        assert _only(parse(document)).message == f'expected an IP address{expected}, found "{wrong}"'


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "nothing"),
        ("a\nb", r'"a\nb"'),
        (True, "true"),
        (1.5, "1.5"),
        (2**100, "a number beyond 64 bits"),
        ({1}, "a value of type set"),
        ((1,), "a list"),
        ({}, "a mapping"),
    ],
)
def test_describe(value: object, shown: str) -> None:
    """A value in a message is one line, and never fails to be shown."""
    assert describe(value) == shown
    assert len(describe("x" * 100_000)) < 100
    assert describe(10**5000) == "a number beyond 64 bits"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1h30m", 5400.0), ("10s", 10.0), ("500ms", 0.5), ("0s", 0.0), ("1m1m", 120.0), ("1h1m1s1ms", 3661.001)],
)
def test_duration(text: str, seconds: float) -> None:
    """GEP-2257 durations in seconds; a component may come twice, as Go reads it."""
    assert Reader({"d": text}).duration("d") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "1", "1.5s", "-1s", "1d", "100000s", "1h1h1h1h1h", "1s\n", "\u0661s", 5])
def test_not_a_duration(text: object) -> None:
    """What GEP-2257 excludes is refused: fractions, signs, days, six digits, five parts, digits of other scripts."""
    document = _object("BackendTrafficPolicy")
    document["spec"]["timeout"]["http"]["requestTimeout"] = text
    assert _only(parse(document)).field == "spec.timeout.http.requestTimeout"


def test_rejections_of_one_object_are_bounded() -> None:
    """Of hundreds the first are told, and the one that costs the object."""
    document = _object("HTTPRoute")
    filters = [{"type": "CORS"}] * 16
    rule = {"backendRefs": [{"name": "s", "port": 1, "filters": filters}] * 16}
    document["spec"]["rules"] = [rule] * 8 + [{"matches": 3}]
    parsed = parse(document)
    assert len(parsed.rejections) == MAX_NOTES
    assert parsed.object is None
    assert parsed.rejections[0].field == "spec.rules[0].backendRefs[0].filters[0].type"
    assert parsed.rejections[-1].field == "spec.rules[8].matches"


# --- nothing raises ---------------------------------------------------------------------------------------------------

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=20),
    st.sampled_from(["", "\ud800", "v1", "HTTP", "(?=a)", "[", "*", "1h", "/", -1, 65536, 0]),
    st.just(5000).map(lambda digits: 10**digits),  # more digits than Python will print
    st.binary(max_size=3),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_SCALARS, inner, max_size=4),
    max_leaves=12,
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a nested one is."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, each in inner for deeper in _paths(each, (*path, key)))]


def _put(document: Any, path: tuple[Any, ...], value: object) -> None:
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


@st.composite
def _mutated(draw: st.DrawFn) -> Any:
    """A valid object with one to three of its values replaced by anything, or under a key of its own."""
    document = copy.deepcopy(draw(st.sampled_from(OBJECTS)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(_paths(document)[1:] or [("spec",)]))
        last = path[-1] if isinstance(path[-1], int) else draw(st.just(path[-1]) | _SCALARS)
        _put(document, (*path[:-1], last), draw(_VALUES))
    return document


def _check(parsed: Parsed) -> None:
    """What always holds of a result, whatever was parsed."""
    assert parsed.object is None or parsed.ref == parsed.object.meta.ref
    assert parsed.object is not None or parsed.ref is None or parsed.rejections
    for rejection in parsed.rejections:
        line = str(rejection)
        assert line.encode()
        assert line.isprintable()
        assert len(rejection.message) < 500


@given(_VALUES)
def test_arbitrary_values_never_raise(value: object) -> None:
    """Any nested value is answered with a result whose rejections can be logged."""
    _check(parse(value))


@settings(max_examples=500)
@given(_mutated())
def test_mutated_objects_never_raise(document: Any) -> None:
    """Valid objects with anything in the place of their values are accepted or rejected, and never raise."""
    _check(parse(document))


def test_every_field_is_checked() -> None:
    """A value no field takes, put at each place of each object in turn, is refused or named, save what is listed."""
    passed = set()
    for original in OBJECTS:
        for path in _paths(original)[1:]:
            document = copy.deepcopy(original)
            _put(document, path, object())
            if not parse(document).rejections:
                passed.add(f"{original['kind']} {'.'.join(map(str, path))}")
    assert passed == {
        "GatewayClass spec.description",
        "HTTPRoute spec.rules.0.name",
        "InferencePool spec.endpointPickerRef.failureMode",
        "InferencePool spec.endpointPickerRef.port",
        "InferencePool spec.endpointPickerRef.port.number",
        "Service spec.type",
        "Service spec.ports.2.name",
        "Service spec.ports.2.port",
        "Pod spec.containers.0.ports.1.containerPort",
        "EndpointSlice endpoints.0.conditions.serving",
        "EndpointSlice endpoints.0.targetRef.kind",
        "Pod spec.containers.0.image",
        "Pod spec.containers.0.name",
        "Pod status.conditions.0.status",
        "Pod status.conditions.0.type",
        "Pod status.conditions.1.status",
        "Pod status.conditions.1.type",
        "Pod status.phase",
    }
