"""The virtual hosts of a port -> Envoy's RouteConfiguration (pure).

A route switches on the filters that it needs (see xds/listeners.py): those of the picker for a PREFIX_CACHE pool, or
for models that only the picker can serve as asked. All other routes pass them by.
Where a virtual host matches on the body's model (header X-Gateway-Model-Name), the body has to be read before the route
is known, so all its routes share the filters and those not to be picked opt out of the picker alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import count

from betterproto2 import encode_varint
from envoy_data_plane.envoy.config.core.v3 import (
    DataSource,
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
)
from envoy_data_plane.envoy.config.route.v3 import (
    DirectResponseAction,
    FilterConfig,
    HeaderMatcher,
    QueryParameterMatcher,
    RedirectAction,
    RedirectActionRedirectResponseCode,
    RetryPolicy,
    RetryPolicyRetryBackOff,
    RetryPolicyRetryHostPredicate,
    Route,
    RouteAction,
    RouteActionClusterNotFoundResponseCode,
    RouteActionHashPolicy,
    RouteActionHashPolicyHeader,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
    WeightedCluster,
    WeightedClusterClusterWeight,
)
from envoy_data_plane.envoy.extensions.filters.http.buffer.v3 import BufferPerRoute
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ExtProcPerRoute
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3 import PreviousHostsPredicate
from envoy_data_plane.envoy.type.matcher.v3 import (
    MetadataMatcher,
    MetadataMatcherPathSegment,
    RegexMatchAndSubstitute,
    RegexMatcher,
    StringMatcher,
    ValueMatcher,
)
from envoy_data_plane.google.protobuf import Any

from xds import model
from xds.access_log import debug_headers
from xds.envoy import (
    BODY_LIMIT,
    BUFFER,
    EXT_PROC,
    HEADER_MUTATION,
    HEADER_TO_METADATA,
    JSON_TO_METADATA,
    MODEL_HEADER,
    MODEL_KEY,
    MODEL_NAMESPACE,
    PICK_HEADER,
    SET_FILTER_STATE,
    SWITCHED,
    seconds,
    told_headers,
)
from xds.model import Filters, Forward, MatchType, PathModifier, RequestRedirect, Respond, ValueMatch
from xds.refusals import refused, unnamed

KEPT = 10_000  # encoded routes, some 0.3 KB each: all of a large cluster, so that a change costs what it changes
INVALID_BACKEND = "invalid-backend-ref"  # a cluster that never exists: its share of the requests is answered with 500
UNREAD = "unread-body"  # another one
LLM_IDLE_TIMEOUT = (
    600.0  # seconds without a byte: longer than a full queue and a long prefill, the silent part of an answer
)
# Never after a first byte. `reset` also takes requests a dying pod has begun to compute: the work is done twice, by at
# most RETRIES further pods, instead of an error for the client.
RETRY_ON = "connect-failure,refused-stream,reset,retriable-status-codes"
RETRIES = 2  # further attempts, each at another pod
NO_HEADER = r"(?s).*[\x00-\x08\x0a-\x1f\x7f].*"  # what Envoy refuses in a header's value (RFC 9110, section 5.5)

_ADD = HeaderValueOptionHeaderAppendAction.APPEND_IF_EXISTS_OR_ADD
_SET = HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
_STATUS = {
    301: RedirectActionRedirectResponseCode.MOVED_PERMANENTLY,
    302: RedirectActionRedirectResponseCode.FOUND,
    303: RedirectActionRedirectResponseCode.SEE_OTHER,
    307: RedirectActionRedirectResponseCode.TEMPORARY_REDIRECT,
    308: RedirectActionRedirectResponseCode.PERMANENT_REDIRECT,
}
_WELL_KNOWN = {"http": 80, "https": 443}


def route_configuration(
    name: str, virtual_hosts: Iterable[model.VirtualHost], port: int, *, tls: bool, debug: bool = False
) -> bytes:
    """The encoded RDS resource `name` of a listener's port; hostnames match whatever port the client wrote behind them.

    With `debug` answers have the headers of xds/access_log.py.

    A route takes a millisecond to build and to encode, so what it comes to is kept: a message is its fields one after
    the other, and those of equal routes are copied.
    """
    added = debug_headers() if debug else []
    head = bytes(RouteConfiguration(name=name, ignore_port_in_host_matching=True, response_headers_to_add=added))
    return head + b"".join(part for host in virtual_hosts for part in _field(2, _virtual_host(host, port, tls=tls)))


def _virtual_host(source: model.VirtualHost, port: int, *, tls: bool) -> bytes:
    """An encoded VirtualHost."""
    by_model = any(header.name == MODEL_HEADER for route in source.routes for header in route.match.headers)
    host = VirtualHost(name=source.hostname, domains=[source.hostname])
    if any(isinstance(route.action, Forward) and route.action.llm for route in source.routes):
        host.request_body_buffer_limit = BODY_LIMIT
    if any(isinstance(route.action, Forward) and route.action.refuses for route in source.routes):
        host.routes[:0] = refused()
    if by_model:
        needed = {JSON_TO_METADATA, HEADER_MUTATION}.union(*(_needs(route.action) for route in source.routes))
        host.typed_per_filter_config = _switched_on(needed)
        host.routes.insert(0, _unsendable_model())
    routes = [_routes(route, source.hostname, port, by_model=by_model, tls=tls) for route in source.routes]
    last = bytes(VirtualHost(routes=[_no_match()])) if by_model else b""
    return b"".join([bytes(host), *routes, last])


def _field(number: int, body: bytes) -> tuple[bytes, bytes]:
    """A field that holds a message: its tag and length, and the message."""
    return encode_varint(number << 3 | 2) + encode_varint(len(body)), body


def _no_match() -> Route:
    """Answers 404. Without any route at first sight Envoy would not read the body, and so never find one by its model.

    A route to nowhere: behind a direct response Envoy would read no more than its own 1 MiB of a body.
    """
    action = RouteAction(
        cluster=INVALID_BACKEND, cluster_not_found_response_code=RouteActionClusterNotFoundResponseCode.NOT_FOUND
    )
    return Route(name="no-match", match=RouteMatch(prefix="/"), route=action, typed_per_filter_config=_unasked())


def _unasked() -> dict[str, Any]:
    """Switches the picker off again for one route of a virtual host that has it on."""
    return {
        EXT_PROC: Any.pack(ExtProcPerRoute(disabled=True)),
        BUFFER: Any.pack(BufferPerRoute(disabled=True)),
    }


def _unsendable_model() -> Route:
    """Refuses a model that can be no header: sent on, it would be Envoy's 503, as if a pod had failed."""
    unsendable = _model(StringMatcher(safe_regex=RegexMatcher(regex=NO_HEADER)))
    text = DataSource(inline_string="the model's name has control characters\n")
    return Route(
        name="unsendable-model",
        match=RouteMatch(prefix="/", dynamic_metadata=[unsendable]),
        direct_response=DirectResponseAction(status=400, body=text),
    )


