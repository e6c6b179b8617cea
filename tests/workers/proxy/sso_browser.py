"""What comes back from single sign-on: the browser's side, and the cluster's encryption."""

import asyncio
import base64
import contextlib
import json
import os
from urllib.parse import parse_qs, urlencode, urlsplit

from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def key_of(url):
    """The key that a cluster finds in a callback URL."""
    (text,) = parse_qs(urlsplit(url).query)["secret_key"]
    return bytes.fromhex(text)


def port_of(url):
    return urlsplit(url).port


def sealed(key, plain=None, *, token="the token"):
    """A `response` as a cluster makes it."""
    nonce = os.urandom(12)
    text = json.dumps({"username": "alice", "mfa_token": token}).encode()
    data = AESGCM(key).encrypt(nonce, text if plain is None else plain, None)
    return json.dumps(
        {"ciphertext": base64.b64encode(data).decode(), "nonce": base64.b64encode(nonce).decode()}
    )


async def exchange(port, request):
    """Status, fields and body of the answer; None if the connection was just closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        answer = b""
        with contextlib.suppress(ConnectionError):
            writer.write(request)
            answer = await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    if not answer:
        return None
    head, _, body = answer.decode().partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), fields, body


async def visit(port, path="/callback", *, method="GET", form=None, **query):
    """What a browser does with the address that it is sent to."""
    target = f"{path}?{urlencode(query)}" if query else path
    body = b"" if form is None else urlencode(form).encode()
    lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{port}"]
    if form is not None:
        lines += [
            "Content-Type: application/x-www-form-urlencoded",
            f"Content-Length: {len(body)}",
        ]
    return await exchange(port, "\r\n".join([*lines, "", ""]).encode() + body)
