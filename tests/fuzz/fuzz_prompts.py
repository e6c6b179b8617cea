"""A line on the socket for second factors, from either side, and the page that a browser opens.

Byte 0 picks the side and whether the rest is the line or tells what to build (`typed_values`).
"""

import ipaddress
from urllib.parse import urlsplit

import msgspec
from byte_choices import Choices
from typed_values import build

from ipc import prompts

SIDES = [
    (prompts.decode_from_proxy, prompts.FromProxy),
    (prompts.decode_from_user, prompts.FromUser),
]


def check(data: bytes) -> None:
    choices = Choices(data)
    kind = choices.below(4)
    decode, whole = SIDES[kind % 2]
    if kind < 2:
        line = choices.rest()
        check_page(line.decode("latin-1"))
    else:
        line = msgspec.json.encode(build(whole, choices))
    try:
        message = decode(line)
    except msgspec.MsgspecError:
        return
    again = prompts.encode(message)
    assert again.endswith(b"\n")
    assert again.count(b"\n") == 1
    assert decode(again) == message
    if isinstance(message, prompts.PromptOpened) and message.sso is not None:
        check_page(message.sso.redirect_url)
        assert not prompts.page_problem(message.sso.redirect_url)


def check_page(url: str) -> None:
    if prompts.page_problem(url):
        return
    parts = urlsplit(url)
    assert url.isascii()
    assert url.isprintable()
    assert " " not in url
    assert parts.scheme in {"http", "https"}
    assert parts.hostname
    assert parts.username is None
    if parts.scheme == "http":
        assert parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname).is_loopback
