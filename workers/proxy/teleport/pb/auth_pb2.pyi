import datetime

from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from workers.proxy.teleport.pb import mfa_pb2 as _mfa_pb2
from workers.proxy.teleport.pb import types_pb2 as _types_pb2
from workers.proxy.teleport.pb import webauthn_pb2 as _webauthn_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MFARequired(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MFA_REQUIRED_UNSPECIFIED: _ClassVar[MFARequired]
    MFA_REQUIRED_YES: _ClassVar[MFARequired]
    MFA_REQUIRED_NO: _ClassVar[MFARequired]
MFA_REQUIRED_UNSPECIFIED: MFARequired
MFA_REQUIRED_YES: MFARequired
MFA_REQUIRED_NO: MFARequired

class PingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingResponse(_message.Message):
    __slots__ = ("ClusterName", "ServerVersion", "ProxyPublicAddr", "IsBoring", "RemoteAddr", "LoadAllCAs")
    CLUSTERNAME_FIELD_NUMBER: _ClassVar[int]
    SERVERVERSION_FIELD_NUMBER: _ClassVar[int]
    PROXYPUBLICADDR_FIELD_NUMBER: _ClassVar[int]
    ISBORING_FIELD_NUMBER: _ClassVar[int]
    REMOTEADDR_FIELD_NUMBER: _ClassVar[int]
    LOADALLCAS_FIELD_NUMBER: _ClassVar[int]
    ClusterName: str
    ServerVersion: str
    ProxyPublicAddr: str
    IsBoring: bool
    RemoteAddr: str
    LoadAllCAs: bool
    def __init__(self, ClusterName: _Optional[str] = ..., ServerVersion: _Optional[str] = ..., ProxyPublicAddr: _Optional[str] = ..., IsBoring: _Optional[bool] = ..., RemoteAddr: _Optional[str] = ..., LoadAllCAs: _Optional[bool] = ...) -> None: ...

class GetDomainNameResponse(_message.Message):
    __slots__ = ("DomainName",)
    DOMAINNAME_FIELD_NUMBER: _ClassVar[int]
    DomainName: str
    def __init__(self, DomainName: _Optional[str] = ...) -> None: ...

class ListResourcesRequest(_message.Message):
    __slots__ = ("ResourceType", "Namespace", "Limit", "StartKey", "Labels", "PredicateExpression", "SearchKeywords", "NeedTotalCount", "UseSearchAsRoles", "UsePreviewAsRoles", "IncludeLogins")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RESOURCETYPE_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    STARTKEY_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PREDICATEEXPRESSION_FIELD_NUMBER: _ClassVar[int]
    SEARCHKEYWORDS_FIELD_NUMBER: _ClassVar[int]
    NEEDTOTALCOUNT_FIELD_NUMBER: _ClassVar[int]
    USESEARCHASROLES_FIELD_NUMBER: _ClassVar[int]
    USEPREVIEWASROLES_FIELD_NUMBER: _ClassVar[int]
    INCLUDELOGINS_FIELD_NUMBER: _ClassVar[int]
    ResourceType: str
    Namespace: str
    Limit: int
    StartKey: str
    Labels: _containers.ScalarMap[str, str]
    PredicateExpression: str
    SearchKeywords: _containers.RepeatedScalarFieldContainer[str]
    NeedTotalCount: bool
    UseSearchAsRoles: bool
    UsePreviewAsRoles: bool
    IncludeLogins: bool
    def __init__(self, ResourceType: _Optional[str] = ..., Namespace: _Optional[str] = ..., Limit: _Optional[int] = ..., StartKey: _Optional[str] = ..., Labels: _Optional[_Mapping[str, str]] = ..., PredicateExpression: _Optional[str] = ..., SearchKeywords: _Optional[_Iterable[str]] = ..., NeedTotalCount: _Optional[bool] = ..., UseSearchAsRoles: _Optional[bool] = ..., UsePreviewAsRoles: _Optional[bool] = ..., IncludeLogins: _Optional[bool] = ...) -> None: ...

class PaginatedResource(_message.Message):
    __slots__ = ("DatabaseServer", "AppServer", "Node", "Logins", "RequiresRequest")
    DATABASESERVER_FIELD_NUMBER: _ClassVar[int]
    APPSERVER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    LOGINS_FIELD_NUMBER: _ClassVar[int]
    REQUIRESREQUEST_FIELD_NUMBER: _ClassVar[int]
    DatabaseServer: _types_pb2.DatabaseServerV3
    AppServer: _types_pb2.AppServerV3
    Node: _types_pb2.ServerV2
    Logins: _containers.RepeatedScalarFieldContainer[str]
    RequiresRequest: bool
    def __init__(self, DatabaseServer: _Optional[_Union[_types_pb2.DatabaseServerV3, _Mapping]] = ..., AppServer: _Optional[_Union[_types_pb2.AppServerV3, _Mapping]] = ..., Node: _Optional[_Union[_types_pb2.ServerV2, _Mapping]] = ..., Logins: _Optional[_Iterable[str]] = ..., RequiresRequest: _Optional[bool] = ...) -> None: ...

class ListResourcesResponse(_message.Message):
    __slots__ = ("Resources", "NextKey", "TotalCount")
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    NEXTKEY_FIELD_NUMBER: _ClassVar[int]
    TOTALCOUNT_FIELD_NUMBER: _ClassVar[int]
    Resources: _containers.RepeatedCompositeFieldContainer[PaginatedResource]
    NextKey: str
    TotalCount: int
    def __init__(self, Resources: _Optional[_Iterable[_Union[PaginatedResource, _Mapping]]] = ..., NextKey: _Optional[str] = ..., TotalCount: _Optional[int] = ...) -> None: ...

class ListUnifiedResourcesRequest(_message.Message):
    __slots__ = ("Kinds", "Limit", "StartKey", "Labels", "PredicateExpression", "SearchKeywords", "UseSearchAsRoles", "UsePreviewAsRoles", "PinnedOnly", "IncludeLogins", "IncludeRequestable")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KINDS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    STARTKEY_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PREDICATEEXPRESSION_FIELD_NUMBER: _ClassVar[int]
    SEARCHKEYWORDS_FIELD_NUMBER: _ClassVar[int]
    USESEARCHASROLES_FIELD_NUMBER: _ClassVar[int]
    USEPREVIEWASROLES_FIELD_NUMBER: _ClassVar[int]
    PINNEDONLY_FIELD_NUMBER: _ClassVar[int]
    INCLUDELOGINS_FIELD_NUMBER: _ClassVar[int]
    INCLUDEREQUESTABLE_FIELD_NUMBER: _ClassVar[int]
    Kinds: _containers.RepeatedScalarFieldContainer[str]
    Limit: int
    StartKey: str
    Labels: _containers.ScalarMap[str, str]
    PredicateExpression: str
    SearchKeywords: _containers.RepeatedScalarFieldContainer[str]
    UseSearchAsRoles: bool
    UsePreviewAsRoles: bool
    PinnedOnly: bool
    IncludeLogins: bool
    IncludeRequestable: bool
    def __init__(self, Kinds: _Optional[_Iterable[str]] = ..., Limit: _Optional[int] = ..., StartKey: _Optional[str] = ..., Labels: _Optional[_Mapping[str, str]] = ..., PredicateExpression: _Optional[str] = ..., SearchKeywords: _Optional[_Iterable[str]] = ..., UseSearchAsRoles: _Optional[bool] = ..., UsePreviewAsRoles: _Optional[bool] = ..., PinnedOnly: _Optional[bool] = ..., IncludeLogins: _Optional[bool] = ..., IncludeRequestable: _Optional[bool] = ...) -> None: ...

class ListUnifiedResourcesResponse(_message.Message):
    __slots__ = ("Resources", "NextKey")
    RESOURCES_FIELD_NUMBER: _ClassVar[int]
    NEXTKEY_FIELD_NUMBER: _ClassVar[int]
    Resources: _containers.RepeatedCompositeFieldContainer[PaginatedResource]
    NextKey: str
    def __init__(self, Resources: _Optional[_Iterable[_Union[PaginatedResource, _Mapping]]] = ..., NextKey: _Optional[str] = ...) -> None: ...

class ResolveSSHTargetRequest(_message.Message):
    __slots__ = ("host", "port", "labels", "predicate_expression", "search_keywords")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    PREDICATE_EXPRESSION_FIELD_NUMBER: _ClassVar[int]
    SEARCH_KEYWORDS_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: str
    labels: _containers.ScalarMap[str, str]
    predicate_expression: str
    search_keywords: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, host: _Optional[str] = ..., port: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., predicate_expression: _Optional[str] = ..., search_keywords: _Optional[_Iterable[str]] = ...) -> None: ...

