"""The values that flow through the server; every one is frozen, none does I/O.

    dict --parse--> Object --index--> Config --resolve--> Topology --translate--> Snapshot
                                                  Load --weigh--> Weight --^

Units: seconds (float), tokens, shares 0..1, weights in Envoy's integer `load_balancing_weight`.
Names follow Gateway API (`HTTPRoute`, `parentRef`), the inference extension (`InferencePool`) and xDS (`endpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum

CORE = ""
DISCOVERY = "discovery.k8s.io"
GATEWAY = "gateway.networking.k8s.io"
INFERENCE = "inference.networking.k8s.io"
INFERENCE_X = "inference.networking.x-k8s.io"
LLM_D = "llm-d.ai"
ENVOY_GATEWAY = "gateway.envoyproxy.io"

ROUTE_KINDS = ((GATEWAY, "HTTPRoute"),)  # (group, kind) of the routes that listeners take


@dataclass(frozen=True, slots=True, order=True)
class ObjectRef:
    """One Kubernetes object: what a log line, a rejection and a reference name. `namespace` is "" for cluster scope."""

    group: str
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        """`HTTPRoute default/qwen-backend`, or `GatewayClass qwen` for cluster scope."""
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


class Level(StrEnum):
    """How bad a finding is: an ERROR is not served as written (`check` exits 1); a WARNING is served with a default."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why an object, or a part of it, is not served as its author wrote it.

    `reason` is CamelCase as in Gateway API conditions (Invalid, BackendNotFound, RefNotPermitted, ...), `field` a path
    such as `spec.rules[0].matches[1].path.value` ("" = the whole object), `source` where it was read (`file.yaml:12`).
    `ref` is None when a document could not be read far enough to know whose it is.
    """

    ref: ObjectRef | None
    reason: str
    message: str
    field: str = ""
    source: str = ""
    level: Level = Level.ERROR

    def __str__(self) -> str:
        where = f"{self.source}: " if self.source else ""
        what = f"{self.ref}: " if self.ref else ""
        path = f"{self.field}: " if self.field else ""
        return f"{where}{what}{path}{self.message} ({self.reason})"


class ConditionType(StrEnum):
    """The conditions of Gateway API and the inference extension that are written."""

    ACCEPTED = "Accepted"
    PROGRAMMED = "Programmed"
    RESOLVED_REFS = "ResolvedRefs"
    CONFLICTED = "Conflicted"
    PARTIALLY_INVALID = "PartiallyInvalid"
    OVERLAPPING_TLS = "OverlappingTLSConfig"
    READY = "Ready"
    SUPPORTED_VERSION = "SupportedVersion"


@dataclass(frozen=True, slots=True)
class Problem:
    """What a part of an object is not, and which of its conditions says so; `reason` is one of that condition's."""

    condition: ConditionType
    reason: str
    message: str

    @classmethod
    def of(cls, condition: ConditionType, rejection: Rejection) -> Problem:
        """The problem a rejection tells of, where both have the reason in common."""
        path = f"{rejection.field}: " if rejection.field else ""
        return cls(condition, rejection.reason, f"{path}{rejection.message}")


@dataclass(frozen=True, slots=True)
class Meta:
    """What every object carries. `created` is metadata.creationTimestamp (RFC 3339, sorts as text) or ""."""

    ref: ObjectRef
    created: str = ""
    generation: int = 0
    source: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def age_key(self) -> tuple[bool, str, str]:
        """Sort key of Gateway API's conflict rule: oldest first, then `namespace/name`; no timestamp is newest."""
        return (not self.created, self.created, f"{self.ref.namespace}/{self.ref.name}")


# --- Gateway API --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GatewayClass:
    meta: Meta
    controller_name: str


