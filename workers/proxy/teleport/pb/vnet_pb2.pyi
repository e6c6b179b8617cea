from workers.proxy.teleport.pb import header_pb2 as _header_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetVnetConfigRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CustomDNSZone(_message.Message):
    __slots__ = ("suffix",)
    SUFFIX_FIELD_NUMBER: _ClassVar[int]
    suffix: str
    def __init__(self, suffix: _Optional[str] = ...) -> None: ...

class VnetConfigSpec(_message.Message):
    __slots__ = ("ipv4_cidr_range", "custom_dns_zones")
    IPV4_CIDR_RANGE_FIELD_NUMBER: _ClassVar[int]
    CUSTOM_DNS_ZONES_FIELD_NUMBER: _ClassVar[int]
    ipv4_cidr_range: str
    custom_dns_zones: _containers.RepeatedCompositeFieldContainer[CustomDNSZone]
    def __init__(self, ipv4_cidr_range: _Optional[str] = ..., custom_dns_zones: _Optional[_Iterable[_Union[CustomDNSZone, _Mapping]]] = ...) -> None: ...

class VnetConfig(_message.Message):
    __slots__ = ("kind", "sub_kind", "version", "metadata", "spec")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUB_KIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    kind: str
    sub_kind: str
    version: str
    metadata: _header_pb2.Metadata
    spec: VnetConfigSpec
    def __init__(self, kind: _Optional[str] = ..., sub_kind: _Optional[str] = ..., version: _Optional[str] = ..., metadata: _Optional[_Union[_header_pb2.Metadata, _Mapping]] = ..., spec: _Optional[_Union[VnetConfigSpec, _Mapping]] = ...) -> None: ...
