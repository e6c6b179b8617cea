"""Remembered addresses of proxies: fewer look-ups, and no connection lost to a stale one."""

import asyncio
import socket

import pytest

from workers.proxy.proxy_addresses import ProxyAddresses


def info(address, family=socket.AF_INET):
    return (family, socket.SOCK_STREAM, 6, "", (address, 443))


class Resolver:
    """Stands for the loop's getaddrinfo; counts the questions."""

    def __init__(self, monkeypatch, answers):
        self.asked = 0
        self.answers = answers
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self.getaddrinfo)

    async def getaddrinfo(self, host, port, **_options):
        self.asked += 1
        if isinstance(self.answers, OSError):
            raise self.answers
        return self.answers


def test_second_look_up_within_the_time_asks_nobody(monkeypatch):
    async def main():
        resolver = Resolver(monkeypatch, [info("127.0.0.1")])
        known = ProxyAddresses(remembered_seconds=60)
        assert await known.find("proxy.test", 443) == await known.find("proxy.test", 443)
        assert resolver.asked == 1
        assert await known.find("proxy.test", 444)
        assert resolver.asked == 2

    asyncio.run(main())


def test_an_old_answer_is_asked_for_again(monkeypatch):
    async def main():
        resolver = Resolver(monkeypatch, [info("127.0.0.1")])
        known = ProxyAddresses(remembered_seconds=0)
        await known.find("proxy.test", 443)
        await known.find("proxy.test", 443)
        assert resolver.asked == 2

    asyncio.run(main())


def test_families_alternate_and_the_first_choice_stays_first(monkeypatch):
    async def main():
        v6 = [info("::1", socket.AF_INET6), info("::2", socket.AF_INET6)]
        v4 = [info("127.0.0.1"), info("127.0.0.2")]
        Resolver(monkeypatch, [*v6, *v4])
        found = await ProxyAddresses().find("proxy.test", 443)
        assert found == [v6[0], v4[0], v6[1], v4[1]]

    asyncio.run(main())


def test_a_failed_look_up_is_not_remembered(monkeypatch):
    async def main():
        resolver = Resolver(monkeypatch, socket.gaierror(-3, "try again"))
        known = ProxyAddresses()
        with pytest.raises(OSError, match="try again"):
            await known.find("proxy.test", 443)
        resolver.answers = [info("127.0.0.1")]
        assert await known.find("proxy.test", 443)

    asyncio.run(main())


def test_the_oldest_host_makes_room(monkeypatch):
    async def main():
        Resolver(monkeypatch, [info("127.0.0.1")])
        known = ProxyAddresses(remembered_seconds=60, max_hosts=2)
        for name in ("a.test", "b.test", "c.test"):
            await known.find(name, 443)
        assert not known.is_known("a.test", 443)
        assert known.is_known("b.test", 443)
        assert known.is_known("c.test", 443)

    asyncio.run(main())