@dataclass(frozen=True, slots=True)
class Requirement:
    """One of a label selector's matchExpressions; `operator` is In, NotIn, Exists or DoesNotExist."""

    key: str
    operator: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AllowedRoutes:
    """spec.listeners[].allowedRoutes. `namespaces_from` is Same, All, Selector or None; `selector` are matchLabels and
    `requirements` matchExpressions, which all have to hold."""

    namespaces_from: str = "Same"
    selector: Mapping[str, str] = field(default_factory=dict)
    kinds: tuple[tuple[str, str], ...] = ()  # (group, kind); empty = every kind the protocol supports
    requirements: tuple[Requirement, ...] = ()


@dataclass(frozen=True, slots=True)
class Listener:
    """`hostname` is "" for any, else lower case, possibly `*.example.com`; `protocol` is HTTP or HTTPS.

    `certificates` are Secrets, and `field` the path of their list in the Gateway. With `problems` of its Accepted
    condition the listener is not served, and `protocol` may be any.
    """

    name: str
    port: int
    protocol: str
    hostname: str = ""
    allowed: AllowedRoutes = AllowedRoutes()
    certificates: tuple[ObjectRef, ...] = ()
    field: str = ""
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Gateway:
    """`groups` are the Envoys it is for, by node.cluster or node.id; empty = all of them.

    `addresses` are (IPAddress or Hostname, value) it asks for; empty = those there are.
    """

    meta: Meta
    class_name: str
    listeners: tuple[Listener, ...]
    groups: tuple[str, ...] = ()
    addresses: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ParentRef:
    """A route's parent; `section` is a listener's name ("" = all), `port` 0 = all."""

    ref: ObjectRef
    section: str = ""
    port: int = 0


class MatchType(StrEnum):
    EXACT = "Exact"
    PREFIX = "PathPrefix"  # paths only
    REGEX = "RegularExpression"


@dataclass(frozen=True, slots=True)
class PathMatch:
    type: MatchType = MatchType.PREFIX
    value: str = "/"


@dataclass(frozen=True, slots=True)
class ValueMatch:
    """A header (name lower case) or query parameter match."""

    name: str
    value: str
    type: MatchType = MatchType.EXACT


@dataclass(frozen=True, slots=True)
class RouteMatch:
    """AND of its parts; `method` "" = any. A rule without matches has one RouteMatch() (prefix `/`)."""

    path: PathMatch = PathMatch()
    headers: tuple[ValueMatch, ...] = ()
    query: tuple[ValueMatch, ...] = ()
    method: str = ""


@dataclass(frozen=True, slots=True)
class HeaderModifier:
    """HTTPHeaderFilter: (name, value) pairs to set and to add, names to remove."""

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PathModifier:
    """HTTPPathModifier: `full` True is ReplaceFullPath, False ReplacePrefixMatch."""

    full: bool
    value: str


@dataclass(frozen=True, slots=True)
class RequestRedirect:
    scheme: str = ""
    hostname: str = ""
    path: PathModifier | None = None
    port: int = 0
    status: int = 302


