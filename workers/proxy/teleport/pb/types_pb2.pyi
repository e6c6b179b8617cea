import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Metadata(_message.Message):
    __slots__ = ("Name", "Namespace", "Description", "Labels", "Expires", "Revision")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    Name: str
    Namespace: str
    Description: str
    Labels: _containers.ScalarMap[str, str]
    Expires: _timestamp_pb2.Timestamp
    Revision: str
    def __init__(self, Name: _Optional[str] = ..., Namespace: _Optional[str] = ..., Description: _Optional[str] = ..., Labels: _Optional[_Mapping[str, str]] = ..., Expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., Revision: _Optional[str] = ...) -> None: ...

class CommandLabelV2(_message.Message):
    __slots__ = ("Period", "Command", "Result")
    PERIOD_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    Period: int
    Command: _containers.RepeatedScalarFieldContainer[str]
    Result: str
    def __init__(self, Period: _Optional[int] = ..., Command: _Optional[_Iterable[str]] = ..., Result: _Optional[str] = ...) -> None: ...

class PortRange(_message.Message):
    __slots__ = ("Port", "EndPort")
    PORT_FIELD_NUMBER: _ClassVar[int]
    ENDPORT_FIELD_NUMBER: _ClassVar[int]
    Port: int
    EndPort: int
    def __init__(self, Port: _Optional[int] = ..., EndPort: _Optional[int] = ...) -> None: ...

class AppSpecV3(_message.Message):
    __slots__ = ("URI", "PublicAddr", "DynamicLabels", "InsecureSkipVerify", "Cloud", "Integration", "TCPPorts", "UseAnyProxyPublicAddr")
    class DynamicLabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: CommandLabelV2
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[CommandLabelV2, _Mapping]] = ...) -> None: ...
    URI_FIELD_NUMBER: _ClassVar[int]
    PUBLICADDR_FIELD_NUMBER: _ClassVar[int]
    DYNAMICLABELS_FIELD_NUMBER: _ClassVar[int]
    INSECURESKIPVERIFY_FIELD_NUMBER: _ClassVar[int]
    CLOUD_FIELD_NUMBER: _ClassVar[int]
    INTEGRATION_FIELD_NUMBER: _ClassVar[int]
    TCPPORTS_FIELD_NUMBER: _ClassVar[int]
    USEANYPROXYPUBLICADDR_FIELD_NUMBER: _ClassVar[int]
    URI: str
    PublicAddr: str
    DynamicLabels: _containers.MessageMap[str, CommandLabelV2]
    InsecureSkipVerify: bool
    Cloud: str
    Integration: str
    TCPPorts: _containers.RepeatedCompositeFieldContainer[PortRange]
    UseAnyProxyPublicAddr: bool
    def __init__(self, URI: _Optional[str] = ..., PublicAddr: _Optional[str] = ..., DynamicLabels: _Optional[_Mapping[str, CommandLabelV2]] = ..., InsecureSkipVerify: _Optional[bool] = ..., Cloud: _Optional[str] = ..., Integration: _Optional[str] = ..., TCPPorts: _Optional[_Iterable[_Union[PortRange, _Mapping]]] = ..., UseAnyProxyPublicAddr: _Optional[bool] = ...) -> None: ...

class AppV3(_message.Message):
    __slots__ = ("Kind", "SubKind", "Version", "Metadata", "Spec")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBKIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    Kind: str
    SubKind: str
    Version: str
    Metadata: Metadata
    Spec: AppSpecV3
    def __init__(self, Kind: _Optional[str] = ..., SubKind: _Optional[str] = ..., Version: _Optional[str] = ..., Metadata: _Optional[_Union[Metadata, _Mapping]] = ..., Spec: _Optional[_Union[AppSpecV3, _Mapping]] = ...) -> None: ...

class AppServerSpecV3(_message.Message):
    __slots__ = ("Version", "Hostname", "HostID", "App", "ProxyIDs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    HOSTID_FIELD_NUMBER: _ClassVar[int]
    APP_FIELD_NUMBER: _ClassVar[int]
    PROXYIDS_FIELD_NUMBER: _ClassVar[int]
    Version: str
    Hostname: str
    HostID: str
    App: AppV3
    ProxyIDs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, Version: _Optional[str] = ..., Hostname: _Optional[str] = ..., HostID: _Optional[str] = ..., App: _Optional[_Union[AppV3, _Mapping]] = ..., ProxyIDs: _Optional[_Iterable[str]] = ...) -> None: ...

