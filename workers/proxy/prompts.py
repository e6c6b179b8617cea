"""Asks the user for second factors: a socket that `vnet mfa` connects to. See `ipc.prompts`.

Nobody but the VNet user and root is listened to. A client that sends nonsense, or does not read what it
is told, is sent away; the others go on.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ipc import prompts as p
from workers.proxy import user_socket
from workers.proxy.teleport import mfa
from workers.proxy.teleport.errors import (
    MfaUnansweredError,
    SignInFailedError,
    TeleportError,
    safe_text,
)
from workers.proxy.teleport.mfa import MfaQuestion, Renew, SignedIn
from workers.proxy.teleport.pb import auth_pb2

log = logging.getLogger(__name__)

# Terminals in which `vnet mfa` runs at the same time.
MAX_CLIENTS = 8
# Each is an app or database that somebody tries to reach right now.
MAX_PROMPTS = 100
# A client that has not read this much never will: all prompts at once.
MAX_UNREAD_BYTES = MAX_PROMPTS * p.MAX_LINE_BYTES
# Each costs a request to the cluster; a user needs one for each time the prompt is taken up.
MAX_RENEWALS = 50
_MAX_TEXT = 500


@dataclass(slots=True, eq=False)
class _Prompt:
    question: MfaQuestion
    renew: Renew
    deadline: float
    answer: asyncio.Future[p.Answer | p.Decline | SignedIn]
    renewing: asyncio.Task[None] | None = None
    renewals: int = field(default=0)

    @property
    def is_open(self) -> bool:
        return not self.answer.done()


class PromptServer:
    """The `Prompter` of a proxy: tells everyone who runs `vnet mfa`; the first answer counts.

    `notify` hears of each prompt once, when it is new.
    """

    def __init__(
        self, directory: Path, slot: str, notify: Callable[[MfaQuestion], None] | None = None
    ) -> None:
        self._path = directory / f"{slot}.sock"
        self._notify = notify
        self._prompts: dict[str, _Prompt] = {}
        self._clients: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._server: asyncio.Server | None = None
        self._inode = (0, 0)  # of the socket: a successor may have put its own in its place

    async def start(self) -> None:
        """Begins to listen. Without a socket, which the log tells, every question is refused."""
        try:
            # In the place of what a dead predecessor left there.
            self._path.unlink(missing_ok=True)
            end = user_socket.listen(self._path, MAX_CLIENTS)
        except OSError as error:
            log.error("%s: vnet mfa cannot reach this proxy: %s", self._path, error)
            return
        self._inode = _inode_of(self._path)
        self._server = await asyncio.start_unix_server(
            self._accepted, sock=end, limit=p.MAX_LINE_BYTES
        )

    @property
    def waiting(self) -> int:
        """How many questions are open."""
        return len(self._prompts)

    def step_aside(self) -> None:
        """Leaves the place of the socket to a successor, and goes on at one beside it."""
        if self._server is None:
            return
        path = self._path.with_name(f"{self._path.stem}{p.LEAVING_ENDING}")
        try:
            if self._inode == _inode_of(self._path):
                self._path.rename(path)
        except OSError as error:
            log.error("%s: vnet mfa cannot reach this proxy any more: %s", path, error)
            return
        self._path = path

    async def close(self) -> None:
        """Ends every conversation and removes the socket; open questions fail."""
        for prompt in self._prompts.values():
            prompt.answer.cancel()
            if prompt.renewing is not None:
                prompt.renewing.cancel()
        if self._server is None:
            return
        # Before the socket is closed: its number is not given to another until then.
        if self._inode == _inode_of(self._path):
            self._path.unlink(missing_ok=True)
        self._server.close()
        tasks = list(self._clients.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._server = None

    # -- for the client of the cluster --

    async def ask(self, question: MfaQuestion, renew: Renew) -> auth_pb2.MFAAuthenticateResponse:
        """See `Prompter`."""
        self._require_room(question)
        loop = asyncio.get_running_loop()
        is_new = question.id not in self._prompts
        prompt = _Prompt(question, renew, loop.time() + question.seconds, loop.create_future())
        self._prompts[question.id] = prompt
        where = f"{question.target} in {question.cluster}"
        log.info("%s waits for a second factor: run vnet mfa", where)
        self._tell(_opened(prompt, loop.time()))
        if is_new and self._notify is not None:
            self._notify(question)
        try:
            async with asyncio.timeout_at(prompt.deadline):
                answer = await prompt.answer
        except TimeoutError as error:
            self.settled(question.id, f"{where}: nobody gave the second factor in time")
            raise MfaUnansweredError(
                f"{where} needs a second factor and nobody gave it in time: run vnet mfa and"
                " connect again"
            ) from error
        except BaseException:
            self.settled(question.id, f"{where}: given up")
            raise
        if isinstance(answer, p.Decline):
            self.settled(question.id, f"{where}: declined")
            raise MfaUnansweredError(f"{where} needs a second factor, and the user declined")
        is_by_browser = not isinstance(answer, p.Answer)
        self._tell(p.PromptAnswered(id=question.id, is_by_browser=is_by_browser))
        if isinstance(answer, SignInFailedError):
            raise answer
        return mfa.response(answer) if isinstance(answer, p.Answer) else answer

    def give(self, question_id: str, outcome: SignedIn) -> None:
        """See `Prompter`."""
        prompt = self._prompts.get(question_id)
        if prompt is not None and prompt.is_open:
            prompt.answer.set_result(outcome)

    def settled(self, question_id: str, outcome: str) -> None:
        """See `Prompter`."""
        prompt = self._prompts.pop(question_id, None)
        if prompt is None:
            return
        if prompt.renewing is not None:
            prompt.renewing.cancel()
        self._tell(p.PromptClosed(id=question_id, outcome=safe_text(outcome, _MAX_TEXT)))

    def _require_room(self, question: MfaQuestion) -> None:
        if self._server is None:
            raise MfaUnansweredError(
                f"{question.target} needs a second factor, and VNet cannot ask for it: the log of"
                " its start says why"
            )
        if question.id not in self._prompts and len(self._prompts) >= MAX_PROMPTS:
            raise MfaUnansweredError(
                f"{question.target} needs a second factor, and {MAX_PROMPTS} others wait for one"
                " already: run vnet mfa"
            )

    # -- for `vnet mfa` --

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        may_answer, uid = user_socket.is_users(writer)
        if not may_answer:
            log.warning("user %s may not answer prompts", uid)
            writer.close()
            return
        if len(self._clients) >= MAX_CLIENTS:
            log.warning("%d programs wait for prompts already", MAX_CLIENTS)
            writer.close()
            return
        task = asyncio.get_running_loop().create_task(self._converse(reader, writer))
        self._clients[writer] = task

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            now = asyncio.get_running_loop().time()
            for prompt in self._prompts.values():
                if prompt.is_open:
                    writer.write(p.encode(_opened(prompt, now)))
            writer.write(p.encode(p.Waiting()))
            while True:
                self._hear(p.decode_from_user(await reader.readuntil(b"\n")))
        except asyncio.IncompleteReadError:
            pass  # it has gone
        except (asyncio.LimitOverrunError, msgspec.MsgspecError, OSError) as error:
            log.warning("a program that answers prompts is sent away: %s", safe_text(str(error)))
        finally:
            del self._clients[writer]
            writer.close()

    def _hear(self, message: p.FromUser) -> None:
        prompt = self._prompts.get(message.id)
        if prompt is None or not prompt.is_open:
            return  # somebody else was faster, or it is too late
        if isinstance(message, p.RenewChallenge):
            self._renew(prompt)
        else:
            prompt.answer.set_result(message)

    def _renew(self, prompt: _Prompt) -> None:
        if prompt.renewing is not None and not prompt.renewing.done():
            return
        if prompt.renewals == MAX_RENEWALS:
            self._tell(_opened(prompt, asyncio.get_running_loop().time()))
        else:
            prompt.renewals += 1
            prompt.renewing = asyncio.get_running_loop().create_task(self._take_renewed(prompt))

    async def _take_renewed(self, prompt: _Prompt) -> None:
        try:
            prompt.question = await prompt.renew()
        except TeleportError as error:
            # The old one may still do.
            log.warning("%s: no new challenge: %s", prompt.question.target, error)
        if prompt.is_open:
            self._tell(_opened(prompt, asyncio.get_running_loop().time()))

    def _tell(self, message: p.FromProxy) -> None:
        line = p.encode(message)
        for writer in list(self._clients):
            if writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
                log.warning("a program that does not read its prompts is sent away")
                writer.transport.abort()
            else:
                writer.write(line)


def _opened(prompt: _Prompt, now: float) -> p.PromptOpened:
    question = prompt.question
    return p.PromptOpened(
        id=question.id,
        target=safe_text(question.target, _MAX_TEXT),
        cluster=safe_text(question.cluster, _MAX_TEXT),
        user=safe_text(question.user, _MAX_TEXT),
        seconds_left=round(max(prompt.deadline - now, 0.0), 3),
        takes_code=question.takes_code,
        webauthn=question.webauthn,
        sso=question.sso,
        problem=safe_text(question.problem, _MAX_TEXT),
    )


def _inode_of(path: Path) -> tuple[int, int]:
    """Device and number of what is at `path`; zeros when nothing is."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return status.st_dev, status.st_ino