@dataclass(frozen=True, slots=True)
class URLRewrite:
    hostname: str = ""
    path: PathModifier | None = None


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of a rule or of one backendRef; each kind at most once, as Gateway API says."""

    request_headers: HeaderModifier | None = None
    response_headers: HeaderModifier | None = None
    redirect: RequestRedirect | None = None
    rewrite: URLRewrite | None = None


@dataclass(frozen=True, slots=True)
class BackendRef:
    """`field` is its path in the route, for messages. `port` 0 = not given (allowed for an InferencePool)."""

    ref: ObjectRef
    field: str
    port: int = 0
    weight: int = 1
    filters: Filters = Filters()


@dataclass(frozen=True, slots=True)
class RouteRule:
    """`timeout` and `backend_timeout` in seconds; None = not given, 0 = no timeout (Gateway API GEP-1742).

    With a `problem` the rule can not be served as written: it has no backends, and its requests are answered with 500.
    """

    matches: tuple[RouteMatch, ...] = (RouteMatch(),)
    filters: Filters = Filters()
    backends: tuple[BackendRef, ...] = ()
    timeout: float | None = None
    backend_timeout: float | None = None
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class HTTPRoute:
    meta: Meta
    parents: tuple[ParentRef, ...]
    hostnames: tuple[str, ...]
    rules: tuple[RouteRule, ...]


@dataclass(frozen=True, slots=True)
class ReferenceGrant:
    """`sources` are (group, kind, namespace), `targets` (group, kind, name or "" for every name)."""

    meta: Meta
    sources: tuple[tuple[str, str, str], ...]
    targets: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class BackendTrafficPolicy:
    """gateway.envoyproxy.io/v1alpha1: its HTTP and TCP timeouts, in seconds; None = not given, 0 = none.

    `targets` are (target, sectionName or ""), the target a Gateway or an HTTPRoute of the policy's own namespace.
    """

    meta: Meta
    targets: tuple[tuple[ObjectRef, str], ...]
    request_timeout: float | None = None
    stream_idle_timeout: float | None = None
    connection_idle_timeout: float | None = None
    connect_timeout: float | None = None


# --- core ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Secret:
    """One of type kubernetes.io/tls: a certificate (chain) and its key, both PEM, known to belong together."""

    meta: Meta
    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ServicePort:
    """`target` is a number, or the name of a container port."""

    name: str
    port: int
    target: int | str
    app_protocol: str = ""


@dataclass(frozen=True, slots=True)
class Service:
    meta: Meta
    ports: tuple[ServicePort, ...]
    selector: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SliceEndpoint:
    """One entry of an EndpointSlice; `pod` is its targetRef's name or ""."""

    addresses: tuple[str, ...]
    ready: bool
    terminating: bool
    pod: str


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """`service` is the label kubernetes.io/service-name; `ports` maps the port's name ("" allowed) to its number."""

    meta: Meta
    service: str
    ports: Mapping[str, int]
    endpoints: tuple[SliceEndpoint, ...]


@dataclass(frozen=True, slots=True)
class Pod:
    """`ready` is the Ready condition (or, with no status.conditions, phase Running); `deleting` a deletionTimestamp."""

    meta: Meta
    ip: str
    ready: bool
    deleting: bool
    ports: Mapping[str, int]  # named container ports


@dataclass(frozen=True, slots=True)
class Namespace:
    """Its labels are what allowedRoutes may select by; without the object a namespace has only its name's."""

    meta: Meta


# --- inference extension ------------------------------------------------------------------------------------------


