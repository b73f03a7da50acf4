"""What the statuses of our objects say: conditions with the reasons of Gateway API and the inference extension (pure).

    Findings, Attachments ─▶ GatewayClass   Accepted, SupportedVersion
                             Gateway        Accepted, Programmed; of each listener Accepted, Conflicted, ResolvedRefs,
                                            Programmed, and OverlappingTLSConfig where it is so
                             HTTPRoute      of each parentRef that is ours Accepted, ResolvedRefs, and PartiallyInvalid
                             InferencePool  of each Gateway that routes to it Accepted, ResolvedRefs
                             InferenceModel, InferenceModelRewrite, InferenceObjective
                                            Accepted, and Ready where its CRD has it

- Nothing is decided here that xds/attach.py, xds/backends.py or a parser has decided: one finding is a Rejection in the
  log and a condition in the status.
- An object whose newest version is refused is Accepted=False at that version's generation, whatever is served of it.
- A Gateway is Programmed when one of its listeners is; whether it has an address, and which version the CRDs have, is
  for xds/status_patch.py to say.

Reasons: kubernetes-sigs/gateway-api v1.6.1 (apis/v1), gateway-api-inference-extension v1.6.0 and v0.5.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from xds.attach import Attachment, Findings, ListenerKey, supported_kinds
from xds.backends import Backends
from xds.model import (
    Condition,
    ConditionType,
    Config,
    Gateway,
    GatewayClass,
    HTTPRoute,
    InferenceModel,
    InferenceModelRewrite,
    InferenceObjective,
    InferencePool,
    Listener,
    ListenerStatus,
    ObjectRef,
    OfPool,
    ParentRef,
    ParentStatus,
    Problem,
    Refused,
    Rejection,
    Status,
)
from xds.models import POOL_GROUPS

# What a GatewayClass of ours says it supports: names of gateway-api's pkg/features, sorted as the API wants them.
# docs/conformance.md has the tests behind each.
FEATURES = (
    "Gateway",
    "GatewayAddressEmpty",
    "GatewayHTTPListenerIsolation",
    "GatewayHTTPSListenerDetectMisdirectedRequests",
    "GatewayPort8080",
    "HTTPRoute",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteBackendProtocolH2C",
    "HTTPRouteBackendRequestHeaderModification",
    "HTTPRouteBackendTimeout",
    "HTTPRouteHostRewrite",
    "HTTPRouteMethodMatching",
    "HTTPRouteNamedRouteRule",
    "HTTPRouteParentRefPort",
    "HTTPRoutePathRedirect",
    "HTTPRoutePathRewrite",
    "HTTPRoutePortRedirect",
    "HTTPRouteQueryParamMatching",
    "HTTPRouteRequestTimeout",
    "HTTPRouteResponseHeaderModification",
    "HTTPRouteSchemeRedirect",
    "ReferenceGrant",
)
OWN_PICKER = "the picker is that of vllm-xds, whatever it names"

ACCEPTED, PROGRAMMED = ConditionType.ACCEPTED, ConditionType.PROGRAMMED
RESOLVED_REFS, CONFLICTED, READY = ConditionType.RESOLVED_REFS, ConditionType.CONFLICTED, ConditionType.READY
PoolName = tuple[str, str]  # namespace and name
Referrers = Mapping[PoolName, Mapping[ObjectRef, tuple[str, bool]]]  # as `_referrers` says

PARTIALLY_INVALID, OVERLAPPING_TLS = ConditionType.PARTIALLY_INVALID, ConditionType.OVERLAPPING_TLS


@dataclass(frozen=True, slots=True)
class _Judged:
    """An HTTPRoute at one of its parents: not accepted because of `problem`, if any; `references` None: all resolve.

    `invalid` are the rules that are answered with 500, `dropped` says why one is not served at all.
    """

    attachment: Attachment
    problem: Problem | None
    references: Problem | None
    invalid: tuple[int, ...]
    dropped: Problem | None


def statuses(
    config: Config,
    controllers: frozenset[str],
    gateways: Iterable[Gateway],
    attachments: Iterable[Attachment],
    backends: Backends,
    findings: Findings,
    conflicts: Iterable[Rejection],
) -> tuple[Status, ...]:
    """Of every object that is ours, sorted by object. `conflicts` are those of models, as xds/models.py says."""
    refused = {each.object.meta.ref: each for each in config.refused}
    judged = list(_judge(attachments, backends, refused, findings))
    attached = _count_routes(judged)
    referrers = _referrers(judged, backends)
    found = [_class_status(each) for each in config.gateway_classes if each.controller_name in controllers]
    found += [_gateway_status(each, attached, findings) for each in gateways]
    found += _route_statuses(judged)
    found += [_pool_status(each, referrers, backends) for each in config.pools if _name(each.meta.ref) in referrers]
    found += _model_statuses((*config.models, *config.rewrites, *config.objectives), referrers, conflicts)
    by_ref = {status.ref: status for status in found}
    classes = {each.meta.ref.name: each.controller_name for each in config.gateway_classes}
    for ref, each in refused.items():
        match each.object:
            case GatewayClass(controller_name=controller) if controller in controllers:
                by_ref[ref] = _refused(each, ACCEPTED)
            case Gateway(class_name=name) if classes.get(name) in controllers:
                listeners = by_ref[ref].listeners if ref in by_ref else ()
                by_ref[ref] = replace(_refused(each, ACCEPTED, PROGRAMMED), listeners=listeners)
            case HTTPRoute(parents=parents):
                by_ref[ref] = _refused_at(each, {p: c for p in parents if (c := findings.controllers.get(p.ref))})
            case InferencePool():
                of_pool = referrers.get(_name(ref), {})
                by_ref[ref] = _refused_at(each, {ParentRef(gateway): c for gateway, (c, _) in sorted(of_pool.items())})
            case InferenceModel(pool=pool) | InferenceObjective(pool=pool) if _is_named(pool, referrers):
                by_ref[ref] = _refused(each, ACCEPTED, READY)
            case InferenceModelRewrite(pool=pool) if _is_named(pool, referrers):
                by_ref[ref] = _refused(each, ACCEPTED)
    return tuple(status for _, status in sorted(by_ref.items()) if _says_something(status))


def after_envoys(found: Iterable[Status], refusals: Mapping[ObjectRef, str]) -> Iterator[Status]:
    """The statuses when Envoys have answered: a Gateway or pool of which one refuses a resource says so, and why."""
    for status in found:
        if (why := refusals.get(status.ref)) is None:
            yield status
        else:
            parents = tuple(
                replace(each, conditions=_overruled(each.conditions, ACCEPTED, "RefusedByEnvoy", why))
                for each in status.parents
            )
            conditions = _overruled(status.conditions, PROGRAMMED, "Invalid", why)
            yield replace(status, conditions=conditions, parents=parents)


def _overruled(
    conditions: Iterable[Condition], kind: ConditionType, reason: str, message: str
) -> tuple[Condition, ...]:
    """With that condition False, if it is there and True."""
    return tuple(
        _false(kind, each.generation, reason, message) if each.type is kind and each.status == "True" else each
        for each in conditions
    )


def _true(kind: ConditionType, generation: int, message: str = "", reason: str = "") -> Condition:
    return Condition(kind, "True", reason or kind.value, message, generation)


def _false(kind: ConditionType, generation: int, reason: str, message: str) -> Condition:
    return Condition(kind, "False", reason, message, generation)


def _unless(problem: Problem | None, kind: ConditionType, generation: int) -> Condition:
    return _false(kind, generation, problem.reason, problem.message) if problem else _true(kind, generation)


# --- GatewayClasses and Gateways --------------------------------------------------------------------------------------


def _class_status(each: GatewayClass) -> Status:
    return Status(each.meta.ref, each.meta.generation, (_true(ACCEPTED, each.meta.generation),), features=FEATURES)


def _gateway_status(gateway: Gateway, attached: Counter[ListenerKey], findings: Findings) -> Status:
    ref, generation = gateway.meta.ref, gateway.meta.generation
    listeners = tuple(_listener_status(gateway, each, attached[ref, each.name], findings) for each in gateway.listeners)
    rejected = [each.name for each in listeners if _is(each.conditions, ACCEPTED, "False")]
    valid = [each.name for each in listeners if each.name not in rejected]
    message = f"listeners that are not valid: {', '.join(rejected)}; accepted: {', '.join(valid) or 'none'}"
    if not rejected:
        accepted = _true(ACCEPTED, generation)
    elif valid:
        accepted = _true(ACCEPTED, generation, message, "ListenersNotValid")
    else:
        accepted = _false(ACCEPTED, generation, "ListenersNotValid", message)
    problems = "; ".join(each.message for each in findings.gateways.get(ref, ()))
    if any((ref, each.name) in findings.served for each in gateway.listeners):
        programmed = _true(PROGRAMMED, generation, problems)
    else:
        programmed = _false(PROGRAMMED, generation, "Invalid", problems or "none of its listeners is served")
    return Status(ref, generation, (accepted, programmed), listeners, addresses=gateway.addresses)


def _listener_status(gateway: Gateway, listener: Listener, attached: int, findings: Findings) -> ListenerStatus:
    generation = gateway.meta.generation
    key = gateway.meta.ref, listener.name
    found: dict[ConditionType, Problem] = {}
    for problem in (*listener.problems, *findings.problems.get(key, ())):
        found.setdefault(problem.condition, problem)
    conflict = found.get(CONFLICTED)
    invalid = found.get(ACCEPTED) or (conflict and replace(conflict, reason="Invalid"))
    is_served = key in findings.served
    conditions = [
        _unless(invalid, ACCEPTED, generation),
        _true(CONFLICTED, generation, conflict.message, conflict.reason)
        if conflict
        else _false(CONFLICTED, generation, "NoConflicts", ""),
        _unless(found.get(RESOLVED_REFS), RESOLVED_REFS, generation),
        # In one group of Envoys it may conflict, and be served in another.
        _true(PROGRAMMED, generation)
        if is_served and not conflict
        else _false(PROGRAMMED, generation, "Invalid", _why_not(found, is_served)),
    ]
    if OVERLAPPING_TLS in found:
        overlap = found[OVERLAPPING_TLS]
        conditions.append(_true(OVERLAPPING_TLS, generation, overlap.message, overlap.reason))
    return ListenerStatus(listener.name, supported_kinds(listener), attached, tuple(conditions))


def _why_not(found: dict[ConditionType, Problem], is_served: bool) -> str:
    if is_served:
        return "only some of the Envoys it is for have it"
    problem = next((found[kind] for kind in (ACCEPTED, CONFLICTED, RESOLVED_REFS, PROGRAMMED) if kind in found), None)
    return problem.message if problem else "no Envoy is for it"


def _is(conditions: Iterable[Condition], kind: ConditionType, status: str) -> bool:
    return any(each.type is kind and each.status == status for each in conditions)


# --- HTTPRoutes -------------------------------------------------------------------------------------------------------


def _judge(
    attachments: Iterable[Attachment], backends: Backends, refused: Mapping[ObjectRef, Refused], findings: Findings
) -> Iterator[_Judged]:
    """Every attachment. Of a refused route it is the version served instead, which is not the accepted one."""
    references: dict[ObjectRef, Problem | None] = {}
    for each in attachments:
        route = each.route
        if route.meta.ref not in references:
            references[route.meta.ref] = _unresolved(route, backends)
        invalid = tuple(i for i, rule in enumerate(route.rules) if rule.problem)
        problem = each.problem
        if route.meta.ref in refused:
            problem = Problem(ACCEPTED, refused[route.meta.ref].reason, refused[route.meta.ref].message)
        elif problem is None and invalid and len(invalid) == len(route.rules):
            problem = route.rules[0].problem
        yield _Judged(each, problem, references[route.meta.ref], invalid, findings.dropped.get(route.meta.ref))


def _unresolved(route: HTTPRoute, backends: Backends) -> Problem | None:
    """The first backendRef that can not be resolved, whether the route is attached or not."""
    for rule in route.rules:
        for backend in rule.backends:
            if found := backends.problem(backend, route.meta.ref.namespace):
                return Problem(RESOLVED_REFS, found[0], f"{backend.field}: {found[1]}")
    return None


def _count_routes(judged: Iterable[_Judged]) -> Counter[ListenerKey]:
    """attachedRoutes: accepted routes, each once for a listener however often it names it."""
    pairs = {
        (each.attachment.route.meta.ref, (each.attachment.gateway.meta.ref, listener.name))
        for each in judged
        if each.problem is None
        for listener, _ in each.attachment.listeners
    }
    return Counter(key for _, key in pairs)


def _route_statuses(judged: Iterable[_Judged]) -> Iterator[Status]:
    of_route: dict[ObjectRef, list[_Judged]] = {}
    for each in judged:
        of_route.setdefault(each.attachment.route.meta.ref, []).append(each)
    for ref, several in of_route.items():
        generation = several[0].attachment.route.meta.generation
        parents = {each.attachment.parent: _parent_status(each, generation) for each in several}
        yield Status(ref, generation, parents=tuple(parents.values()))


def _parent_status(judged: _Judged, generation: int) -> ParentStatus:
    attachment = judged.attachment
    conditions = [_unless(judged.problem, ACCEPTED, generation), _unless(judged.references, RESOLVED_REFS, generation)]
    if judged.invalid and judged.problem is None:
        rules = attachment.route.rules
        found = "; ".join(f"{i}: {problem.message}" for i in judged.invalid if (problem := rules[i].problem))
        message = f"Dropped Rule {found}"
        conditions.append(_true(PARTIALLY_INVALID, generation, message, "UnsupportedValue"))
    elif judged.dropped and judged.problem is None:
        message = f"Dropped Rule {judged.dropped.message}"
        conditions.append(_true(PARTIALLY_INVALID, generation, message, judged.dropped.reason))
    return ParentStatus(attachment.parent, attachment.controller, tuple(conditions))


# --- InferencePools and InferenceModels -------------------------------------------------------------------------------


def _name(pool: ObjectRef) -> PoolName:
    """What routes and models know a pool by: its API group does not count."""
    return pool.namespace, pool.name


def _referrers(judged: Iterable[_Judged], backends: Backends) -> dict[PoolName, dict[ObjectRef, tuple[str, bool]]]:
    """The pools that routes name and may use: by Gateway its controller, and whether one such route is accepted."""
    found: dict[PoolName, dict[ObjectRef, tuple[str, bool]]] = {}
    for each in judged:
        attachment = each.attachment
        namespace, gateway = attachment.route.meta.ref.namespace, attachment.gateway.meta.ref
        for backend in (backend for rule in attachment.route.rules for backend in rule.backends):
            if backend.ref.kind != "InferencePool":
                continue
            problem = backends.problem(backend, namespace)
            if problem is None or problem[0] != "RefNotPermitted":
                of_pool = found.setdefault(_name(backend.ref), {})
                _, is_accepted = of_pool.get(gateway, ("", False))
                of_pool[gateway] = attachment.controller, is_accepted or each.problem is None
    return found


def _pool_status(pool: InferencePool, referrers: Referrers, backends: Backends) -> Status:
    ref, generation = pool.meta.ref, pool.meta.generation
    served = backends.pool(ref)
    parents = []
    for gateway, (controller, is_accepted) in sorted(referrers[_name(ref)].items()):
        accepted = _true(ACCEPTED, generation)
        if served is not None and served is not pool:
            message = f"the InferencePool of {served.meta.ref.group} with the same name is served"
            accepted = _false(ACCEPTED, generation, "NotSupportedByGateway", message)
        elif not is_accepted:
            message = "no HTTPRoute that names it is accepted: see their statuses"
            accepted = _false(ACCEPTED, generation, "HTTPRouteNotAccepted", message)
        resolved = _true(RESOLVED_REFS, generation, OWN_PICKER if pool.extension else "")
        parents.append(ParentStatus(ParentRef(gateway), controller, (accepted, resolved)))
    return Status(ref, generation, parents=tuple(parents))


def _is_named(pool: ObjectRef, referrers: Referrers) -> bool:
    """Whether a Gateway of ours has to do with the pool that an object names."""
    return pool.kind == "InferencePool" and pool.group in POOL_GROUPS and _name(pool) in referrers


def _model_statuses(models: Iterable[OfPool], referrers: Referrers, conflicts: Iterable[Rejection]) -> Iterator[Status]:
    lost: dict[ObjectRef | None, list[Rejection]] = {}
    for rejection in conflicts:
        if rejection.reason == "Conflicted":
            lost.setdefault(rejection.ref, []).append(rejection)
    for each in models:
        if _is_named(each.pool, referrers):
            yield _model_status(each, referrers[_name(each.pool)], lost.get(each.meta.ref, []))


def _model_status(each: OfPool, of_pool: Mapping[ObjectRef, tuple[str, bool]], lost: list[Rejection]) -> Status:
    """Of a rewrite some rules may count where others do not; a name or an objective is one thing."""
    generation = each.meta.generation
    rules = sum(len(set(rule.models)) or 1 for rule in each.rules) if isinstance(each, InferenceModelRewrite) else 1
    problem = Problem.of(ACCEPTED, lost[0]) if lost else None
    if problem and isinstance(each, InferenceModel):
        problem = replace(problem, reason="ModelNameInUse")
    if problem and len(lost) < rules:
        conditions = [_true(ACCEPTED, generation, problem.message)]
    else:
        conditions = [_unless(problem, ACCEPTED, generation)]
    if isinstance(each, InferenceModelRewrite):
        return Status(each.meta.ref, generation, tuple(conditions))
    if problem:
        conditions.append(_false(READY, generation, problem.reason, problem.message))
    elif any(is_accepted for _, is_accepted in of_pool.values()):
        conditions.append(_true(READY, generation))
    else:
        message = f"{each.pool} is not accepted: see its status"
        conditions.append(_false(READY, generation, "PoolNotAccepted", message))
    return Status(each.meta.ref, generation, tuple(conditions))


# --- refused versions -------------------------------------------------------------------------------------------------


def _refused(refused: Refused, *kinds: ConditionType) -> Status:
    meta = refused.object.meta
    return Status(
        meta.ref,
        meta.generation,
        tuple(_false(kind, meta.generation, _reason(refused, kind), refused.message) for kind in kinds),
    )


def _refused_at(refused: Refused, parents: Mapping[ParentRef, str]) -> Status:
    conditions = _refused(refused, ACCEPTED).conditions
    found = tuple(ParentStatus(parent, controller, conditions) for parent, controller in parents.items())
    return Status(refused.object.meta.ref, refused.object.meta.generation, parents=found)


def _reason(refused: Refused, kind: ConditionType) -> str:
    """One of the condition's own: Invalid is none of an HTTPRoute's, where the API lets pass what we do not support."""
    if kind is PROGRAMMED:
        return "Invalid"
    is_unsupported = isinstance(refused.object, HTTPRoute) and refused.reason == "Invalid"
    return "UnsupportedValue" if is_unsupported else refused.reason


def _says_something(status: Status) -> bool:
    return bool(status.conditions or status.parents)
