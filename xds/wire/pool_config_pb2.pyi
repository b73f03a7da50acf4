from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PoolConfig(_message.Message):
    __slots__ = ("name", "costs")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    costs: Costs
    def __init__(self, name: _Optional[str] = ..., costs: _Optional[_Union[Costs, _Mapping]] = ...) -> None: ...

class Costs(_message.Message):
    __slots__ = ("output_tokens", "prefill_rate", "request_cost")
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_RATE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_COST_FIELD_NUMBER: _ClassVar[int]
    output_tokens: float
    prefill_rate: float
    request_cost: float
    def __init__(self, output_tokens: _Optional[float] = ..., prefill_rate: _Optional[float] = ..., request_cost: _Optional[float] = ...) -> None: ...