def _needs(action: object) -> set[str]:
    """The filters to be switched on for a route."""
    if not isinstance(action, Forward):
        return set()
    needs = {
        JSON_TO_METADATA: bool(action.renames),
        HEADER_TO_METADATA: bool(action.session_headers) or action.objectives,
        EXT_PROC: action.asked,
        BUFFER: action.asked,
        SET_FILTER_STATE: action.refuses or bool(action.renames),
        HEADER_MUTATION: action.picked,
    }
    return {name for name, needed in needs.items() if needed}


def _switched_on(filters: Collection[str]) -> dict[str, Any]:
    return {name: Any.pack(FilterConfig(config=Any())) for name in SWITCHED if name in filters}


@lru_cache(KEPT)
def _routes(source: model.Route, hostname: str, port: int, *, by_model: bool, tls: bool) -> bytes:
    """The encoded `routes` of a VirtualHost: the route, behind those that answer for it what it is not to send on."""
    routes = [_route(source, hostname, port, by_model=by_model, tls=tls)]
    if isinstance(source.action, Forward):
        matches = (_match(source.match) for _ in count())
        routes[:0] = unnamed(source.name, matches, source.action.renames)
    return bytes(VirtualHost(routes=routes))


def _route(source: model.Route, hostname: str, port: int, *, by_model: bool, tls: bool) -> Route:
    route = Route(name=source.name, match=_match(source.match))
    _modify_headers(route, source.filters)
    match source.action:
        case RequestRedirect() as redirect:
            route.redirect = _redirect(redirect, source.match, hostname, port, tls=tls)
        case Respond(status=status):
            text = f"no valid backend behind route {source.name}\n" if status == 500 else ""
            body = DataSource(inline_string=text) if text else None
            route.direct_response = DirectResponseAction(status=status, body=body)
        case Forward() as forward:
            route.route = _forward(forward, source.match)
    needs = _needs(source.action)
    filters = {} if by_model else _switched_on(needs)
    if by_model and EXT_PROC not in needs:
        filters = _unasked()
    if isinstance(source.action, Forward) and source.action.session_headers:
        filters[HEADER_TO_METADATA] = Any.pack(told_headers(source.action.session_headers))
    if filters:
        route.typed_per_filter_config = filters
    return route