class ResolveSSHTargetResponse(_message.Message):
    __slots__ = ("server",)
    SERVER_FIELD_NUMBER: _ClassVar[int]
    server: _types_pb2.ServerV2
    def __init__(self, server: _Optional[_Union[_types_pb2.ServerV2, _Mapping]] = ...) -> None: ...

class RouteToDatabase(_message.Message):
    __slots__ = ("ServiceName", "Protocol", "Username", "Database", "Roles")
    SERVICENAME_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    USERNAME_FIELD_NUMBER: _ClassVar[int]
    DATABASE_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    ServiceName: str
    Protocol: str
    Username: str
    Database: str
    Roles: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ServiceName: _Optional[str] = ..., Protocol: _Optional[str] = ..., Username: _Optional[str] = ..., Database: _Optional[str] = ..., Roles: _Optional[_Iterable[str]] = ...) -> None: ...

class RouteToWindowsDesktop(_message.Message):
    __slots__ = ("WindowsDesktop", "Login")
    WINDOWSDESKTOP_FIELD_NUMBER: _ClassVar[int]
    LOGIN_FIELD_NUMBER: _ClassVar[int]
    WindowsDesktop: str
    Login: str
    def __init__(self, WindowsDesktop: _Optional[str] = ..., Login: _Optional[str] = ...) -> None: ...

