# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ask the instances of a unit over their own sockets, and trust no answer.

The sockets lie in a directory of the service: who answers must be a process of the unit, and what
it says is only taken in the types of `varlink_types`. Each question has one deadline, in which the
whole answer must have come.
"""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from upgrader.codes import Code
from upgrader.errors import UpgradeError
from upgrader.protocol.phase import Phase
from upgrader.protocol.rendezvous import (
    DRAINING,
    SOCKET,
    STATUS_SOCKET,
    socket_name,
    socket_path,
)
from upgrader.protocol.status_text import Origin, Status
from upgrader.protocol.systemd_syntax import LONGEST
from upgrader.protocol.varlink import INTERFACE, VarlinkError
from upgrader.protocol.varlink_client import call, watch
from upgrader.protocol.varlink_types import Description, Last, Migration, Trial
from upgrader.systemd.cgroup import unit_of
from upgrader.systemd.main_command import given_environment
from upgrader.systemd.unit import Unit
from upgrader.tool.at_once import at_once
from upgrader.tool.systemd_client import Systemd

T = TypeVar("T")

#: Seconds to wait for an answer: the socket has a thread of its own.
_PATIENCE = 5.0
#: Instances that drain which are asked, the newest; their sockets are names in a directory of the service.
_DRAINING_ASKED = 16
_AGAIN = 0.02
_PEERCRED = struct.Struct("3i")
_TIMEVAL = struct.Struct("ll")


#: Names of the errors for a socket that this user may not use, for one that does not exist, for one
#: that an instance has left, and for one on which no answer has come in time, or none that can be read.
DENIED = "PermissionDenied"
NOBODY = "Nobody"
LEFT = "Left"
SILENT = "Silent"


class InstanceError(UpgradeError):
    """An instance cannot be asked, or refuses; `name` is that of its Varlink error, if it has one, and
    `code` why it refuses."""

    def __init__(
        self, message: str, *, name: str = "", remedy: str = "", code: Code | None = None
    ) -> None:
        super().__init__(message, remedy=remedy, code=code)
        self.name = name


def deadline() -> float:
    """Until when an answer that is asked for now must have come, of `time.monotonic`."""
    return time.monotonic() + _PATIENCE


def describe(
    unit: Unit, *, pid: int = 0, until: float | None = None, user: bool = False
) -> Description:
    """What the instance that serves says of itself, or the part of it that everybody may know, if
    this user may know no more; raises InstanceError, also if another process than `pid` answers.

    `until`: as `deadline`, of which it is the usual value.
    """
    until = until or deadline()
    try:
        return _description(_ask(unit, _place(unit, user), "Describe", {}, pid, until))
    except InstanceError as error:
        directory = _directory(unit, user)
        if error.name != DENIED or directory is None:
            raise
        try:
            place = str(directory / STATUS_SOCKET)
            return _description(_ask(unit, place, "Describe", {}, pid, until))
        except InstanceError as other:
            # An older library has no such socket, or the directory is for others.
            raise error if other.name in (NOBODY, DENIED) else other from error


def introduced(systemd: Systemd, unit: Unit, seconds: float) -> Description | None:
    """What the main process says, which has its socket a little later than PID 1 knows it; None if
    it has said nothing after `seconds`, or does not serve."""
    end = time.monotonic() + seconds
    pid = unit.main_pid
    while unit.serves and unit.main_pid == pid:
        with contextlib.suppress(InstanceError):
            return describe(unit, pid=pid, user=systemd.user)
        if time.monotonic() > end:
            break
        time.sleep(_AGAIN)
        unit = systemd.unit(unit.id)
    return None


def status(said: Description) -> Status:
    """How an instance came to be. One of interface 1 says that of its last migration only."""
    refused, loaded = said.refused.reason, said.loaded
    if said.interface > 1:
        return Status(
            said.generation, _origin(loaded.origin), loaded.source or None, loaded.fds,
            loaded.bytes, loaded.left_behind, loaded.set_aside or None, loaded.pause or None,
            refused, said.library, tuple(loaded.dropped), tuple(loaded.unsaved),
            loaded.datagrams_lost,
        )  # fmt: skip
    last = said.migration
    if last.phase is Phase.NONE:
        return Status(said.generation, Origin.COLD)
    if last.phase is Phase.DONE and last.destination == said.generation:
        return Status(
            said.generation, _origin(last.mode), last.source, last.fds, last.bytes,
            last.left_behind, pause=last.pause or None, library=said.library,
        )  # fmt: skip
    return Status(said.generation, Origin.UNKNOWN, refused=last.reason, library=said.library)


def last_upgrade(said: Description) -> Migration:
    """The last upgrade that was done or has failed, and was no preflight; `mode` is empty if there was
    none. An older library says of its last migration only whether it was a preflight that passed."""
    if said.last_upgrade.mode:
        return said.last_upgrade
    last = said.migration
    known = last.phase in (Phase.DONE, Phase.FAILED) and not last.preflight
    return last if known else Migration()


def _origin(text: str) -> Origin:
    return Origin(text) if text in list(Origin) else Origin.UNKNOWN


def describe_draining(unit: Unit, *, user: bool = False) -> tuple[Description, ...]:
    """What those say that were replaced and have not ended yet, the oldest first.

    Sockets on which nobody answers are those of processes that were killed. All are asked at once.
    """
    return still_draining(at_once(ask_draining(unit, deadline(), user=user)))


def ask_draining(
    unit: Unit, until: float, *, user: bool = False
) -> list[Callable[[], Description | None]]:
    """The questions to them, one each, for `at_once`; `until` as `deadline`."""
    directory = _directory(unit, user)
    paths = directory.glob(DRAINING.format("*")) if directory else ()
    newest = sorted(paths, key=_number)[-_DRAINING_ASKED:]
    return [partial(_of_draining, unit, str(path), until) for path in newest]


def still_draining(answers: Iterable[Description | None]) -> tuple[Description, ...]:
    """Those that have answered, the oldest first."""
    return tuple(sorted((each for each in answers if each), key=lambda each: each.generation))


def _of_draining(unit: Unit, path: str, until: float) -> Description | None:
    with contextlib.suppress(InstanceError):
        return _description(_ask(unit, path, "Describe", {}, 0, until))
    return None


def _number(path: Path) -> tuple[int, str]:
    """The generation in the name of a socket, as a key to sort by."""
    digits = "".join(each for each in path.name if each in "0123456789")
    return len(digits), digits


def set_parameters(
    unit: Unit, parameters: Mapping[str, str], *, user: bool = False
) -> dict[str, str]:
    """Set parameters of the instance that serves; returns all that hold then."""
    wanted = {"parameters": dict(parameters)}
    answer = _ask(unit, _place(unit, user), "SetParameters", wanted)
    return _typed(answer.get("parameters"), dict[str, str])


def cancel(unit: Unit, *, user: bool = False) -> Migration:
    """Call off the migration under way; returns what became of it."""
    answer = _ask(unit, _place(unit, user), "Cancel", {})
    return _typed(answer.get("migration"), Migration)


def execute(
    unit: Unit,
    command: Sequence[str] = (),
    *,
    upgrade: str = "",
    timeout: float | None = None,
    user: bool = False,
) -> None:
    """Have it become another program; raises InstanceError if it cannot, and serves on, or is SILENT.

    Waits `timeout` seconds, or as long as it takes; what it has become, and whether that serves,
    PID 1 knows.
    """
    with (
        _connected(unit, _place(unit, user)) as sock,
        contextlib.suppress(ConnectionResetError),  # an execve(2) answers nothing
    ):
        sock.settimeout(timeout)
        call(sock, f"{INTERFACE}.Execute", {"command": list(command), "upgrade": upgrade})


def expect(unit: Unit, upgrade: str, *, user: bool = False) -> None:
    """Have the next reload be the upgrade of that id, even if no file of the program has changed."""
    _ask(unit, _place(unit, user), "Expect", {"upgrade": upgrade})


def preflight(unit: Unit, upgrade: str, *, interface: int, user: bool = False) -> None:
    """Have the next reload be a preflight, if it begins at once; `interface`: of the instance."""
    method = "Preflight" if interface > 1 else "Rehearse"
    _ask(unit, _place(unit, user), method, {"upgrade": upgrade})


def withdraw(unit: Unit, upgrade: str, *, pid: int, user: bool = False) -> Last:
    """Have an upgrade decided that nobody waits for any more; returns how it is decided. Raises
    InstanceError, also if another process than `pid` answers."""
    answer = _ask(unit, _place(unit, user), "Withdraw", {"upgrade": upgrade}, pid)
    return _typed(answer.get("last"), Last)


def try_states(unit: Unit, *, user: bool = False) -> list[Trial]:
    """Have it find out which of its states can be saved as they are now."""
    answer = _ask(unit, _place(unit, user), "TryStates", {})
    return _typed(answer.get("trials"), list[Trial])


def settle(unit: Unit, seconds: float, *, user: bool = False) -> list[str]:
    """Wait until a restart would cut no turn and no handler of it in two, for as long as it waits
    (`seconds`, its drain-timeout); returns what a restart would cut besides. Raises InstanceError,
    named Refused, if it would, or could park nothing."""
    with _connected(unit, _place(unit, user)) as sock:
        sock.settimeout(min(seconds, LONGEST) + _PATIENCE)
        return _typed(call(sock, f"{INTERFACE}.Settle", {}).get("cut"), list[str])


def phases(unit: Unit, *, timeout: float | None = None, user: bool = False) -> Iterator[Migration]:
    """The migration under way or the last one, then each phase until one has ended.

    Waits at most `timeout` seconds for each, for ever without; raises InstanceError. The instance
    listens from the moment at which this yields for the first time.
    """
    with _connected(unit, _place(unit, user)) as sock:
        sock.settimeout(timeout)
        for answer in watch(sock, f"{INTERFACE}.QueryMigration"):
            yield _typed(answer.get("migration"), Migration)


def has_moved(unit: Unit, *, user: bool = False) -> bool:
    """Whether RuntimeDirectory= names another directory first than when the main process was started,
    so that takeover would look for its socket elsewhere."""
    return _directory(unit, user) != _declared(unit, user)


def _directory(unit: Unit, user: bool) -> Path | None:
    """Where the unit's sockets are: the first of RuntimeDirectory=, or what that was when the main
    process was started; None if it had none."""
    declared = _declared(unit, user)
    if not unit.main_pid or (declared and (declared / SOCKET).exists()):
        return declared
    try:
        given = socket_path(given_environment(unit.main_pid))
    except OSError:  # another user's process, or it has ended
        return declared
    if given is None:
        return None
    # It may say anything: no other directory than one of a service is looked into.
    below = ".." not in given and given.startswith(f"{_base(user)}/")
    return Path(given).parent if below else declared


def _declared(unit: Unit, user: bool) -> Path | None:
    names = unit.runtime_directories
    return Path(_base(user), names[0]) if names else None


def _base(user: bool) -> str:
    return os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}") if user else "/run"


def _place(unit: Unit, user: bool) -> str:
    """The address of the instance that serves."""
    directory = _directory(unit, user)
    return str(directory / SOCKET) if directory else socket_name(unit.invocation_id)


def _ask(
    unit: Unit,
    path: str,
    method: str,
    parameters: dict[str, Any],
    pid: int = 0,
    until: float | None = None,
) -> dict[str, Any]:
    with _connected(unit, path, pid, until) as sock:
        return call(sock, f"{INTERFACE}.{method}", parameters)


@contextlib.contextmanager
def _connected(
    unit: Unit, address: str, pid: int = 0, until: float | None = None
) -> Iterator[socket.socket]:
    """A connection to a process of this unit; what goes wrong is an InstanceError."""
    path = address.replace("\0", "@")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            until = until or deadline()
            left = max(until - time.monotonic(), _AGAIN)
            # With a timeout of Python's, a full backlog would be an error at once.
            patience = _TIMEVAL.pack(int(left), int(left % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
            sock.connect(address)
            sock.settimeout(max(until - time.monotonic(), _AGAIN))
            _require_peer(sock, unit, pid)
            yield sock
    except VarlinkError as error:
        told = [str(value) for key, value in error.parameters.items() if key != "code"]
        words = _WORDS.get(error.name) or ", ".join(told)
        raise InstanceError(
            words or error.name,
            name=error.name,
            remedy=_REMEDIES.get(error.name, ""),
            code=Code(str(error.parameters.get("code"))),
        ) from error
    except PermissionError as error:
        raise InstanceError(
            f"{path} may only be asked by root and by the service's own user",
            name=DENIED,
            remedy="run the command as root, with sudo for instance",
        ) from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        left = isinstance(error, ConnectionRefusedError) and path == address
        name = LEFT if left else NOBODY
        raise InstanceError(f"nobody answers at {path}", name=name) from error
    except TimeoutError as error:
        raise InstanceError(f"{path}: no answer in time", name=SILENT) from error
    except BlockingIOError as error:
        raise InstanceError(f"{path}: too many ask, and none is answered", name=SILENT) from error
    except ConnectionError as error:
        raise InstanceError(f"{path}: {error}", name=SILENT) from error
    except (OSError, ValueError) as error:
        raise InstanceError(f"{path}: {error}") from error


def _require_peer(sock: socket.socket, unit: Unit, pid: int) -> None:
    """Raise for a listener that is not a process of the unit, or not `pid`: anybody may have put it
    there."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    peer, _, _ = _PEERCRED.unpack(credentials)
    with open(f"/proc/{peer}/cgroup", encoding="ascii", errors="replace") as file:
        owner = unit_of(file.read())
    if owner not in unit.names:
        raise InstanceError(f"its socket belongs to process {peer} of {owner or 'no unit'}")
    if pid and peer != pid:
        raise InstanceError(f"process {peer} answers, not {pid}")


def _description(answer: dict[str, Any]) -> Description:
    return _typed(answer, Description)


def _typed(answer: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise InstanceError(f"its answer cannot be read: {error}", name=SILENT) from error


_WORDS = {
    "NothingToCancel": "no upgrade is under way",
    "TooLate": "too late: the new instance had already taken over",
    DENIED: "it does not allow you to do this",
    "MethodNotFound": "it runs an older version of the library, which cannot do this",
}
_REMEDIES = {
    DENIED: "run the command as root, with sudo for instance",
    "MethodNotFound": "after the next upgrade it can",
}