# --- matches ----------------------------------------------------------------------------------------------------------


def _match(source: model.RouteMatch) -> RouteMatch:
    match = RouteMatch()
    path = source.path
    if path.type is MatchType.EXACT:
        match.path = path.value
    elif path.type is MatchType.REGEX:
        match.safe_regex = RegexMatcher(regex=path.value)
    elif _prefix(path.value):
        match.path_separated_prefix = _prefix(path.value)
    else:
        match.prefix = "/"
    if source.method:
        match.headers.append(HeaderMatcher(name=":method", string_match=StringMatcher(exact=source.method)))
    for header in source.headers:
        if header.name == MODEL_HEADER:
            match.dynamic_metadata.append(_model(_value(header)))
        else:
            match.headers.append(HeaderMatcher(name=header.name, string_match=_value(header)))
    match.query_parameters = [QueryParameterMatcher(name=q.name, string_match=_value(q)) for q in source.query]
    return match


def _model(value: StringMatcher) -> MetadataMatcher:
    segments = [MetadataMatcherPathSegment(key=MODEL_KEY)]
    return MetadataMatcher(filter=MODEL_NAMESPACE, path=segments, value=ValueMatcher(string_match=value))


def _value(source: ValueMatch) -> StringMatcher:
    if source.type is MatchType.REGEX:
        return StringMatcher(safe_regex=RegexMatcher(regex=source.value))
    return StringMatcher(exact=source.value)


def _prefix(path: str) -> str:
    """Gateway API's prefixes go by path elements, whatever the trailing slash; "" stands for everything."""
    return path.rstrip("/")


# --- actions ----------------------------------------------------------------------------------------------------------


def _forward(source: Forward, match: model.RouteMatch) -> RouteAction:
    action = RouteAction(
        cluster_not_found_response_code=RouteActionClusterNotFoundResponseCode.INTERNAL_SERVER_ERROR,
    )
    name, _, filters = source.clusters[0]
    if len(source.clusters) == 1 and filters == Filters():
        action.cluster = name
    else:
        action.weighted_clusters = WeightedCluster(clusters=[_share(*share) for share in source.clusters])
    if source.rewrite is not None:
        if source.rewrite.hostname:
            action.host_rewrite_literal = source.rewrite.hostname
        if source.rewrite.path is not None:
            _rewrite_path(action, source.rewrite.path, match)
    timeouts = [source.timeout] if source.timeout is not None else []
    if source.llm:
        action.timeout = seconds(source.timeout or 0)
        action.idle_timeout = seconds(LLM_IDLE_TIMEOUT if source.idle_timeout is None else source.idle_timeout)
        action.retry_policy = _retries(source.backend_timeout)
    else:  # one attempt only, so both of Gateway API's timeouts bound the same thing
        timeouts += [source.backend_timeout] if source.backend_timeout else []
        if timeouts:
            action.timeout = seconds(min((t for t in timeouts if t), default=0))
        if source.idle_timeout is not None:
            action.idle_timeout = seconds(source.idle_timeout)
    if source.picked:
        header = RouteActionHashPolicyHeader(header_name=PICK_HEADER)
        action.hash_policy = [RouteActionHashPolicy(header=header, terminal=True)]
    return action


