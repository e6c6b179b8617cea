"""Takes secrets out of text, as the last step before a report is shown or saved. Pure.

VNet puts none in; what other programs and files say is not in its hands.
"""

import re
from typing import Any, Final

HIDDEN: Final = "[hidden]"

_NAMES: Final = r"passwor[dt]|passwd|passphrase|secret|token|cookie|api[-_]?key|totp"
_VALUE: Final = r"\"[^\"\n]*\"?|'[^'\n]*'?|[^\s,;&]+"
_BEGIN, _END = (
    "-----BEGIN [A-Z0-9 ]{0,20}PRIVATE KEY-----",
    "-----END [A-Z0-9 ]{0,20}PRIVATE KEY-----",
)
# All repetitions that could begin anywhere are bounded: long lines must not take long.
_RULES: Final = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), replacement)
    for pattern, replacement in (
        # A key, also one whose end was cut away.
        (rf"{_BEGIN}.*?({_END}|\Z)", HIDDEN),
        (r"otpauth://\S+", HIDDEN),
        # User and password in a URL, up to the last @ of the authority (RFC 3986 section 3.2.1).
        (r"([a-z][a-z0-9+.-]{0,20}://)[^\s/?#]*@", rf"\1{HIDDEN}@"),
        (r"\b((?:proxy-)?authorization|(?:set-)?cookie)\s*:[^\n]*", rf"\1: {HIDDEN}"),
        (rf"\b([a-z0-9_.-]{{0,40}}(?:{_NAMES}))(\"?\s*[=:]\s*)(?:{_VALUE})", rf"\1\2{HIDDEN}"),
        (r"\b(bearer|basic)\s+[a-z0-9._~+/=-]{16,}", rf"\1 {HIDDEN}"),
    )
)


def redact(text: str) -> str:
    """The text without what looks like a secret."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


def plain(text: str) -> str:
    """Without characters that move a terminal's cursor or hide text; line feeds and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def cleaned(value: Any) -> Any:
    """The same tree of dicts and lists with every text redacted and plain."""
    if isinstance(value, str):
        return plain(redact(value))
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    if isinstance(value, dict):
        return {key: cleaned(item) for key, item in value.items()}
    return value
