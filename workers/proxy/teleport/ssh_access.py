"""Logins to SSH hosts: whether one needs a second factor, with which certificate, whom to trust.

    IsMFARequired (host, login) --no--> the certificate of the tsh home
                                --yes-> prompt, GenerateUserCerts: a certificate for one login
    GetCertAuthority (host)     ------> host authorities; known_hosts of the home when it cannot be asked

A leaf without a certificate of its own takes the root's, whose user it maps. The keys are those of the
home: a cluster may insist on the kind of key, and only tsh knows which.

Source: `lib/vnet/ssh_provider.go`, `lib/vnet/client_application_service.go`,
`lib/client/cluster_client.go`.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from workers.proxy.teleport.auth_client import AuthApi, timestamp
from workers.proxy.teleport.credentials import CredentialError
from workers.proxy.teleport.errors import (
    NoSshLoginError,
    NotFoundError,
    NotImplementedByClusterError,
    RefusedError,
    TeleportError,
    UnreachableError,
)
from workers.proxy.teleport.home import Login
from workers.proxy.teleport.identity import Identity
from workers.proxy.teleport.issue_tally import IssueTally
from workers.proxy.teleport.pb import auth_pb2
from workers.proxy.teleport.remembered import Remembered
from workers.proxy.teleport.second_factor import Purpose, SecondFactor
from workers.proxy.teleport.single_flight import SingleFlight
from workers.proxy.teleport.ssh_credentials import (
    SshCredentials,
    SshPrivateKey,
    UserCertificate,
    public_line,
    user_certificate,
)
from workers.proxy.teleport.ssh_home import read_authorities, read_certificate, read_key

logger = logging.getLogger(__name__)

# Programs that open many connections at once ask once. A role may change at any time.
REQUIRED_SECONDS: Final = 3.0
MAX_REQUIRED: Final = 1000
# An authority is trusted some time before it signs; so this need not be shorter.
AUTHORITIES_SECONDS: Final = 10.0
PATIENCE_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class SshLogin:
    """Who wants to log in where. `leaf` is empty for the root cluster."""

    host: str
    user: str
    cluster: str
    leaf: str

    @property
    def text(self) -> str:
        """How users are told of it."""
        return f"SSH host {self.host} as {self.user}"


def certificate_request(
    identity: Identity, login: SshLogin, key: SshPrivateKey
) -> auth_pb2.UserCertsRequest:
    """The request for a certificate for one login, without the second factor. Pure."""
    return auth_pb2.UserCertsRequest(
        Username=identity.user,
        Expires=timestamp(identity.not_after),
        RouteToCluster=login.cluster,
        AccessRequests=identity.active_requests,
        NodeName=login.host,
        SSHLogin=login.user,
        Usage=auth_pb2.UserCertsRequest.SSH,
        SSHPublicKey=public_line(key),
    )


def mfa_question(login: SshLogin) -> auth_pb2.IsMFARequiredRequest:
    """Asks the host's cluster whether this login needs a second factor. Pure."""
    return auth_pb2.IsMFARequiredRequest(Node=auth_pb2.NodeLogin(Node=login.host, Login=login.user))


