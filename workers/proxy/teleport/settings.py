"""What all profiles share: how the outside is reached, times, bounds."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias

from workers.proxy.teleport.auth_client import AuthApi
from workers.proxy.teleport.cluster import CONFIG_TTL_SECONDS
from workers.proxy.teleport.consulting import GRACE_SECONDS, REMOTE_SECONDS
from workers.proxy.teleport.home import Login
from workers.proxy.teleport.host_addresses import LookUp, look_up
from workers.proxy.teleport.issue_tally import IssueTally
from workers.proxy.teleport.leaves import LIST_TTL_SECONDS
from workers.proxy.teleport.mfa import Prompter
from workers.proxy.teleport.second_factor import PROMPT_SECONDS
from workers.proxy.teleport.sso_callback import Callbacks

Connect: TypeAlias = Callable[[Login, str, tuple[bytes, ...] | None], AuthApi]

# Leaves that are asked at once, of all profiles: for their configuration, and for names that are in
# none of their zones. Each that does not answer keeps its place for some seconds.
MAX_CONFIGS_ASKED = 8
MAX_REMOTE_ASKED = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """What the whole client shares. Times in seconds.

    `connect` makes the client of a cluster's auth service, without I/O: (login, cluster, its host
    authorities or None for those of the login). `environment` names forward proxies. Without a
    `prompter` there are no second factors; `callbacks` is where browsers come back to from single
    sign-on; `tally` counts certificates.
    """

    connect: Connect
    clock: Callable[[], float]  # monotonic
    wall_clock: Callable[[], datetime]  # time zone aware
    ca_file: str = ""
    insecure: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    prompter: Prompter | None = None
    prompt_seconds: float = PROMPT_SECONDS
    callbacks: Callbacks = field(default_factory=Callbacks)
    tally: IssueTally = field(default_factory=IssueTally)
    look_up: LookUp = look_up
    config_seconds: float = CONFIG_TTL_SECONDS
    leaves_seconds: float = LIST_TTL_SECONDS
    app_seconds: float = 60.0
    no_app_seconds: float = 10.0
    # A name must not wait longer than this for clusters of which nothing is known yet.
    first_answer_seconds: float = 3.0
    grace_seconds: float = GRACE_SECONDS
    remote_seconds: float = REMOTE_SECONDS
    # A login that was complete and is not any more is believed when it stays like that.
    settle_seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Crowd:
    """Bounds that all profiles share."""

    configs: asyncio.Semaphore
    remote: asyncio.Semaphore

    @staticmethod
    def new() -> "Crowd":
        """The usual bounds."""
        return Crowd(asyncio.Semaphore(MAX_CONFIGS_ASKED), asyncio.Semaphore(MAX_REMOTE_ASKED))
