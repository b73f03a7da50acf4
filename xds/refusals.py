"""The answers Envoy gives itself where a pool's models are not to be served as asked (pure).

    refused    the picker answered `refused` in its metadata: an unknown model, or a request shed while the pool is full
    unnamed    the model has to be renamed, and the picker has not said that it looked at it: it is down or late

They are routes: once the body is read and the picker has answered, or failed, `set_filter_state` leaves MARK and lets
Envoy choose the route again. So the picker can only choose among these answers, and without it no name is sent on that
was to be another. Bodies are OpenAI's error JSON, as vLLM's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from envoy_data_plane.envoy.config.core.v3 import HeaderValue, HeaderValueOption, SubstitutionFormatString
from envoy_data_plane.envoy.config.route.v3 import DirectResponseAction, HeaderMatcher, Route, RouteMatch
from envoy_data_plane.envoy.type.matcher.v3 import (
    FilterStateMatcher,
    MetadataMatcher,
    MetadataMatcherPathSegment,
    OrMatcher,
    RegexMatcher,
    StringMatcher,
    ValueMatcher,
)
from envoy_data_plane.google.protobuf import Struct

from xds.envoy import (
    MARK,
    MODEL_KEY,
    MODEL_NAMESPACE,
    NAMED_KEY,
    PICKER_MODEL_KEY,
    PICKER_NAMESPACE,
    REFUSED_KEY,
    UNREAD_KEY,
    UNREADABLE,
)
from xds.model import Renames

RETRY_SHED = 2  # seconds: a scrape interval, before which nothing new is known of the pool
RETRY_UNNAMED = 1  # second: Envoy's health check finds a picker that is back within one


def refused() -> list[Route]:
    """What the picker may refuse on any route of a virtual host; they go before all others."""
    unknown = f"The model `%DYNAMIC_METADATA({PICKER_NAMESPACE}:{PICKER_MODEL_KEY})%` does not exist."
    full = "The model servers are busy, and this request may be refused for more important ones. Try again later."
    return [
        _answer("unknown-model", _refused("404"), 404, unknown, "NotFoundError", "model"),
        _answer("shed", _refused("429"), 429, full, "RateLimitError", retry=RETRY_SHED),
    ]


def unnamed(name: str, matches: Iterator[RouteMatch], renames: Sequence[Renames]) -> list[Route]:
    """What goes before the route `name`, for requests that would reach one of its pools by a name that is not to.

    `matches` gives the route's match, a new one each time. A body that is said to be JSON and that Envoy cannot read
    may have such a name as well.
    """
    routes = []
    for each in renames:
        match = _unnamed(next(matches))
        match.dynamic_metadata += _renamed(each)
        model = f"%DYNAMIC_METADATA({MODEL_NAMESPACE}:{MODEL_KEY})%"
        message = f"The gateway can not give model `{model}` its server's name at the moment. Try again."
        routes.append(_answer(f"{name}/unnamed", match, 503, message, "ServiceUnavailable", "model", RETRY_UNNAMED))
    if routes:
        match = _unnamed(next(matches))
        match.dynamic_metadata.append(_metadata(MODEL_NAMESPACE, UNREAD_KEY, StringMatcher(exact=UNREADABLE)))
        json = StringMatcher(contains="json", ignore_case=True)
        match.headers.append(HeaderMatcher(name="content-type", string_match=json))
        message = "The gateway can not read which model is asked for at the moment. Try again."
        routes.append(_answer(f"{name}/unread", match, 503, message, "ServiceUnavailable", "model", RETRY_UNNAMED))
    return routes


def _refused(code: str) -> RouteMatch:
    return RouteMatch(
        prefix="/", dynamic_metadata=[_metadata(PICKER_NAMESPACE, REFUSED_KEY, StringMatcher(exact=code))]
    )


def _unnamed(match: RouteMatch) -> RouteMatch:
    match.filter_state.append(FilterStateMatcher(key=MARK, string_match=StringMatcher(exact=MARK)))
    match.dynamic_metadata.append(
        MetadataMatcher(
            filter=PICKER_NAMESPACE,
            path=[MetadataMatcherPathSegment(key=NAMED_KEY)],
            value=ValueMatcher(present_match=True),
            invert=True,
        )
    )
    return match


def _renamed(renames: Renames) -> list[MetadataMatcher]:
    """That the body's model is one of those to be renamed."""
    if not renames.others:
        return [_model(renames.names)]
    any_name = StringMatcher(safe_regex=RegexMatcher(regex="(?s).+"))
    found = [_metadata(MODEL_NAMESPACE, MODEL_KEY, any_name)]
    if renames.kept:
        kept = _model(renames.kept)
        kept.invert = True
        found.append(kept)
    return found


def _model(names: Sequence[str]) -> MetadataMatcher:
    values = [ValueMatcher(string_match=StringMatcher(exact=name)) for name in names]
    value = values[0] if len(values) == 1 else ValueMatcher(or_match=OrMatcher(value_matchers=values))
    return MetadataMatcher(filter=MODEL_NAMESPACE, path=[MetadataMatcherPathSegment(key=MODEL_KEY)], value=value)


def _metadata(namespace: str, key: str, value: StringMatcher) -> MetadataMatcher:
    path = [MetadataMatcherPathSegment(key=key)]
    return MetadataMatcher(filter=namespace, path=path, value=ValueMatcher(string_match=value))


def _answer(
    name: str, match: RouteMatch, status: int, message: str, kind: str, param: str | None = None, retry: int = 0
) -> Route:
    error = {"error": {"message": message, "type": kind, "param": param, "code": status}}
    response = DirectResponseAction(
        status=status, body_format=SubstitutionFormatString(json_format=Struct.from_dict(error))
    )
    route = Route(name=name, match=match, direct_response=response)
    if retry:
        header = HeaderValue(key="retry-after", value=str(retry))
        route.response_headers_to_add = [HeaderValueOption(header=header)]
    return route
