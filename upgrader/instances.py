# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asks the instances of a unit over their own sockets; decides nothing and trusts no answer.

The sockets lie in a directory of the service: who answers must be a process of the unit, and what
it says is only taken in the types of `description`.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from upgrader.calling import call, watch
from upgrader.description import Description, Migration, Trial
from upgrader.errors import UpgradeError
from upgrader.rendezvous import DRAINING, SOCKET
from upgrader.systemd.own_unit import unit_of
from upgrader.systemd.unit import Unit
from upgrader.varlink import INTERFACE, VarlinkError

T = TypeVar("T")

#: Seconds to wait for an answer: the socket has a thread of its own.
_PATIENCE = 5.0
_PEERCRED = struct.Struct("3i")


class InstanceError(UpgradeError):
    """An instance cannot be asked, or refuses; `name` is that of its Varlink error, if it has one."""

    def __init__(self, message: str, *, name: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.name = name


def describe(unit: Unit, *, user: bool = False) -> Description:
    """What the instance that serves says of itself; raises InstanceError."""
    return _description(_ask(unit, _directory(unit, user) / SOCKET, "Describe", {}))


def describe_draining(unit: Unit, *, user: bool = False) -> tuple[Description, ...]:
    """What those say that were replaced and have not ended yet, the oldest first.

    Sockets on which nobody answers are those of processes that were killed.
    """
    with contextlib.suppress(InstanceError):
        directory = _directory(unit, user)
        found = []
        for path in sorted(directory.glob(DRAINING.format("*"))):
            with contextlib.suppress(InstanceError):
                found.append(_description(_ask(unit, path, "Describe", {})))
        return tuple(sorted(found, key=lambda each: each.generation))
    return ()


def set_parameters(
    unit: Unit, parameters: Mapping[str, str], *, user: bool = False
) -> dict[str, str]:
    """Set parameters of the instance that serves; returns all that hold then."""
    wanted = {"parameters": dict(parameters)}
    answer = _ask(unit, _directory(unit, user) / SOCKET, "SetParameters", wanted)
    return _typed(answer.get("parameters"), dict[str, str])


def cancel(unit: Unit, *, user: bool = False) -> Migration:
    """Call off the migration under way; returns what became of it."""
    answer = _ask(unit, _directory(unit, user) / SOCKET, "Cancel", {})
    return _typed(answer.get("migration"), Migration)


def execute(unit: Unit, command: Sequence[str] = (), *, user: bool = False) -> None:
    """Have it become another program; raises InstanceError if it cannot, and serves on.

    Waits as long as it takes; what it has become, and whether that serves, PID 1 knows.
    """
    with (
        _connected(unit, _directory(unit, user) / SOCKET) as sock,
        contextlib.suppress(ConnectionResetError),  # an execve(2) answers nothing
    ):
        sock.settimeout(None)
        call(sock, f"{INTERFACE}.Execute", {"command": list(command)})


def expect(unit: Unit, *, user: bool = False) -> None:
    """Have the next reload be an upgrade, even if no file of the program has changed."""
    _ask(unit, _directory(unit, user) / SOCKET, "Expect", {})


def rehearse(unit: Unit, *, user: bool = False) -> None:
    """Have the next reload be a rehearsal, if it begins at once."""
    _ask(unit, _directory(unit, user) / SOCKET, "Rehearse", {})


def try_states(unit: Unit, *, user: bool = False) -> list[Trial]:
    """Have it find out which of its states can be saved as they are now."""
    answer = _ask(unit, _directory(unit, user) / SOCKET, "TryStates", {})
    return _typed(answer.get("trials"), list[Trial])


def phases(unit: Unit, *, timeout: float | None = None, user: bool = False) -> Iterator[Migration]:
    """The migration under way or the last one, then each phase until one has ended.

    Waits at most `timeout` seconds for each, for ever without; raises InstanceError. The instance
    listens from the moment at which this yields for the first time.
    """
    with _connected(unit, _directory(unit, user) / SOCKET) as sock:
        sock.settimeout(timeout)
        for answer in watch(sock, f"{INTERFACE}.QueryMigration"):
            yield _typed(answer.get("migration"), Migration)


def _directory(unit: Unit, user: bool) -> Path:
    """Where the unit's sockets are: the first of RuntimeDirectory=."""
    if not unit.runtime_directories:
        raise InstanceError(
            "it has no RuntimeDirectory=, so its instance has no socket",
            remedy=f"systemctl edit {unit.id}, and below [Service] write RuntimeDirectory=NAME",
        )
    base = os.environ.get("XDG_RUNTIME_DIR", "/run/user/nobody") if user else "/run"
    return Path(base, unit.runtime_directories[0])


def _ask(unit: Unit, path: Path, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    with _connected(unit, path) as sock:
        return call(sock, f"{INTERFACE}.{method}", parameters)


@contextlib.contextmanager
def _connected(unit: Unit, path: Path) -> Iterator[socket.socket]:
    """A connection to a process of this unit; what goes wrong is an InstanceError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_PATIENCE)
            sock.connect(str(path))
            _require_peer(sock, unit)
            yield sock
    except VarlinkError as error:
        words = _WORDS.get(error.name) or ", ".join(map(str, error.parameters.values()))
        raise InstanceError(
            words or error.name, name=error.name, remedy=_REMEDIES.get(error.name, "")
        ) from error
    except PermissionError as error:
        raise InstanceError(
            f"{path} may only be asked by root and by the service's own user",
            name="PermissionDenied",
            remedy="run the command as root, with sudo for instance",
        ) from error
    except FileNotFoundError as error:
        raise InstanceError(f"there is no socket {path}") from error
    except TimeoutError as error:
        raise InstanceError(f"{path}: no answer in time") from error
    except (OSError, ValueError) as error:
        raise InstanceError(f"{path}: {error}") from error


def _require_peer(sock: socket.socket, unit: Unit) -> None:
    """Raise for a listener that is no process of the unit: a name can be put in anybody's way."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, _, _ = _PEERCRED.unpack(credentials)
    with open(f"/proc/{pid}/cgroup", encoding="ascii", errors="replace") as file:
        owner = unit_of(file.read())
    if owner not in unit.names:
        raise InstanceError(f"its socket belongs to process {pid} of {owner or 'no unit'}")


def _description(answer: dict[str, Any]) -> Description:
    return _typed(answer, Description)


def _typed(answer: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise InstanceError(f"its answer cannot be read: {error}") from error


_WORDS = {
    "NothingToCancel": "no upgrade is under way",
    "TooLate": "too late: the new instance had already taken over",
    "PermissionDenied": "it does not allow you to do this",
    "MethodNotFound": "it runs an older version of the library, which cannot do this",
}
_REMEDIES = {
    "PermissionDenied": "run the command as root, with sudo for instance",
    "MethodNotFound": "after the next upgrade it can",
}