class RouteToApp(_message.Message):
    __slots__ = ("Name", "PublicAddr", "ClusterName", "AWSRoleARN", "AzureIdentity", "GCPServiceAccount", "URI", "TargetPort")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PUBLICADDR_FIELD_NUMBER: _ClassVar[int]
    CLUSTERNAME_FIELD_NUMBER: _ClassVar[int]
    AWSROLEARN_FIELD_NUMBER: _ClassVar[int]
    AZUREIDENTITY_FIELD_NUMBER: _ClassVar[int]
    GCPSERVICEACCOUNT_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    TARGETPORT_FIELD_NUMBER: _ClassVar[int]
    Name: str
    PublicAddr: str
    ClusterName: str
    AWSRoleARN: str
    AzureIdentity: str
    GCPServiceAccount: str
    URI: str
    TargetPort: int
    def __init__(self, Name: _Optional[str] = ..., PublicAddr: _Optional[str] = ..., ClusterName: _Optional[str] = ..., AWSRoleARN: _Optional[str] = ..., AzureIdentity: _Optional[str] = ..., GCPServiceAccount: _Optional[str] = ..., URI: _Optional[str] = ..., TargetPort: _Optional[int] = ...) -> None: ...

class UserCertsRequest(_message.Message):
    __slots__ = ("Username", "Expires", "Format", "RouteToCluster", "AccessRequests", "KubernetesCluster", "RouteToDatabase", "NodeName", "Usage", "RouteToApp", "RoleRequests", "RouteToWindowsDesktop", "UseRoleRequests", "DropAccessRequests", "ConnectionDiagnosticID", "RequesterName", "MFAResponse", "SSHLogin", "Purpose", "SSHPublicKey", "TLSPublicKey", "ReissuableRoleImpersonation")
    class CertUsage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        All: _ClassVar[UserCertsRequest.CertUsage]
        SSH: _ClassVar[UserCertsRequest.CertUsage]
        Kubernetes: _ClassVar[UserCertsRequest.CertUsage]
        Database: _ClassVar[UserCertsRequest.CertUsage]
        App: _ClassVar[UserCertsRequest.CertUsage]
        WindowsDesktop: _ClassVar[UserCertsRequest.CertUsage]
    All: UserCertsRequest.CertUsage
    SSH: UserCertsRequest.CertUsage
    Kubernetes: UserCertsRequest.CertUsage
    Database: UserCertsRequest.CertUsage
    App: UserCertsRequest.CertUsage
    WindowsDesktop: UserCertsRequest.CertUsage
    class Requester(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[UserCertsRequest.Requester]
        TSH_DB_LOCAL_PROXY_TUNNEL: _ClassVar[UserCertsRequest.Requester]
        TSH_KUBE_LOCAL_PROXY: _ClassVar[UserCertsRequest.Requester]
        TSH_KUBE_LOCAL_PROXY_HEADLESS: _ClassVar[UserCertsRequest.Requester]
        TSH_APP_LOCAL_PROXY: _ClassVar[UserCertsRequest.Requester]
        TSH_DB_EXEC: _ClassVar[UserCertsRequest.Requester]
        TSH_APP_AWS_CREDENTIALPROCESS: _ClassVar[UserCertsRequest.Requester]
    UNSPECIFIED: UserCertsRequest.Requester
    TSH_DB_LOCAL_PROXY_TUNNEL: UserCertsRequest.Requester
    TSH_KUBE_LOCAL_PROXY: UserCertsRequest.Requester
    TSH_KUBE_LOCAL_PROXY_HEADLESS: UserCertsRequest.Requester
    TSH_APP_LOCAL_PROXY: UserCertsRequest.Requester
    TSH_DB_EXEC: UserCertsRequest.Requester
    TSH_APP_AWS_CREDENTIALPROCESS: UserCertsRequest.Requester
    class CertPurpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CERT_PURPOSE_UNSPECIFIED: _ClassVar[UserCertsRequest.CertPurpose]
        CERT_PURPOSE_LOGIN_CERTS: _ClassVar[UserCertsRequest.CertPurpose]
        CERT_PURPOSE_SINGLE_USE_CERTS: _ClassVar[UserCertsRequest.CertPurpose]
    CERT_PURPOSE_UNSPECIFIED: UserCertsRequest.CertPurpose
    CERT_PURPOSE_LOGIN_CERTS: UserCertsRequest.CertPurpose
    CERT_PURPOSE_SINGLE_USE_CERTS: UserCertsRequest.CertPurpose
    USERNAME_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    ROUTETOCLUSTER_FIELD_NUMBER: _ClassVar[int]
    ACCESSREQUESTS_FIELD_NUMBER: _ClassVar[int]
    KUBERNETESCLUSTER_FIELD_NUMBER: _ClassVar[int]
    ROUTETODATABASE_FIELD_NUMBER: _ClassVar[int]
    NODENAME_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    ROUTETOAPP_FIELD_NUMBER: _ClassVar[int]
    ROLEREQUESTS_FIELD_NUMBER: _ClassVar[int]
    ROUTETOWINDOWSDESKTOP_FIELD_NUMBER: _ClassVar[int]
    USEROLEREQUESTS_FIELD_NUMBER: _ClassVar[int]
    DROPACCESSREQUESTS_FIELD_NUMBER: _ClassVar[int]
    CONNECTIONDIAGNOSTICID_FIELD_NUMBER: _ClassVar[int]
    REQUESTERNAME_FIELD_NUMBER: _ClassVar[int]
    MFARESPONSE_FIELD_NUMBER: _ClassVar[int]
    SSHLOGIN_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    SSHPUBLICKEY_FIELD_NUMBER: _ClassVar[int]
    TLSPUBLICKEY_FIELD_NUMBER: _ClassVar[int]
    REISSUABLEROLEIMPERSONATION_FIELD_NUMBER: _ClassVar[int]
    Username: str
    Expires: _timestamp_pb2.Timestamp
    Format: str
    RouteToCluster: str
    AccessRequests: _containers.RepeatedScalarFieldContainer[str]
    KubernetesCluster: str
    RouteToDatabase: RouteToDatabase
    NodeName: str
    Usage: UserCertsRequest.CertUsage
    RouteToApp: RouteToApp
    RoleRequests: _containers.RepeatedScalarFieldContainer[str]
    RouteToWindowsDesktop: RouteToWindowsDesktop
    UseRoleRequests: bool
    DropAccessRequests: _containers.RepeatedScalarFieldContainer[str]
    ConnectionDiagnosticID: str
    RequesterName: UserCertsRequest.Requester
    MFAResponse: MFAAuthenticateResponse
    SSHLogin: str
    Purpose: UserCertsRequest.CertPurpose
    SSHPublicKey: bytes
    TLSPublicKey: bytes
    ReissuableRoleImpersonation: bool
    def __init__(self, Username: _Optional[str] = ..., Expires: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., Format: _Optional[str] = ..., RouteToCluster: _Optional[str] = ..., AccessRequests: _Optional[_Iterable[str]] = ..., KubernetesCluster: _Optional[str] = ..., RouteToDatabase: _Optional[_Union[RouteToDatabase, _Mapping]] = ..., NodeName: _Optional[str] = ..., Usage: _Optional[_Union[UserCertsRequest.CertUsage, str]] = ..., RouteToApp: _Optional[_Union[RouteToApp, _Mapping]] = ..., RoleRequests: _Optional[_Iterable[str]] = ..., RouteToWindowsDesktop: _Optional[_Union[RouteToWindowsDesktop, _Mapping]] = ..., UseRoleRequests: _Optional[bool] = ..., DropAccessRequests: _Optional[_Iterable[str]] = ..., ConnectionDiagnosticID: _Optional[str] = ..., RequesterName: _Optional[_Union[UserCertsRequest.Requester, str]] = ..., MFAResponse: _Optional[_Union[MFAAuthenticateResponse, _Mapping]] = ..., SSHLogin: _Optional[str] = ..., Purpose: _Optional[_Union[UserCertsRequest.CertPurpose, str]] = ..., SSHPublicKey: _Optional[bytes] = ..., TLSPublicKey: _Optional[bytes] = ..., ReissuableRoleImpersonation: _Optional[bool] = ...) -> None: ...

class Certs(_message.Message):
    __slots__ = ("SSH", "TLS", "TLSCACerts", "SSHCACerts")
    SSH_FIELD_NUMBER: _ClassVar[int]
    TLS_FIELD_NUMBER: _ClassVar[int]
    TLSCACERTS_FIELD_NUMBER: _ClassVar[int]
    SSHCACERTS_FIELD_NUMBER: _ClassVar[int]
    SSH: bytes
    TLS: bytes
    TLSCACerts: _containers.RepeatedScalarFieldContainer[bytes]
    SSHCACerts: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, SSH: _Optional[bytes] = ..., TLS: _Optional[bytes] = ..., TLSCACerts: _Optional[_Iterable[bytes]] = ..., SSHCACerts: _Optional[_Iterable[bytes]] = ...) -> None: ...