class Strategy(StrEnum):
    """The pool annotation `inference.networking.x-k8s.io/routing-strategy`."""

    DEFAULT = "DEFAULT"
    PREFIX_CACHE = "PREFIX_CACHE"


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What the pool's annotations `vllm-xds/...` say (xds/parse_settings.py), or their defaults.

    `session_header` is the request header whose value keeps a session's requests together, lower case, "" for none.
    The other ones are the picker's (picker/cost.py says what they do), None for its own default.
    """

    session_header: str = ""
    # Percent of a pod's fair share of active requests: the net under a wrong pick, not the balancer. From 300 on it is
    # free; 200 costs up to 15 % of the time to first token near saturation.
    hash_balance_factor: int = 300
    output_tokens: int | None = None  # tokens of a usual answer
    prefill_rate: int | None = None  # tokens/s a pod prefills at least
    request_cost: int | None = None  # tokens of prefill that a running request counts as
    shed_waiting: int | None = None  # requests waiting on each pod that saturate the pool
    shed_kv_usage: float | None = None  # 0..1, KV-cache use of each pod that saturates the pool


@dataclass(frozen=True, slots=True)
class InferencePool:
    """v1 (inference.networking.k8s.io) and v1alpha2 (.x-k8s.io) alike; `meta.ref.group` tells them apart.

    `extension` is endpointPickerRef's or extensionRef's name, "" when not given.
    """

    meta: Meta
    selector: Mapping[str, str]
    ports: tuple[int, ...]
    strategy: Strategy = Strategy.DEFAULT
    http2: bool = False  # appProtocol kubernetes.io/h2c
    extension: str = ""
    settings: PoolSettings = PoolSettings()


class Criticality(Enum):
    CRITICAL = "Critical"
    STANDARD = "Standard"
    SHEDDABLE = "Sheddable"


@dataclass(frozen=True, slots=True)
class InferenceModel:
    """v1alpha2. `targets` are (model name, weight); empty = `model_name` itself."""

    meta: Meta
    model_name: str
    criticality: Criticality
    targets: tuple[tuple[str, int], ...]
    pool: ObjectRef


@dataclass(frozen=True, slots=True)
class RewriteRule:
    """`models` are exact names, empty = every model; `targets` (model name, weight), empty = the name as it is."""

    models: tuple[str, ...]
    targets: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class InferenceModelRewrite:
    """v1alpha2 of either group."""

    meta: Meta
    rules: tuple[RewriteRule, ...]
    pool: ObjectRef


@dataclass(frozen=True, slots=True)
class InferenceObjective:
    """v1alpha2 of either group; a request names it in a header. Below 0 it may be shed."""

    meta: Meta
    priority: int
    pool: ObjectRef


Object = (
    GatewayClass
    | Gateway
    | HTTPRoute
    | ReferenceGrant
    | BackendTrafficPolicy
    | Service
    | EndpointSlice
    | Pod
    | Namespace
    | Secret
    | InferencePool
    | InferenceModel
    | InferenceModelRewrite
    | InferenceObjective
)


OfPool = InferenceModel | InferenceModelRewrite | InferenceObjective
Reporting = GatewayClass | Gateway | HTTPRoute | InferencePool | OfPool  # objects with a status of ours


@dataclass(frozen=True, slots=True)
class Refused:
    """The newest version of an object, which is not served: `object` has at least what says whose it is.

    `reason` is that of its Accepted condition, `message` says what is served instead, if anything is.
    """

    object: Reporting
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Config:
    """Every accepted object, by kind and in `Meta.age_key` order, and why the others are not here."""

    gateway_classes: tuple[GatewayClass, ...] = ()
    gateways: tuple[Gateway, ...] = ()
    http_routes: tuple[HTTPRoute, ...] = ()
    reference_grants: tuple[ReferenceGrant, ...] = ()
    traffic_policies: tuple[BackendTrafficPolicy, ...] = ()
    services: tuple[Service, ...] = ()
    endpoint_slices: tuple[EndpointSlice, ...] = ()
    pods: tuple[Pod, ...] = ()
    namespaces: tuple[Namespace, ...] = ()
    secrets: tuple[Secret, ...] = ()
    pools: tuple[InferencePool, ...] = ()
    models: tuple[InferenceModel, ...] = ()
    rewrites: tuple[InferenceModelRewrite, ...] = ()
    objectives: tuple[InferenceObjective, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    refused: tuple[Refused, ...] = ()

    @property
    def objects(self) -> tuple[Object, ...]:
        """Those of every kind."""
        return (
            *self.gateway_classes,
            *self.gateways,
            *self.http_routes,
            *self.reference_grants,
            *self.traffic_policies,
            *self.services,
            *self.endpoint_slices,
            *self.pods,
            *self.namespaces,
            *self.secrets,
            *self.pools,
            *self.models,
            *self.rewrites,
            *self.objectives,
        )


def printable(text: str) -> str:
    """The text on one line and without what a terminal would obey, as a message may show it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def authority(address: str, port: int) -> str:
    """`address:port` as a URL has it: IPv6 in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


# --- topology: what Envoy shall do, before it is said in Envoy's words -----------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """One address:port Envoy may send to.

    `hash_key` is its place on the ring (`namespace/pod`, with `:port` when the pool has several ports): it outlives an
    IP change. `metrics_url` is "" for an endpoint that is not scraped. `draining` = its pod has a deletionTimestamp.
    """

    address: str
    port: int
    hash_key: str
    draining: bool = False
    metrics_url: str = ""


@dataclass(frozen=True, slots=True)
class ModelRule:
    """What happens to requests for a model: `name` "" stands for every name without a rule of its own.

    `targets` are (model name, weight), empty = the name is passed on.
    """

    name: str
    targets: tuple[tuple[str, int], ...] = ()
    criticality: Criticality = Criticality.STANDARD


@dataclass(frozen=True, slots=True)
class Renames:
    """Which model names a pool's pods must not be sent: `names`, and with `others` all but those of `kept`. Sorted."""

    names: tuple[str, ...] = ()
    others: bool = False
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolModels:
    """What the objects say of a pool's models: one rule a name, sorted. `closed`: other names do not exist.

    `objectives` are (name, priority), sorted.
    """

    rules: tuple[ModelRule, ...] = ()
    closed: bool = False
    objectives: tuple[tuple[str, int], ...] = ()

    @property
    def renames(self) -> Renames | None:
        """None when every name is passed on."""
        rules = {rule.name: rule.targets for rule in self.rules}
        others = rules.pop("", ())
        names = tuple(name for name, targets in rules.items() if targets)
        if not others:
            return Renames(names) if names else None
        kept = {name for name, targets in rules.items() if not targets}
        if len({target for target, _ in others}) == 1 and others[0][0] not in names:
            kept.add(others[0][0])
        return Renames(names, others=True, kept=tuple(sorted(kept)))

    @property
    def sheds(self) -> bool:
        """Whether any request may be refused when the pool is saturated."""
        sheddable = any(rule.criticality is Criticality.SHEDDABLE for rule in self.rules)
        return sheddable or any(priority < 0 for _, priority in self.objectives)

    @property
    def needs_picker(self) -> bool:
        """Whether more is asked than the pods do themselves: they answer unknown names with 404."""
        return self.renames is not None or self.sheds


