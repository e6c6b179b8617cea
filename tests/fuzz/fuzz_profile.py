"""The profile file of tsh: arbitrary contents give a profile or ProfileError, in bounded time."""

import time

from error_texts import check_text

from workers.proxy.teleport.profile import Profile, ProfileError, parse_profile

# Per kilobyte, with measuring; the longest that is read then takes some seconds at worst.
_SECONDS_PER_KILOBYTE = 0.5


def check(data: bytes) -> None:
    begin = time.thread_time()
    try:
        profile = parse_profile(data)
    except ProfileError as error:
        check_text(error, limit=2 * len(data) + 500)
    else:
        check_profile(profile)
    assert time.thread_time() - begin < _SECONDS_PER_KILOBYTE * (1 + len(data) / 1024)


def check_profile(profile: Profile) -> None:
    assert profile.web_host
    assert "/" not in profile.web_host
    assert "/" not in profile.user
    assert profile.name not in {"", ".", ".."}
    assert profile.user not in {"", ".", ".."}
    assert profile.cluster
    for place in (
        (profile.web_host, profile.web_port),
        profile.ssh_proxy,
        profile.postgres_proxy,
        profile.mysql_proxy,
    ):
        if place is not None:
            host, port = place
            assert host
            assert 1 <= port <= 65535
    texts = profile.name + profile.user + profile.cluster + profile.address
    # They become file names, server names and lines of the log.
    texts.encode()
    assert "\0" not in profile.name + profile.user
