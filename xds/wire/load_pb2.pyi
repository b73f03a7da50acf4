from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PoolLoad(_message.Message):
    __slots__ = ("name", "round", "endpoints", "in_flight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    round: int
    endpoints: _containers.RepeatedCompositeFieldContainer[EndpointLoad]
    in_flight: InFlight
    def __init__(self, name: _Optional[str] = ..., round: _Optional[int] = ..., endpoints: _Optional[_Iterable[_Union[EndpointLoad, _Mapping]]] = ..., in_flight: _Optional[_Union[InFlight, _Mapping]] = ...) -> None: ...

class InFlight(_message.Message):
    __slots__ = ("age",)
    AGE_FIELD_NUMBER: _ClassVar[int]
    age: float
    def __init__(self, age: _Optional[float] = ...) -> None: ...

class EndpointLoad(_message.Message):
    __slots__ = ("hash_key", "address", "age", "running", "waiting", "kv_usage", "kv_tokens", "prefill_rate", "start_time", "max_lora", "running_adapters", "waiting_adapters", "in_flight")
    HASH_KEY_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_RATE_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    MAX_LORA_FIELD_NUMBER: _ClassVar[int]
    RUNNING_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    WAITING_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    hash_key: str
    address: str
    age: float
    running: float
    waiting: float
    kv_usage: float
    kv_tokens: int
    prefill_rate: float
    start_time: float
    max_lora: int
    running_adapters: _containers.RepeatedScalarFieldContainer[str]
    waiting_adapters: _containers.RepeatedScalarFieldContainer[str]
    in_flight: int
    def __init__(self, hash_key: _Optional[str] = ..., address: _Optional[str] = ..., age: _Optional[float] = ..., running: _Optional[float] = ..., waiting: _Optional[float] = ..., kv_usage: _Optional[float] = ..., kv_tokens: _Optional[int] = ..., prefill_rate: _Optional[float] = ..., start_time: _Optional[float] = ..., max_lora: _Optional[int] = ..., running_adapters: _Optional[_Iterable[str]] = ..., waiting_adapters: _Optional[_Iterable[str]] = ..., in_flight: _Optional[int] = ...) -> None: ...