class AppServerV3(_message.Message):
    __slots__ = ("Kind", "SubKind", "Version", "Metadata", "Spec")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBKIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    Kind: str
    SubKind: str
    Version: str
    Metadata: Metadata
    Spec: AppServerSpecV3
    def __init__(self, Kind: _Optional[str] = ..., SubKind: _Optional[str] = ..., Version: _Optional[str] = ..., Metadata: _Optional[_Union[Metadata, _Mapping]] = ..., Spec: _Optional[_Union[AppServerSpecV3, _Mapping]] = ...) -> None: ...

class ServerSpecV2(_message.Message):
    __slots__ = ("Addr", "Hostname", "CmdLabels", "UseTunnel", "Version", "ProxyIDs", "public_addrs")
    class CmdLabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: CommandLabelV2
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[CommandLabelV2, _Mapping]] = ...) -> None: ...
    ADDR_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    CMDLABELS_FIELD_NUMBER: _ClassVar[int]
    USETUNNEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROXYIDS_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_ADDRS_FIELD_NUMBER: _ClassVar[int]
    Addr: str
    Hostname: str
    CmdLabels: _containers.MessageMap[str, CommandLabelV2]
    UseTunnel: bool
    Version: str
    ProxyIDs: _containers.RepeatedScalarFieldContainer[str]
    public_addrs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, Addr: _Optional[str] = ..., Hostname: _Optional[str] = ..., CmdLabels: _Optional[_Mapping[str, CommandLabelV2]] = ..., UseTunnel: _Optional[bool] = ..., Version: _Optional[str] = ..., ProxyIDs: _Optional[_Iterable[str]] = ..., public_addrs: _Optional[_Iterable[str]] = ...) -> None: ...

class ServerV2(_message.Message):
    __slots__ = ("Kind", "SubKind", "Version", "Metadata", "Spec")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBKIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    Kind: str
    SubKind: str
    Version: str
    Metadata: Metadata
    Spec: ServerSpecV2
    def __init__(self, Kind: _Optional[str] = ..., SubKind: _Optional[str] = ..., Version: _Optional[str] = ..., Metadata: _Optional[_Union[Metadata, _Mapping]] = ..., Spec: _Optional[_Union[ServerSpecV2, _Mapping]] = ...) -> None: ...

class DatabaseSpecV3(_message.Message):
    __slots__ = ("Protocol", "URI")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    Protocol: str
    URI: str
    def __init__(self, Protocol: _Optional[str] = ..., URI: _Optional[str] = ...) -> None: ...

class DatabaseV3(_message.Message):
    __slots__ = ("Kind", "SubKind", "Version", "Metadata", "Spec")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBKIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    Kind: str
    SubKind: str
    Version: str
    Metadata: Metadata
    Spec: DatabaseSpecV3
    def __init__(self, Kind: _Optional[str] = ..., SubKind: _Optional[str] = ..., Version: _Optional[str] = ..., Metadata: _Optional[_Union[Metadata, _Mapping]] = ..., Spec: _Optional[_Union[DatabaseSpecV3, _Mapping]] = ...) -> None: ...

class DatabaseServerSpecV3(_message.Message):
    __slots__ = ("Version", "Hostname", "HostID", "Database", "ProxyIDs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    HOSTID_FIELD_NUMBER: _ClassVar[int]
    DATABASE_FIELD_NUMBER: _ClassVar[int]
    PROXYIDS_FIELD_NUMBER: _ClassVar[int]
    Version: str
    Hostname: str
    HostID: str
    Database: DatabaseV3
    ProxyIDs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, Version: _Optional[str] = ..., Hostname: _Optional[str] = ..., HostID: _Optional[str] = ..., Database: _Optional[_Union[DatabaseV3, _Mapping]] = ..., ProxyIDs: _Optional[_Iterable[str]] = ...) -> None: ...

class DatabaseServerV3(_message.Message):
    __slots__ = ("Kind", "SubKind", "Version", "Metadata", "Spec")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBKIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    Kind: str
    SubKind: str
    Version: str
    Metadata: Metadata
    Spec: DatabaseServerSpecV3
    def __init__(self, Kind: _Optional[str] = ..., SubKind: _Optional[str] = ..., Version: _Optional[str] = ..., Metadata: _Optional[_Union[Metadata, _Mapping]] = ..., Spec: _Optional[_Union[DatabaseServerSpecV3, _Mapping]] = ...) -> None: ...