@dataclass(frozen=True, slots=True)
class Cluster:
    """One InferencePool (name `pool/<namespace>/<name>`) or one Service port (`service/<namespace>/<name>/<port>`).

    `ref` is that pool or Service, `strategy` None for a Service. `endpoints` are sorted.
    """

    name: str
    endpoints: tuple[Endpoint, ...]
    strategy: Strategy | None = None
    http2: bool = False
    settings: PoolSettings = PoolSettings()
    models: PoolModels = PoolModels()
    connect_timeout: float | None = None
    connection_idle_timeout: float | None = None
    ref: ObjectRef | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """Send to clusters by weight. A cluster name of "" is an invalid backendRef: that share of requests gets a 500.

    `session_headers` are those of its PREFIX_CACHE pools, sorted; `renames` one for each of its pools that has any.
    """

    clusters: tuple[tuple[str, int, Filters], ...]
    rewrite: URLRewrite | None = None
    llm: bool = False  # at least one backend is an InferencePool
    picked: bool = False  # at least one of them is PREFIX_CACHE
    asked: bool = False  # the picker is asked: picked, or for the models of one of them
    session_headers: tuple[str, ...] = ()
    objectives: bool = False  # a request's objective counts
    refuses: bool = False  # the picker may refuse a request
    renames: tuple[Renames, ...] = ()
    timeout: float | None = None  # None = the default of its kind, 0 = none
    backend_timeout: float | None = None
    idle_timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Respond:
    """Answer at once with this status."""

    status: int


@dataclass(frozen=True, slots=True)
class Route:
    """`name` is `<namespace>/<HTTPRoute>/<rule>/<match>`, for logs, access logs and `/config_dump`."""

    name: str
    match: RouteMatch
    action: Forward | RequestRedirect | Respond
    filters: Filters = Filters()


