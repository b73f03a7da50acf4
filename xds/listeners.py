"""A port -> Envoy's listener (pure). A port of HTTPS has a filter chain for each name, with certificates from SDS.

Every HTTP listener has the same filters whatever its routes are, switched off until a route switches them on: a change
of a listener drains it and cuts running streams, a change of a route does not. In order of work:

    early_header_mutation  drop a client's own x-vllm-* and X-Gateway-Model-Name, before anything can read them
    json_to_metadata       `model` of the body -> metadata, and route again (where routes match on it, or it is renamed)
    header_to_metadata     the pool's session header, and the objective's, -> metadata `request`, for the picker
    ext_proc               the body, complete, to the picker; its answer is metadata `picker`, and a changed body
    buffer                 hold the headers until the body is complete and the picker has answered; set its length
    set_filter_state       that it has answered or failed, and route again: xds/refusals.py
    header_mutation        metadata -> x-vllm-pick (the hash policy's header) and X-Gateway-Model-Name
    router

ext_proc comes after json_to_metadata, so the picker is told the cluster the request will really go to, and before the
filter that holds the headers: answers to a body arrive too late for every other arrangement with one message each way.
header_to_metadata comes after json_to_metadata too: which header it reads is its route's to say.
"""

from __future__ import annotations

from envoy_data_plane.envoy.config.common.mutation_rules.v3 import (
    HeaderMutation,
    HeaderMutationRemoveOnMatch,
    HeaderMutationRules,
)
from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    DataSource,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
    SocketAddress,
    SubstitutionFormatString,
    TransportSocket,
)
from envoy_data_plane.envoy.config.listener.v3 import Filter, FilterChain, FilterChainMatch, Listener, ListenerFilter
from envoy_data_plane.envoy.extensions.filters.common.set_filter_state.v3 import FilterStateValue
from envoy_data_plane.envoy.extensions.filters.http.buffer.v3 import Buffer
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExternalProcessor,
    MetadataOptions,
    MetadataOptionsMetadataNamespaces,
    ProcessingMode,
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)
from envoy_data_plane.envoy.extensions.filters.http.header_mutation.v3 import HeaderMutation as HeaderMutationFilter
from envoy_data_plane.envoy.extensions.filters.http.header_mutation.v3 import Mutations
from envoy_data_plane.envoy.extensions.filters.http.json_to_metadata.v3 import (
    JsonToMetadata,
    JsonToMetadataKeyValuePair,
    JsonToMetadataMatchRules,
    JsonToMetadataRule,
    JsonToMetadataSelector,
)
from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
from envoy_data_plane.envoy.extensions.filters.http.set_filter_state.v3 import Config as SetFilterState
from envoy_data_plane.envoy.extensions.filters.listener.tls_inspector.v3 import TlsInspector
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    HttpConnectionManager,
    HttpConnectionManagerPathWithEscapedSlashesAction,
    HttpFilter,
    Rds,
)
from envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation.v3 import (
    HeaderMutation as EarlyHeaderMutation,
)
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import (
    CommonTlsContext,
    DownstreamTlsContext,
    SdsSecretConfig,
)
from envoy_data_plane.envoy.type.matcher.v3 import RegexMatcher, StringMatcher
from envoy_data_plane.google.protobuf import Any, Value

from xds.access_log import access_log
from xds.envoy import (
    BODY_LIMIT,
    BUFFER,
    EXT_PROC,
    HEADER_MUTATION,
    HEADER_TO_METADATA,
    JSON_TO_METADATA,
    MARK,
    MISSING,
    MODEL_HEADER,
    MODEL_KEY,
    MODEL_NAMESPACE,
    OWN_HEADERS,
    PICK_HEADER,
    PICKER_CLUSTER,
    PICKER_KEY,
    PICKER_NAMESPACE,
    REQUEST_NAMESPACE,
    SET_FILTER_STATE,
    SWITCHED,
    UNREAD_KEY,
    UNREADABLE,
    Options,
    ads,
    listener_name,
    route_tables,
    seconds,
    secret_name,
    told_headers,
    typed,
)
from xds.model import PortListener, TlsChain


def listener(source: PortListener, options: Options) -> Listener:
    """The listener of one port, without any of its routes: they come and go without draining it."""
    name = listener_name(source)
    tables = [table for table, _ in route_tables(source)]
    if source.chains:
        chains = [_tls_chain(name, table, chain, options) for table, chain in zip(tables, source.chains, strict=True)]
    else:
        chains = [FilterChain(filters=[_manager(name, name, options)])]
    inspector = ListenerFilter(name="envoy.filters.listener.tls_inspector", typed_config=Any.pack(TlsInspector()))
    return Listener(
        name=name,
        address=Address(socket_address=SocketAddress(address=options.bind, port_value=source.port)),
        filter_chains=chains,
        listener_filters=[inspector] if source.chains else [],
    )


def _tls_chain(stat_prefix: str, table: str, source: TlsChain, options: Options) -> FilterChain:
    """The chain for the server name (SNI) `source.hostname`: Envoy takes the most specific, and "*" is for the rest."""
    secrets = [SdsSecretConfig(name=secret_name(ref), sds_config=ads()) for ref in source.certificates]
    context = DownstreamTlsContext(
        common_tls_context=CommonTlsContext(
            alpn_protocols=["h2", "http/1.1"], tls_certificate_sds_secret_configs=secrets
        )
    )
    return FilterChain(
        name=source.hostname,
        filter_chain_match=FilterChainMatch(server_names=[] if source.hostname == "*" else [source.hostname]),
        filters=[_manager(stat_prefix, table, options)],
        transport_socket=TransportSocket(name="envoy.transport_sockets.tls", typed_config=Any.pack(context)),
    )