class RemoteClusterStatusV3(_message.Message):
    __slots__ = ("Connection", "LastHeartbeat")
    CONNECTION_FIELD_NUMBER: _ClassVar[int]
    LASTHEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    Connection: str
    LastHeartbeat: _timestamp_pb2.Timestamp
    def __init__(self, Connection: _Optional[str] = ..., LastHeartbeat: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class RemoteClusterV3(_message.Message):
    __slots__ = ("Kind", "SubKind", "Version", "Metadata", "Status")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBKIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    Kind: str
    SubKind: str
    Version: str
    Metadata: Metadata
    Status: RemoteClusterStatusV3
    def __init__(self, Kind: _Optional[str] = ..., SubKind: _Optional[str] = ..., Version: _Optional[str] = ..., Metadata: _Optional[_Union[Metadata, _Mapping]] = ..., Status: _Optional[_Union[RemoteClusterStatusV3, _Mapping]] = ...) -> None: ...

class SSHKeyPair(_message.Message):
    __slots__ = ("PublicKey",)
    PUBLICKEY_FIELD_NUMBER: _ClassVar[int]
    PublicKey: bytes
    def __init__(self, PublicKey: _Optional[bytes] = ...) -> None: ...

class TLSKeyPair(_message.Message):
    __slots__ = ("Cert",)
    CERT_FIELD_NUMBER: _ClassVar[int]
    Cert: bytes
    def __init__(self, Cert: _Optional[bytes] = ...) -> None: ...

class CAKeySet(_message.Message):
    __slots__ = ("SSH", "TLS")
    SSH_FIELD_NUMBER: _ClassVar[int]
    TLS_FIELD_NUMBER: _ClassVar[int]
    SSH: _containers.RepeatedCompositeFieldContainer[SSHKeyPair]
    TLS: _containers.RepeatedCompositeFieldContainer[TLSKeyPair]
    def __init__(self, SSH: _Optional[_Iterable[_Union[SSHKeyPair, _Mapping]]] = ..., TLS: _Optional[_Iterable[_Union[TLSKeyPair, _Mapping]]] = ...) -> None: ...

class CertAuthoritySpecV2(_message.Message):
    __slots__ = ("Type", "ClusterName", "Roles", "ActiveKeys", "AdditionalTrustedKeys")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    CLUSTERNAME_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    ACTIVEKEYS_FIELD_NUMBER: _ClassVar[int]
    ADDITIONALTRUSTEDKEYS_FIELD_NUMBER: _ClassVar[int]
    Type: str
    ClusterName: str
    Roles: _containers.RepeatedScalarFieldContainer[str]
    ActiveKeys: CAKeySet
    AdditionalTrustedKeys: CAKeySet
    def __init__(self, Type: _Optional[str] = ..., ClusterName: _Optional[str] = ..., Roles: _Optional[_Iterable[str]] = ..., ActiveKeys: _Optional[_Union[CAKeySet, _Mapping]] = ..., AdditionalTrustedKeys: _Optional[_Union[CAKeySet, _Mapping]] = ...) -> None: ...

class CertAuthorityV2(_message.Message):
    __slots__ = ("Kind", "SubKind", "Version", "Metadata", "Spec")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBKIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    Kind: str
    SubKind: str
    Version: str
    Metadata: Metadata
    Spec: CertAuthoritySpecV2
    def __init__(self, Kind: _Optional[str] = ..., SubKind: _Optional[str] = ..., Version: _Optional[str] = ..., Metadata: _Optional[_Union[Metadata, _Mapping]] = ..., Spec: _Optional[_Union[CertAuthoritySpecV2, _Mapping]] = ...) -> None: ...

class SSOMFADevice(_message.Message):
    __slots__ = ("connector_id", "connector_type")
    CONNECTOR_ID_FIELD_NUMBER: _ClassVar[int]
    CONNECTOR_TYPE_FIELD_NUMBER: _ClassVar[int]
    connector_id: str
    connector_type: str
    def __init__(self, connector_id: _Optional[str] = ..., connector_type: _Optional[str] = ...) -> None: ...
