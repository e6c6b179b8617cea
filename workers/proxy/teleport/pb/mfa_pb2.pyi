from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChallengeScope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHALLENGE_SCOPE_UNSPECIFIED: _ClassVar[ChallengeScope]
    CHALLENGE_SCOPE_LOGIN: _ClassVar[ChallengeScope]
    CHALLENGE_SCOPE_PASSWORDLESS_LOGIN: _ClassVar[ChallengeScope]
    CHALLENGE_SCOPE_HEADLESS_LOGIN: _ClassVar[ChallengeScope]
    CHALLENGE_SCOPE_MANAGE_DEVICES: _ClassVar[ChallengeScope]
    CHALLENGE_SCOPE_ACCOUNT_RECOVERY: _ClassVar[ChallengeScope]
    CHALLENGE_SCOPE_USER_SESSION: _ClassVar[ChallengeScope]
    CHALLENGE_SCOPE_ADMIN_ACTION: _ClassVar[ChallengeScope]

class ChallengeAllowReuse(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHALLENGE_ALLOW_REUSE_UNSPECIFIED: _ClassVar[ChallengeAllowReuse]
    CHALLENGE_ALLOW_REUSE_YES: _ClassVar[ChallengeAllowReuse]
    CHALLENGE_ALLOW_REUSE_NO: _ClassVar[ChallengeAllowReuse]
CHALLENGE_SCOPE_UNSPECIFIED: ChallengeScope
CHALLENGE_SCOPE_LOGIN: ChallengeScope
CHALLENGE_SCOPE_PASSWORDLESS_LOGIN: ChallengeScope
CHALLENGE_SCOPE_HEADLESS_LOGIN: ChallengeScope
CHALLENGE_SCOPE_MANAGE_DEVICES: ChallengeScope
CHALLENGE_SCOPE_ACCOUNT_RECOVERY: ChallengeScope
CHALLENGE_SCOPE_USER_SESSION: ChallengeScope
CHALLENGE_SCOPE_ADMIN_ACTION: ChallengeScope
CHALLENGE_ALLOW_REUSE_UNSPECIFIED: ChallengeAllowReuse
CHALLENGE_ALLOW_REUSE_YES: ChallengeAllowReuse
CHALLENGE_ALLOW_REUSE_NO: ChallengeAllowReuse

class ChallengeExtensions(_message.Message):
    __slots__ = ("scope", "allow_reuse")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    ALLOW_REUSE_FIELD_NUMBER: _ClassVar[int]
    scope: ChallengeScope
    allow_reuse: ChallengeAllowReuse
    def __init__(self, scope: _Optional[_Union[ChallengeScope, str]] = ..., allow_reuse: _Optional[_Union[ChallengeAllowReuse, str]] = ...) -> None: ...