def _share(name: str, weight: int, filters: Filters) -> WeightedClusterClusterWeight:
    share = WeightedClusterClusterWeight(name=name or INVALID_BACKEND, weight=weight)
    _modify_headers(share, filters)
    return share


def _retries(per_try: float | None) -> RetryPolicy:
    """Retries before the first byte, each at another host: with a hash policy they would all go to the same one."""
    predicate = RetryPolicyRetryHostPredicate(
        name="envoy.retry_host_predicates.previous_hosts", typed_config=Any.pack(PreviousHostsPredicate())
    )
    return RetryPolicy(
        retry_on=RETRY_ON,
        retriable_status_codes=[503],
        num_retries=RETRIES,
        per_try_timeout=seconds(per_try) if per_try else None,
        retry_host_predicate=[predicate],
        host_selection_retry_max_attempts=5,
        retry_back_off=RetryPolicyRetryBackOff(base_interval=seconds(0.025), max_interval=seconds(0.25)),
    )


def _redirect(
    source: RequestRedirect, match: model.RouteMatch, hostname: str, port: int, *, tls: bool
) -> RedirectAction:
    """A redirect on the virtual host `hostname` of listener port `port`, which is HTTPS if `tls`.

    "If redirect scheme is not-empty, the redirect port MUST be the well-known port associated with the redirect
    scheme. [...] If redirect scheme is empty, the redirect port MUST be the Gateway Listener port." The scheme's own
    port "SHOULD NOT" be added to the Location. Without `host_redirect` Envoy keeps the Host header with its port, which
    only an explicit `port_redirect` replaces: there it is left out on port 80 (or 443) alone, where Host has no other.
    """
    host = source.hostname or ("" if hostname.startswith("*") else hostname)
    own = "https" if tls else "http"
    implied = _WELL_KNOWN[source.scheme or own]
    target = source.port or (implied if source.scheme else port)
    action = RedirectAction(
        scheme_redirect=source.scheme or None,
        host_redirect=host,
        port_redirect=0 if target == implied and (host or port == _WELL_KNOWN[own]) else target,
        response_code=_STATUS[source.status],
    )
    if source.path is not None:
        if source.path.full:
            action.path_redirect = _absolute(source.path.value)
        else:
            _rewrite_path(action, source.path, match)
    return action


def _rewrite_path(action: RouteAction | RedirectAction, path: PathModifier, match: model.RouteMatch) -> None:
    """ReplaceFullPath, or ReplacePrefixMatch by path elements: with exactly one slash where the two meet."""
    if path.full:
        action.regex_rewrite = _substitute("^/.*$", _absolute(path.value))
        return
    prefix, replacement = _prefix(match.path.value), _prefix(_absolute(path.value))
    if prefix and replacement:
        action.prefix_rewrite = replacement
    elif prefix:
        action.regex_rewrite = _substitute(f"^{re.escape(prefix)}/*", "/")
    else:
        action.prefix_rewrite = f"{replacement}/"


def _absolute(path: str) -> str:
    return path if path.startswith("/") else f"/{path}"


def _substitute(pattern: str, text: str) -> RegexMatchAndSubstitute:
    return RegexMatchAndSubstitute(pattern=RegexMatcher(regex=pattern), substitution=text.replace("\\", "\\\\"))


# --- headers ----------------------------------------------------------------------------------------------------------


def _modify_headers(target: Route | WeightedClusterClusterWeight, filters: Filters) -> None:
    if filters.request_headers is not None:
        target.request_headers_to_add = list(_options(filters.request_headers))
        target.request_headers_to_remove = list(filters.request_headers.remove)
    if filters.response_headers is not None:
        target.response_headers_to_add = list(_options(filters.response_headers))
        target.response_headers_to_remove = list(filters.response_headers.remove)


def _options(source: model.HeaderModifier) -> Iterable[HeaderValueOption]:
    for pairs, action in ((source.set, _SET), (source.add, _ADD)):
        for name, value in pairs:
            # "%" starts a command operator in Envoy's header values; Gateway API's are literal.
            header = HeaderValue(key=name, value=value.replace("%", "%%"))
            yield HeaderValueOption(header=header, append_action=action, keep_empty_value=True)
