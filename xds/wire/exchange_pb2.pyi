from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("picker", "deaf", "node")
    PICKER_FIELD_NUMBER: _ClassVar[int]
    DEAF_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    picker: int
    deaf: bool
    node: str
    def __init__(self, picker: _Optional[int] = ..., deaf: _Optional[bool] = ..., node: _Optional[str] = ...) -> None: ...

class Heard(_message.Message):
    __slots__ = ("others", "batches")
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    others: int
    batches: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, others: _Optional[int] = ..., batches: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("placed",)
    PLACED_FIELD_NUMBER: _ClassVar[int]
    placed: _containers.RepeatedCompositeFieldContainer[Placed]
    def __init__(self, placed: _Optional[_Iterable[_Union[Placed, _Mapping]]] = ...) -> None: ...

class Placed(_message.Message):
    __slots__ = ("pool", "hash_key", "requests", "tokens", "uncached", "prompts")
    POOL_FIELD_NUMBER: _ClassVar[int]
    HASH_KEY_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    UNCACHED_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    pool: str
    hash_key: str
    requests: int
    tokens: int
    uncached: int
    prompts: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, pool: _Optional[str] = ..., hash_key: _Optional[str] = ..., requests: _Optional[int] = ..., tokens: _Optional[int] = ..., uncached: _Optional[int] = ..., prompts: _Optional[_Iterable[bytes]] = ...) -> None: ...
