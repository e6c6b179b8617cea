"""The question and its answer, against the dns worker's own reading and writing."""

import asyncio
import os

from dnslib import DNSRecord
from run_fakes import NETWORK

from supervisor import diagnostic_query
from workers.dns.service import DnsService
from workers.dns.tally import Tally


def nobody() -> bool:
    """Whoever asks may know nothing of VNet's names."""
    return False


def test_answer_is_what_dns_says_byte_for_byte():
    async def main() -> bytes | object:
        service = DnsService(NETWORK, 10, names=None, upstreams=None, tally=Tally({}))
        return service.at_once(asked, 0.0, nobody)

    asked = diagnostic_query.question(os.urandom(diagnostic_query.RANDOM_BYTES))
    assert asyncio.run(main()) == diagnostic_query.answer(asked, NETWORK.dns_ipv4)


def test_question_is_read_by_others_as_meant():
    record = DNSRecord.parse(diagnostic_query.question(bytes(range(10))))
    assert str(record.q.qname) == "vnet-diag-0203040506070809.test."
    assert (record.header.id, record.q.qtype, record.header.rd) == (1, 1, 0)
