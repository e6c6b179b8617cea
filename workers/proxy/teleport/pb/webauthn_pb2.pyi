from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CredentialDescriptor(_message.Message):
    __slots__ = ("type", "id")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    type: str
    id: bytes
    def __init__(self, type: _Optional[str] = ..., id: _Optional[bytes] = ...) -> None: ...

class AuthenticationExtensionsClientInputs(_message.Message):
    __slots__ = ("app_id", "cred_props")
    APP_ID_FIELD_NUMBER: _ClassVar[int]
    CRED_PROPS_FIELD_NUMBER: _ClassVar[int]
    app_id: str
    cred_props: bool
    def __init__(self, app_id: _Optional[str] = ..., cred_props: _Optional[bool] = ...) -> None: ...

class PublicKeyCredentialRequestOptions(_message.Message):
    __slots__ = ("challenge", "timeout_ms", "rp_id", "allow_credentials", "extensions", "user_verification")
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    RP_ID_FIELD_NUMBER: _ClassVar[int]
    ALLOW_CREDENTIALS_FIELD_NUMBER: _ClassVar[int]
    EXTENSIONS_FIELD_NUMBER: _ClassVar[int]
    USER_VERIFICATION_FIELD_NUMBER: _ClassVar[int]
    challenge: bytes
    timeout_ms: int
    rp_id: str
    allow_credentials: _containers.RepeatedCompositeFieldContainer[CredentialDescriptor]
    extensions: AuthenticationExtensionsClientInputs
    user_verification: str
    def __init__(self, challenge: _Optional[bytes] = ..., timeout_ms: _Optional[int] = ..., rp_id: _Optional[str] = ..., allow_credentials: _Optional[_Iterable[_Union[CredentialDescriptor, _Mapping]]] = ..., extensions: _Optional[_Union[AuthenticationExtensionsClientInputs, _Mapping]] = ..., user_verification: _Optional[str] = ...) -> None: ...

class CredentialAssertion(_message.Message):
    __slots__ = ("public_key",)
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    public_key: PublicKeyCredentialRequestOptions
    def __init__(self, public_key: _Optional[_Union[PublicKeyCredentialRequestOptions, _Mapping]] = ...) -> None: ...

class AuthenticatorAssertionResponse(_message.Message):
    __slots__ = ("client_data_json", "authenticator_data", "signature", "user_handle")
    CLIENT_DATA_JSON_FIELD_NUMBER: _ClassVar[int]
    AUTHENTICATOR_DATA_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    USER_HANDLE_FIELD_NUMBER: _ClassVar[int]
    client_data_json: bytes
    authenticator_data: bytes
    signature: bytes
    user_handle: bytes
    def __init__(self, client_data_json: _Optional[bytes] = ..., authenticator_data: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., user_handle: _Optional[bytes] = ...) -> None: ...

class AuthenticationExtensionsClientOutputs(_message.Message):
    __slots__ = ("app_id", "cred_props")
    APP_ID_FIELD_NUMBER: _ClassVar[int]
    CRED_PROPS_FIELD_NUMBER: _ClassVar[int]
    app_id: bool
    cred_props: bool
    def __init__(self, app_id: _Optional[bool] = ..., cred_props: _Optional[bool] = ...) -> None: ...

class CredentialAssertionResponse(_message.Message):
    __slots__ = ("type", "raw_id", "response", "extensions")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    RAW_ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    EXTENSIONS_FIELD_NUMBER: _ClassVar[int]
    type: str
    raw_id: bytes
    response: AuthenticatorAssertionResponse
    extensions: AuthenticationExtensionsClientOutputs
    def __init__(self, type: _Optional[str] = ..., raw_id: _Optional[bytes] = ..., response: _Optional[_Union[AuthenticatorAssertionResponse, _Mapping]] = ..., extensions: _Optional[_Union[AuthenticationExtensionsClientOutputs, _Mapping]] = ...) -> None: ...