@dataclass(frozen=True, slots=True)
class VirtualHost:
    """`hostname` is "*" or a name or `*.suffix`; routes in order of precedence."""

    hostname: str
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True)
class TlsChain:
    """What a TLS port serves to clients that ask for one name: `hostname` as in VirtualHost, "*" for all other names.

    `certificates` are Secrets of the Topology.
    """

    hostname: str
    certificates: tuple[ObjectRef, ...]
    virtual_hosts: tuple[VirtualHost, ...]


@dataclass(frozen=True, slots=True)
class PortListener:
    """One TCP port of the Envoys of a group, whatever number of Gateway listeners share it.

    `group` "" are the Envoys that no Gateway names; `gateways` those whose port it is. HTTP has virtual hosts, HTTPS
    has chains with their own; both are sorted by hostname.
    """

    port: int
    virtual_hosts: tuple[VirtualHost, ...] = ()
    group: str = ""
    gateways: tuple[ObjectRef, ...] = ()
    chains: tuple[TlsChain, ...] = ()

    @property
    def all_virtual_hosts(self) -> tuple[VirtualHost, ...]:
        """Those of all its chains too."""
        return (*self.virtual_hosts, *(host for chain in self.chains for host in chain.virtual_hosts))


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition of a status; `status` is "True", "False" or "Unknown"."""

    type: ConditionType
    status: str
    reason: str
    message: str
    generation: int  # of the object it was set for


@dataclass(frozen=True, slots=True)
class ListenerStatus:
    """status.listeners[] of a Gateway; `kinds` are the (group, kind) of routes it takes."""

    name: str
    kinds: tuple[tuple[str, str], ...]
    attached: int
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class ParentStatus:
    """status.parents[] of an HTTPRoute or InferencePool, written as `controller`."""

    parent: ParentRef
    controller: str
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Status:
    """What is to be written to the status of `ref` as it is at `generation`: each kind has its part of the fields.

    `features` are supportedFeatures of a GatewayClass, `addresses` what a Gateway asks for: which ones it has is known
    to the writer alone.
    """

    ref: ObjectRef
    generation: int
    conditions: tuple[Condition, ...] = ()
    listeners: tuple[ListenerStatus, ...] = ()
    parents: tuple[ParentStatus, ...] = ()
    features: tuple[str, ...] = ()
    addresses: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything to be served, sorted: equal Configs give equal Topologies.

    `groups` are the groups of Envoys that Gateways name; each has all ports that are for it, whoever else has them too.
    `statuses` are those of the objects that are ours.
    """

    listeners: tuple[PortListener, ...] = ()
    clusters: tuple[Cluster, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    groups: tuple[str, ...] = ()
    secrets: tuple[Secret, ...] = ()
    statuses: tuple[Status, ...] = ()


# --- loads and weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """One reading of one endpoint's /metrics: gauges as they are, counters as read (since the pod's start).

    Sums over the engines of a page where there are several; `kv_usage` is their mean. A field the page does not have
    is 0, except `kv_usage`, whose absence (either generation's name) makes the page unreadable.
    """

    running: float = 0.0
    waiting: float = 0.0
    kv_usage: float = 0.0  # 0..1
    kv_tokens: int = 0  # capacity: block_size * num_gpu_blocks
    start_time: float = 0.0  # process_start_time_seconds, unix seconds
    prefix_queries: float = 0.0  # tokens
    prefix_hits: float = 0.0  # tokens
    prefill_tokens: float = 0.0  # request_prefill_kv_computed_tokens_sum
    prefill_seconds: float = 0.0  # request_prefill_time_seconds_sum
    token_count: float = 0.0  # inter_token_latency_seconds_count
    token_seconds: float = 0.0  # inter_token_latency_seconds_sum
    preemptions: float = 0.0
    prompt_tokens: float = 0.0
    generation_tokens: float = 0.0
    max_lora: int = 0  # LoRA adapters the pod holds at a time; 0 = its page says nothing of adapters
    running_adapters: tuple[str, ...] = ()  # with a request running, sorted
    waiting_adapters: tuple[str, ...] = ()  # with a request waiting, sorted