def _manager(stat_prefix: str, table: str, options: Options) -> Filter:
    """The HTTP connection manager that serves the routes `table`."""
    manager = HttpConnectionManager(
        stat_prefix=stat_prefix,
        rds=Rds(config_source=ads(), route_config_name=table),
        http_filters=_filters(options),
        access_log=[access_log()] if options.access_log else [],
        early_header_mutation_extensions=[
            typed(
                "envoy.http.early_header_mutation.header_mutation",
                EarlyHeaderMutation(
                    mutations=[
                        HeaderMutation(
                            remove_on_match=HeaderMutationRemoveOnMatch(
                                key_matcher=StringMatcher(prefix=OWN_HEADERS, ignore_case=True)
                            )
                        ),
                        HeaderMutation(remove=MODEL_HEADER),  # it says what is in the body, or is not there
                    ]
                ),
            )
        ],
        # Envoy's advice for an edge: https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/best_practices/edge
        use_remote_address=True,
        normalize_path=True,
        merge_slashes=True,
        path_with_escaped_slashes_action=HttpConnectionManagerPathWithEscapedSlashesAction.UNESCAPE_AND_REDIRECT,
        request_headers_timeout=seconds(10),
    )
    return Filter(name="envoy.filters.network.http_connection_manager", typed_config=Any.pack(manager))


def _filters(options: Options) -> list[HttpFilter]:
    model_rule = JsonToMetadataRule(
        selectors=[JsonToMetadataSelector(key="model")],
        on_present=JsonToMetadataKeyValuePair(metadata_namespace=MODEL_NAMESPACE, key=MODEL_KEY),
        on_missing=_unread(MISSING),
        on_error=_unread(UNREADABLE),
    )
    model_rules = JsonToMetadataMatchRules(
        rules=[model_rule],
        # Whatever the body is said to be: curl says application/x-www-form-urlencoded.
        allow_content_types_regex=RegexMatcher(regex=".*"),
        allow_empty_content_type=True,
    )
    off = ProcessingModeHeaderSendMode.SKIP
    picker = ExternalProcessor(
        grpc_service=GrpcService(envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=PICKER_CLUSTER)),
        failure_mode_allow=True,
        message_timeout=seconds(options.picker_timeout),
        processing_mode=ProcessingMode(
            request_header_mode=off,
            response_header_mode=off,
            request_body_mode=ProcessingModeBodySendMode.BUFFERED,
            request_trailer_mode=off,
            response_trailer_mode=off,
        ),
        # The length goes, as the picker may change the body, and `buffer` sets it anew: kept, it would be the old one.
        allow_content_length_header=False,
        disable_immediate_response=True,  # what is refused, and how, is Envoy's to say: xds/refusals.py
        mutation_rules=HeaderMutationRules(disallow_all=True),
        metadata_options=MetadataOptions(
            forwarding_namespaces=MetadataOptionsMetadataNamespaces(untyped=[REQUEST_NAMESPACE]),
            receiving_namespaces=MetadataOptionsMetadataNamespaces(untyped=[PICKER_NAMESPACE]),
        ),
        request_attributes=["xds.cluster_name"],
    )
    headers = HeaderMutationFilter(
        mutations=Mutations(
            request_mutations=[
                _from_metadata(PICK_HEADER, PICKER_NAMESPACE, PICKER_KEY),
                _from_metadata(MODEL_HEADER, MODEL_NAMESPACE, MODEL_KEY),
            ]
        )
    )
    answered = FilterStateValue(
        object_key=MARK,
        factory_key="envoy.string",
        format_string=SubstitutionFormatString(text_format_source=DataSource(inline_string=MARK)),
    )
    configs = {
        JSON_TO_METADATA: JsonToMetadata(request_rules=model_rules),
        HEADER_TO_METADATA: told_headers(),  # and the session's, where the route says so
        EXT_PROC: picker,
        BUFFER: Buffer(max_request_bytes=BODY_LIMIT),
        SET_FILTER_STATE: SetFilterState(on_request_headers=[answered], clear_route_cache=True),
        HEADER_MUTATION: headers,
    }
    return [
        *(HttpFilter(name=name, typed_config=Any.pack(configs[name]), disabled=True) for name in SWITCHED),
        HttpFilter(name="envoy.filters.http.router", typed_config=Any.pack(Router())),
    ]


def _unread(why: str) -> JsonToMetadataKeyValuePair:
    return JsonToMetadataKeyValuePair(metadata_namespace=MODEL_NAMESPACE, key=UNREAD_KEY, value=Value(string_value=why))


def _from_metadata(header: str, namespace: str, key: str) -> HeaderMutation:
    """A missing value adds no header: requests without a key must not all hash alike."""
    value = HeaderValue(key=header, value=f"%DYNAMIC_METADATA({namespace}:{key})%")
    action = HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
    return HeaderMutation(append=HeaderValueOption(header=value, append_action=action))
