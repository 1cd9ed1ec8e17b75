# SPDX-License-Identifier: LGPL-2.1-or-later
"""The running instance as takeover sees it: what it says of itself, and how it was started."""

from __future__ import annotations

import contextlib
import os

from upgrader.codes import Code
from upgrader.errors import UpgradeError
from upgrader.protocol.values import Value
from upgrader.protocol.varlink import INTERFACE
from upgrader.protocol.varlink_client import ask
from upgrader.systemd.live_limits import RESTART, LimitKind, Running
from upgrader.systemd.main_command import PER_PROCESS, given_environment
from upgrader.systemd.unit_settings import Settings, is_command_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping
    from typing import Any

    from upgrader.systemd.main_command import MainCommand


class TakeoverError(UpgradeError):
    """The upgrade was not done, for the reason `code`, and the running instance serves on."""

    def __init__(self, message: str, code: Code, *, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.code = code


class Limited(TakeoverError):
    """Something forbids a live upgrade: `kind`."""

    def __init__(self, message: str, kind: LimitKind, *, remedy: str = "") -> None:
        super().__init__(message, Code.LIMIT, remedy=remedy)
        self.kind = kind


def begin_to_describe(sock: socket.socket, path: str) -> OSError | None:
    """Ask the instance at `path` to describe itself, or return why it cannot be asked."""
    try:
        sock.connect(path)
        ask(sock, f"{INTERFACE}.Describe")
    except OSError as error:
        return error
    return None


class RunningInstance(Value):
    """What the running instance says of itself, as far as it matters here."""

    pid: int
    generation: int
    upgrade: str
    """The id of the upgrade that an operator has announced, empty if there is none."""
    expected: bool
    preflight: bool
    changed: bool
    credentials: str
    made_from: Settings
    running: Running

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> RunningInstance:
        """From the answer to Describe; raises TakeoverError if it is not one."""
        try:
            started = answer.get("started", {})
            return cls(
                pid=int(answer["pid"]),
                generation=int(answer["generation"]),
                upgrade=str(answer.get("upgrade") or ""),
                expected=bool(answer["expected"]),
                preflight=bool(answer.get("preflight", answer.get("rehearsal"))),
                changed=bool(answer["changed"]),
                credentials=str(answer["credentials"]),
                made_from=Settings(
                    str(started.get("settings", "")),
                    str(started.get("command", "")),
                    dict(started.get("environment", {})),
                    bool(started.get("direct", True)),
                ),
                running=Running.from_description(answer),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            why = f"the running instance cannot be understood: {type(error).__name__}: {error}"
            raise TakeoverError(why, Code.UNKNOWN) from error

    def was_made_by(
        self, now: Settings, command: Callable[[Mapping[str, str]], MainCommand]
    ) -> bool:
        """Whether it was made from what PID 1 would make a main process from now. If nobody knows what
        PID 1 was asked for then: whether it was started with this command line and environment,
        made of those given to it."""
        if now.differs(self.made_from):
            return False
        if now.command and self.made_from.command:
            return True
        try:
            with open(f"/proc/{self.pid}/cmdline", "rb") as file:
                words = os.fsdecode(file.read()).split("\0")[:-1]
            given = given_environment(self.pid)
        except OSError:
            return False
        wanted = command(given)
        if not is_command_of(words, wanted.path, wanted.arguments):
            return False
        return _shared(given) == _shared(wanted.environment)

    def environment(self, unit: str) -> dict[str, str]:
        """The environment that the running instance was started with, and credentials that the new one
        can read; PID 1 gives none to a control process.

        In a mount namespace of its own they are seen by nobody else: the new process then gets an
        FD of the directory. Raises Limited.
        """
        environment: dict[str, str] = {}
        with contextlib.suppress(OSError):
            environment = given_environment(self.pid)
        environment.pop("CREDENTIALS_DIRECTORY", None)
        directory = self.credentials
        if not directory:
            return environment
        if not directory.startswith("/proc/self/") and os.access(directory, os.R_OK | os.X_OK):
            return {**environment, "CREDENTIALS_DIRECTORY": directory}
        place = f"/proc/{self.pid}"
        there = f"{place}/root{directory}"
        if directory.startswith("/proc/self/"):
            there = place + directory.removeprefix("/proc/self")
        try:
            number = os.open(there, os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:  # the running instance has nothing there, either
            return {**environment, "CREDENTIALS_DIRECTORY": directory}
        except OSError as error:
            why = (
                f"the credentials of the running instance cannot be had: {there}: {error.strerror}"
            )
            raise Limited(why, LimitKind.CREDENTIALS, remedy=RESTART.format(unit=unit)) from error
        os.set_inheritable(number, True)
        return {**environment, "CREDENTIALS_DIRECTORY": f"/proc/self/fd/{number}"}


def _shared(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that is not different in every process."""
    return {n: v for n, v in environment.items() if n not in PER_PROCESS}
