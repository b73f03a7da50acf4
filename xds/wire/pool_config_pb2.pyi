from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PoolConfig(_message.Message):
    __slots__ = ("name", "costs", "unpicked", "models", "closed", "objectives", "saturation")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    UNPICKED_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVES_FIELD_NUMBER: _ClassVar[int]
    SATURATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    costs: Costs
    unpicked: bool
    models: _containers.RepeatedCompositeFieldContainer[ModelRule]
    closed: bool
    objectives: _containers.RepeatedCompositeFieldContainer[Objective]
    saturation: Saturation
    def __init__(self, name: _Optional[str] = ..., costs: _Optional[_Union[Costs, _Mapping]] = ..., unpicked: _Optional[bool] = ..., models: _Optional[_Iterable[_Union[ModelRule, _Mapping]]] = ..., closed: _Optional[bool] = ..., objectives: _Optional[_Iterable[_Union[Objective, _Mapping]]] = ..., saturation: _Optional[_Union[Saturation, _Mapping]] = ...) -> None: ...

class ModelRule(_message.Message):
    __slots__ = ("name", "targets", "sheddable", "critical")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    SHEDDABLE_FIELD_NUMBER: _ClassVar[int]
    CRITICAL_FIELD_NUMBER: _ClassVar[int]
    name: str
    targets: _containers.RepeatedCompositeFieldContainer[Target]
    sheddable: bool
    critical: bool
    def __init__(self, name: _Optional[str] = ..., targets: _Optional[_Iterable[_Union[Target, _Mapping]]] = ..., sheddable: _Optional[bool] = ..., critical: _Optional[bool] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("name", "weight")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: int
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[int] = ...) -> None: ...

class Objective(_message.Message):
    __slots__ = ("name", "priority")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    name: str
    priority: int
    def __init__(self, name: _Optional[str] = ..., priority: _Optional[int] = ...) -> None: ...

class Saturation(_message.Message):
    __slots__ = ("waiting", "kv_usage")
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    waiting: float
    kv_usage: float
    def __init__(self, waiting: _Optional[float] = ..., kv_usage: _Optional[float] = ...) -> None: ...

class Costs(_message.Message):
    __slots__ = ("output_tokens", "prefill_rate", "request_cost")
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_RATE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_COST_FIELD_NUMBER: _ClassVar[int]
    output_tokens: float
    prefill_rate: float
    request_cost: float
    def __init__(self, output_tokens: _Optional[float] = ..., prefill_rate: _Optional[float] = ..., request_cost: _Optional[float] = ...) -> None: ...
