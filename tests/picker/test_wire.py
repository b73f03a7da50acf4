"""picker/wire/ext_proc.proto: the subset says the same bytes as Envoy's full messages."""

from envoy_data_plane.envoy.config.core.v3 import Metadata
from envoy_data_plane.envoy.service.ext_proc import v3
from envoy_data_plane.google.protobuf import Struct, Value

from picker.pick import Pick, Reason
from picker.server import FILTER, REQUEST, UNCHANGED, encode_answer
from picker.wire.ext_proc_pb2 import ProcessingRequest, ProcessingResponse


def test_requests() -> None:
    """Envoy's request is read, fields we do not know included, and ours is read by the full message."""
    full = v3.ProcessingRequest(
        request_body=v3.HttpBody(body=b"{}", end_of_stream=True),
        metadata_context=Metadata(
            filter_metadata={REQUEST: Struct(fields={"session": Value(string_value="s1")})},
        ),
        attributes={FILTER: Struct(fields={"xds.cluster_name": Value(string_value="pool/default/qwen")})},
        protocol_config=v3.ProtocolConfiguration(send_body_without_waiting_for_header_response=True),
    )
    subset = ProcessingRequest.FromString(bytes(full))
    assert subset.request_body.body == b"{}"
    assert subset.request_body.end_of_stream
    assert subset.attributes[FILTER].fields["xds.cluster_name"].string_value == "pool/default/qwen"
    assert subset.metadata_context.filter_metadata[REQUEST].fields["session"].string_value == "s1"
    ours = ProcessingRequest(
        request_body=subset.request_body, metadata_context=subset.metadata_context, attributes=subset.attributes
    )
    full.protocol_config = None
    assert ours.SerializeToString(deterministic=True) == bytes(full)
    assert v3.ProcessingRequest.parse(ours.SerializeToString()) == full


def test_headers_are_not_a_body() -> None:
    """A message of another mode has no request_body: it is told apart from an empty one."""
    headers = v3.ProcessingRequest(request_headers=v3.HttpHeaders(end_of_stream=True))
    assert not ProcessingRequest.FromString(bytes(headers)).HasField("request_body")
    empty = v3.ProcessingRequest(request_body=v3.HttpBody())
    assert ProcessingRequest.FromString(bytes(empty)).HasField("request_body")


def test_responses() -> None:
    """The answer is a present, empty BodyResponse, and the key and its reason in dynamic metadata, or none at all."""
    told = Struct(fields={"key": Value(string_value="default/a_0"), "reason": Value(string_value="cost")})
    full = v3.ProcessingResponse(
        request_body=v3.BodyResponse(), dynamic_metadata=Struct(fields={"picker": Value(struct_value=told)})
    )
    assert encode_answer(Pick("default/a_0", Reason.COST)) == bytes(full)
    assert v3.ProcessingResponse.parse(encode_answer(Pick("default/a_0", Reason.COST))) == full
    assert UNCHANGED == bytes(v3.ProcessingResponse(request_body=v3.BodyResponse())) == b"\x1a\x00"
    assert ProcessingResponse.FromString(bytes(full)).SerializeToString(deterministic=True) == bytes(full)


def test_a_changed_body() -> None:
    """The body, and that the name was looked at; a refusal changes no body."""
    mutation = v3.BodyResponse(response=v3.CommonResponse(body_mutation=v3.BodyMutation(body=b"{}")))
    told = Struct(fields={"named": Value(bool_value=True), "reason": Value(string_value="unpicked")})
    full = v3.ProcessingResponse(
        request_body=mutation, dynamic_metadata=Struct(fields={"picker": Value(struct_value=told)})
    )
    answer = encode_answer(Pick(None, Reason.UNPICKED, body=b"{}", named=True))
    assert v3.ProcessingResponse.parse(answer) == full
    assert v3.ProcessingResponse.parse(answer).to_dict() == full.to_dict()
    refusal = v3.ProcessingResponse.parse(encode_answer(Pick(None, Reason.SHED, model="m" * 999, refused=429)))
    assert refusal.to_dict() == {
        "requestBody": {},
        "dynamicMetadata": {"picker": {"reason": "shed", "refused": "429", "model": "m" * 256}},
    }