class NodeLogin(_message.Message):
    __slots__ = ("Node", "Login")
    NODE_FIELD_NUMBER: _ClassVar[int]
    LOGIN_FIELD_NUMBER: _ClassVar[int]
    Node: str
    Login: str
    def __init__(self, Node: _Optional[str] = ..., Login: _Optional[str] = ...) -> None: ...

class IsMFARequiredRequest(_message.Message):
    __slots__ = ("KubernetesCluster", "Database", "Node", "WindowsDesktop", "App")
    KUBERNETESCLUSTER_FIELD_NUMBER: _ClassVar[int]
    DATABASE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    WINDOWSDESKTOP_FIELD_NUMBER: _ClassVar[int]
    APP_FIELD_NUMBER: _ClassVar[int]
    KubernetesCluster: str
    Database: RouteToDatabase
    Node: NodeLogin
    WindowsDesktop: RouteToWindowsDesktop
    App: RouteToApp
    def __init__(self, KubernetesCluster: _Optional[str] = ..., Database: _Optional[_Union[RouteToDatabase, _Mapping]] = ..., Node: _Optional[_Union[NodeLogin, _Mapping]] = ..., WindowsDesktop: _Optional[_Union[RouteToWindowsDesktop, _Mapping]] = ..., App: _Optional[_Union[RouteToApp, _Mapping]] = ...) -> None: ...