class SshAccess:
    """What logging in to hosts takes, with one login to Teleport. A changed one gets a new object.

    `home` is the tsh home, `root` the auth service of the root cluster.
    """

    def __init__(
        self,
        login: Login,
        home: Path,
        root: AuthApi,
        second_factor: SecondFactor,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], datetime],
        tally: IssueTally | None = None,
    ) -> None:
        assert login.profile is not None
        assert login.credentials is not None
        self._profile = login.profile
        self._identity = login.credentials.identity
        self._home = home
        self._root = root
        self._second_factor = second_factor
        self._clock = clock
        self._wall_clock = wall_clock
        self._tally = tally or IssueTally()
        self._required = OrderedDict[SshLogin, tuple[bool, float]]()
        self._asking = SingleFlight[SshLogin, bool]()
        self._authorities = Remembered[str, tuple[bytes, ...]](
            root.ssh_host_authorities,
            clock=clock,
            positive_seconds=AUTHORITIES_SECONDS,
            negative_seconds=0.0,
            patience_seconds=PATIENCE_SECONDS,
        )

    async def get(self, login: SshLogin, owner: AuthApi) -> SshCredentials:
        """Everything for one login. `owner` is the auth service of the host's cluster.

        Takes as long as the user does; whoever stops waiting takes the question back.

        Raises:
            NoSshLoginError: the home has no key or certificate for SSH, or it has expired.
            MfaRequiredError: a second factor is needed, and was not given or not taken.
            TeleportError: the cluster refuses, or nobody says whom to trust.
        """
        key = await asyncio.to_thread(read_key, self._home, self._profile)
        is_required, authorities = await asyncio.gather(
            self._is_required(login, owner), self._trusted(login.cluster), return_exceptions=True
        )
        if isinstance(is_required, BaseException):
            raise is_required
        if isinstance(authorities, BaseException):
            raise authorities
        if is_required:
            with self._tally.counting("ssh"):
                certificate = await self._certify(login, key)
        else:
            certificate = await self._from_home(login, key)
        return SshCredentials(
            private_key=key,
            certificate=certificate.line,
            host_authorities=authorities,
            host=login.host,
            user=login.user,
            cluster=login.cluster,
        )

    async def _from_home(self, login: SshLogin, key: SshPrivateKey) -> UserCertificate:
        clusters = [login.leaf] if login.leaf else []
        clusters.append(self._identity.root_cluster)
        certificate = await asyncio.to_thread(
            read_certificate, self._home, self._profile, key, clusters
        )
        # Only the end is compared: with a slow local clock every fresh one would seem not yet valid.
        if certificate.not_after is not None and self._wall_clock() >= certificate.not_after:
            raise NoSshLoginError(
                "the SSH certificate of the login has expired: "
                f"run tsh login --proxy={self._profile.address}"
            )
        return certificate

    async def _certify(self, login: SshLogin, key: SshPrivateKey) -> UserCertificate:
        request = certificate_request(self._identity, login, key)
        check = None if login.leaf else mfa_question(login)
        purpose = Purpose(login.text, login.cluster, check=check)
        reply = await self._second_factor.certify(request, purpose)
        try:
            return user_certificate(key, reply.SSH)
        except CredentialError as error:
            raise RefusedError(
                f"the cluster issued an unusable certificate for {login.text}: {error}"
            ) from error

    # -- second factor --

    async def _is_required(self, login: SshLogin, owner: AuthApi) -> bool:
        known, until = self._required.get(login, (False, self._clock()))
        if self._clock() < until:
            return known
        return await self._asking.run(login, lambda: self._ask_required(login, owner))

    async def _ask_required(self, login: SshLogin, owner: AuthApi) -> bool:
        try:
            is_required = await owner.is_mfa_required(mfa_question(login))
        except (NotImplementedByClusterError, NotFoundError):
            # Hosts need not be registered to be reached.
            is_required = False
        except UnreachableError as error:
            # The host itself knows as well, and refuses a certificate without.
            logger.info("%s: nobody says whether it takes a second factor: %s", login.text, error)
            return False
        self._required[login] = is_required, self._clock() + REQUIRED_SECONDS
        self._required.move_to_end(login)
        while len(self._required) > MAX_REQUIRED:
            self._required.popitem(last=False)
        return is_required

    # -- trust --

    async def _trusted(self, cluster: str) -> tuple[bytes, ...]:
        """The host authorities of the cluster, never none.

        What the root says counts alone: an authority that it has dropped is in the file until the
        next login.
        """
        problem = "it names none"
        try:
            if found := await self._authorities.get(cluster):
                return found
        except TeleportError as error:
            problem = str(error)
            logger.debug("known_hosts says whom to trust in %s: %s", cluster, error)
        if found := await asyncio.to_thread(read_authorities, self._home, cluster):
            return found
        raise UnreachableError(
            f"nobody says which hosts of cluster {cluster} to trust ({problem}): "
            f"run tsh login --proxy={self._profile.address}"
        )

    async def close(self) -> None:
        """Ends the questions under way, and forgets the answers."""
        await self._asking.close()
        await self._authorities.close()
        self._required.clear()
