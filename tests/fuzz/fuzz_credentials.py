"""PEM files of the tsh home: certificate, private key, authorities.

A line `#` parts the certificate's file from the key's.
"""

import time

from error_texts import check_text

from workers.proxy.teleport.credentials import (
    CredentialError,
    certificate_pem,
    parse_authorities,
    parse_credentials,
    parse_private_key,
    pem_blocks,
)
from workers.proxy.teleport.errors import HardwareKeyError

# With room for the checks of a private key; files have up to a megabyte.
_SECONDS = 2.0


def check(data: bytes) -> None:
    begin = time.thread_time()
    certificate, _, key = data.partition(b"\n#\n")
    blocks = pem_blocks(data)
    assert sum(len(body) for _, body in blocks) <= len(data)
    for label, body in blocks:
        assert label.isascii()
        assert pem_blocks(certificate_pem(body)) == [("CERTIFICATE", body)]
    try:
        found = parse_authorities(certificate)
    except CredentialError:
        assert ("CERTIFICATE" in dict(pem_blocks(certificate))) is False
    else:
        assert found
    try:
        parse_private_key(key)
        credentials = parse_credentials(certificate, key)
    except (CredentialError, HardwareKeyError) as error:
        check_text(error)
    else:
        again = parse_credentials(credentials.certificate, credentials.key)
        assert again == credentials
        assert credentials.key.splitlines()[1].decode() not in repr(credentials)
    assert time.thread_time() - begin < _SECONDS