class IsMFARequiredResponse(_message.Message):
    __slots__ = ("Required", "MFARequired")
    REQUIRED_FIELD_NUMBER: _ClassVar[int]
    MFAREQUIRED_FIELD_NUMBER: _ClassVar[int]
    Required: bool
    MFARequired: MFARequired
    def __init__(self, Required: _Optional[bool] = ..., MFARequired: _Optional[_Union[MFARequired, str]] = ...) -> None: ...

class ContextUser(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Passwordless(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UserCredentials(_message.Message):
    __slots__ = ("Username", "Password")
    USERNAME_FIELD_NUMBER: _ClassVar[int]
    PASSWORD_FIELD_NUMBER: _ClassVar[int]
    Username: str
    Password: bytes
    def __init__(self, Username: _Optional[str] = ..., Password: _Optional[bytes] = ...) -> None: ...

class CreateAuthenticateChallengeRequest(_message.Message):
    __slots__ = ("UserCredentials", "RecoveryStartTokenID", "ContextUser", "Passwordless", "MFARequiredCheck", "ChallengeExtensions", "SSOClientRedirectURL", "ProxyAddress")
    USERCREDENTIALS_FIELD_NUMBER: _ClassVar[int]
    RECOVERYSTARTTOKENID_FIELD_NUMBER: _ClassVar[int]
    CONTEXTUSER_FIELD_NUMBER: _ClassVar[int]
    PASSWORDLESS_FIELD_NUMBER: _ClassVar[int]
    MFAREQUIREDCHECK_FIELD_NUMBER: _ClassVar[int]
    CHALLENGEEXTENSIONS_FIELD_NUMBER: _ClassVar[int]
    SSOCLIENTREDIRECTURL_FIELD_NUMBER: _ClassVar[int]
    PROXYADDRESS_FIELD_NUMBER: _ClassVar[int]
    UserCredentials: UserCredentials
    RecoveryStartTokenID: str
    ContextUser: ContextUser
    Passwordless: Passwordless
    MFARequiredCheck: IsMFARequiredRequest
    ChallengeExtensions: _mfa_pb2.ChallengeExtensions
    SSOClientRedirectURL: str
    ProxyAddress: str
    def __init__(self, UserCredentials: _Optional[_Union[UserCredentials, _Mapping]] = ..., RecoveryStartTokenID: _Optional[str] = ..., ContextUser: _Optional[_Union[ContextUser, _Mapping]] = ..., Passwordless: _Optional[_Union[Passwordless, _Mapping]] = ..., MFARequiredCheck: _Optional[_Union[IsMFARequiredRequest, _Mapping]] = ..., ChallengeExtensions: _Optional[_Union[_mfa_pb2.ChallengeExtensions, _Mapping]] = ..., SSOClientRedirectURL: _Optional[str] = ..., ProxyAddress: _Optional[str] = ...) -> None: ...

class TOTPChallenge(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SSOChallenge(_message.Message):
    __slots__ = ("request_id", "redirect_url", "device")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REDIRECT_URL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    redirect_url: str
    device: _types_pb2.SSOMFADevice
    def __init__(self, request_id: _Optional[str] = ..., redirect_url: _Optional[str] = ..., device: _Optional[_Union[_types_pb2.SSOMFADevice, _Mapping]] = ...) -> None: ...

class MFAAuthenticateChallenge(_message.Message):
    __slots__ = ("TOTP", "WebauthnChallenge", "MFARequired", "SSOChallenge")
    TOTP_FIELD_NUMBER: _ClassVar[int]
    WEBAUTHNCHALLENGE_FIELD_NUMBER: _ClassVar[int]
    MFAREQUIRED_FIELD_NUMBER: _ClassVar[int]
    SSOCHALLENGE_FIELD_NUMBER: _ClassVar[int]
    TOTP: TOTPChallenge
    WebauthnChallenge: _webauthn_pb2.CredentialAssertion
    MFARequired: MFARequired
    SSOChallenge: SSOChallenge
    def __init__(self, TOTP: _Optional[_Union[TOTPChallenge, _Mapping]] = ..., WebauthnChallenge: _Optional[_Union[_webauthn_pb2.CredentialAssertion, _Mapping]] = ..., MFARequired: _Optional[_Union[MFARequired, str]] = ..., SSOChallenge: _Optional[_Union[SSOChallenge, _Mapping]] = ...) -> None: ...

class TOTPResponse(_message.Message):
    __slots__ = ("Code",)
    CODE_FIELD_NUMBER: _ClassVar[int]
    Code: str
    def __init__(self, Code: _Optional[str] = ...) -> None: ...

class SSOResponse(_message.Message):
    __slots__ = ("request_id", "token")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token: str
    def __init__(self, request_id: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...

class MFAAuthenticateResponse(_message.Message):
    __slots__ = ("TOTP", "Webauthn", "SSO")
    TOTP_FIELD_NUMBER: _ClassVar[int]
    WEBAUTHN_FIELD_NUMBER: _ClassVar[int]
    SSO_FIELD_NUMBER: _ClassVar[int]
    TOTP: TOTPResponse
    Webauthn: _webauthn_pb2.CredentialAssertionResponse
    SSO: SSOResponse
    def __init__(self, TOTP: _Optional[_Union[TOTPResponse, _Mapping]] = ..., Webauthn: _Optional[_Union[_webauthn_pb2.CredentialAssertionResponse, _Mapping]] = ..., SSO: _Optional[_Union[SSOResponse, _Mapping]] = ...) -> None: ...
