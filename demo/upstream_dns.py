"""The demo's upstream DNS server: proxy names have addresses, nothing else exists.

It stands for the Internet's DNS. UDP and TCP, RFC 1035.
"""

import asyncio
import logging
from collections.abc import Mapping

from dnslib import AAAA, QTYPE, RCODE, RR, A, DNSError, DNSRecord

log = logging.getLogger(__name__)

TTL_SECONDS = 5
MAX_TCP_QUERIES = 100


def answer(query: bytes, names: Mapping[str, str]) -> bytes | None:
    """The answer to one query, or None for bytes that are none.

    `names` maps lower-case names without the final dot to IPv4 addresses; names below and above
    one exist without records.
    """
    try:
        request = DNSRecord.parse(query)
        question = request.q
        name = str(question.qname).rstrip(".").lower()
    except (DNSError, UnicodeError, ValueError, IndexError):
        return None
    reply = request.reply()
    reply.header.ra = 1
    address = names.get(name)
    if address is not None and question.qtype == QTYPE.A:
        reply.add_answer(RR(question.qname, QTYPE.A, ttl=TTL_SECONDS, rdata=A(address)))
    elif address == "::1" and question.qtype == QTYPE.AAAA:
        reply.add_answer(RR(question.qname, QTYPE.AAAA, ttl=TTL_SECONDS, rdata=AAAA(address)))
    elif address is None and not any(known.endswith("." + name) for known in names):
        reply.header.rcode = RCODE.NXDOMAIN
    packed: bytes = reply.pack()
    return packed


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a datagram endpoint's transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        reply = answer(data, self._names)
        if reply is not None and self._transport is not None:
            self._transport.sendto(reply, addr)


async def serve(address: str, port: int, names: Mapping[str, str]) -> None:
    """Answers on this address until cancelled. Raises OSError when it is taken."""

    async def serve_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for _ in range(MAX_TCP_QUERIES):
                length = int.from_bytes(await reader.readexactly(2), "big")
                reply = answer(await reader.readexactly(length), names)
                if reply is None:
                    break
                writer.write(len(reply).to_bytes(2, "big") + reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            log.debug("a TCP client went away")
        finally:
            writer.close()

    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: _Udp(names), local_addr=(address, port)
    )
    server = await asyncio.start_server(serve_tcp, address, port)
    try:
        await server.serve_forever()
    finally:
        server.close()
        transport.close()
