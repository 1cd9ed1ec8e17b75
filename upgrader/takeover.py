# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m upgrader.takeover`, for ExecReload=: starts the new main process and reports.

PID 1 has made this process afresh from the current unit file, so all that it starts gets today's
environment, sandbox and limits. It is started twice removed (double fork), so that it is PID 1's
own from the beginning, and is killed if this process ends before the commit. `upgrade` is what an
operator asks for, and what calls for the reload.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upgrader.backends import Fd
from upgrader.calling import call
from upgrader.command_line import PER_PROCESS, Command, main_process
from upgrader.errors import (
    REHEARSED,
    BusError,
    DeclarationError,
    NotifyError,
    UpgradeError,
)
from upgrader.parameters import COMMITTED, FAILED, REHEARSAL, TAKEOVER, Parameters, socket_path
from upgrader.started import settings
from upgrader.systemd import journal
from upgrader.systemd.bus import Bus
from upgrader.systemd.journal import Outcome, Priority
from upgrader.systemd.live_limits import RESTART, Running, live_limits
from upgrader.systemd.notify import PATIENCE, Notifier
from upgrader.systemd.stop import unit_name
from upgrader.systemd.unit import UNSET, SocketUnit, Unit
from upgrader.varlink import INTERFACE, VarlinkError

#: Part of TimeoutStartSec= (which bounds a reload) after which takeover gives up by itself: killed
#: by PID 1 it could not say why. Measured from its start: a daemon-reload in between makes PID 1
#: forget EXTEND_TIMEOUT_USEC=.
_SHARE = 0.8
_BUS_TIMEOUT = 5.0
#: Between two questions to PID 1 or to the source about what it announces to nobody.
_PAUSE = 0.01


#: Said of a new version that did not say why; what it wrote may.
ENDED = "the new version has ended before it was ready"


class TakeoverError(UpgradeError):
    """The upgrade was not done, and the running instance serves on."""


#: What is reported before what went wrong after the commit.
HALFWAY = "the new version has taken over, but "


class HalfwayError(UpgradeError):
    """The new instance has become the owner, and what follows went wrong."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start, as PID 1 has it after the newest daemon-reload."""

    unit: Unit
    sockets: tuple[SocketUnit, ...]
    settings: str
    command: Command
    deadline: float  # of `time.monotonic`

    @property
    def left(self) -> float | None:
        """Seconds until the deadline, None where there is none."""
        if self.deadline == float("inf"):
            return None
        return max(self.deadline - time.monotonic(), 0)


def main() -> int:
    """Upgrade the unit that this process is a control process of; the exit code of the reload."""
    began = time.monotonic() - _age()
    signal.signal(signal.SIGTERM, _stop)
    source: dict[str, Any] = {}
    try:
        _take_over(_plan(began), source)
    except HalfwayError as error:
        _report(source, f"{HALFWAY}{error}")
        return 1
    except UpgradeError as error:
        if error.message == REHEARSED:
            return 0
        # The journal's last line of a failed `systemctl reload` is what an admin reads.
        _report(source, f"not upgraded, the running instance serves on: {error}")
        return 1
    return 0


def _age() -> float:
    """Seconds since this process was started, which is longer than since it runs this code."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return max(now - ticks / os.sysconf("SC_CLK_TCK"), 0.0)


def _stop(number: int, frame: object) -> None:
    """SIGTERM: the death of this process calls the upgrade off. A stop of the unit in the middle of
    a reload is no failure of the unit."""
    with contextlib.suppress(BusError), Bus(_BUS_TIMEOUT) as bus:
        if bus.properties(unit_name()).get("ActiveState") == "deactivating":
            os._exit(0)
    _report({}, "not upgraded, the running instance serves on: takeover was told to stop")
    os._exit(1)


def _report(source: Mapping[str, Any], message: str) -> None:
    journal.report(
        message, Priority.ERR, unit=unit_name(), generation=source.get("generation", 0),
        side="takeover", phase="upgrade", outcome=Outcome.FAILED,
    )  # fmt: skip


def _plan(began: float) -> Plan:
    name = unit_name()
    try:
        with Bus(_BUS_TIMEOUT) as bus:
            unit = Unit.from_properties("", bus.properties(name))
            sockets = tuple(
                SocketUnit.from_properties(bus.properties(each))
                for each in unit.triggered_by
                if each.endswith(".socket")
            )
            checksum = settings(bus, name).checksum
    except BusError as error:
        raise TakeoverError(
            f"systemd cannot be asked about {name or 'this process'}: {error}"
        ) from error
    if not unit.main_pid or not unit.exec_start:
        raise TakeoverError(f"{name} has no main process")
    span = unit.timeout_start_usec
    deadline = float("inf") if span == UNSET else began + span / 1e6 * _SHARE
    return Plan(unit, sockets, checksum, main_process(unit, os.environ), deadline)


def _take_over(plan: Plan, source: dict[str, Any]) -> None:
    """`source` is filled with what the running instance says of itself."""
    path = socket_path(plan.command.environment)
    if path is None:
        limits = live_limits(plan.unit)
        raise TakeoverError(limits[0].cause, remedy=limits[0].remedy)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_BUS_TIMEOUT)
        try:
            sock.connect(str(path))
            source |= call(sock, f"{INTERFACE}.Describe", {})
            if not (source["changed"] or source["expected"] or _differs(plan, source)):
                sock.settimeout(plan.left)
                call(sock, f"{INTERFACE}.Reload", {})
                return
            _check(plan, source)
            _start_and_follow(plan, source, path, sock)
        except (OSError, VarlinkError) as error:
            raise TakeoverError(f"{path}: {error}") from error


def _start_and_follow(
    plan: Plan, source: Mapping[str, Any], path: Path, sock: socket.socket
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, Fd(os.pidfd_open(source["pid"])) as source_pidfd:
        pid, release = _start(plan, source, path, theirs)
        with Fd(os.pidfd_open(pid)) as pidfd, Fd(release) as gate:
            try:
                call(sock, f"{INTERFACE}.Register", {"pid": pid})
                os.write(gate.fileno(), b"\n")
                _follow(plan, ours, pidfd)
            except BaseException as error:
                if not _clean_up(plan, sock, ours, pid, pidfd, str(error)):
                    raise
            _confirm(plan, pid, pidfd, source_pidfd)


def _differs(plan: Plan, source: Mapping[str, Any]) -> bool:
    """Whether the running instance was started with another command line, environment or unit."""
    try:
        command = Path(f"/proc/{source['pid']}/cmdline").read_bytes().split(b"\0")[:-1]
        environment = Path(f"/proc/{source['pid']}/environ").read_bytes().split(b"\0")[:-1]
    except OSError:
        return True
    running = dict(item.decode(errors="replace").partition("=")[::2] for item in environment)
    if [word.decode(errors="replace") for word in command] != list(plan.command.arguments):
        return True
    if source.get("started", {}).get("settings", "") not in ("", plan.settings):
        return True
    return _shared(running) != _shared(plan.command.environment)


def _shared(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that is not different in every process."""
    return {n: v for n, v in environment.items() if not PER_PROCESS.fullmatch(n)}


def _check(plan: Plan, source: Mapping[str, Any]) -> None:
    """Raise for what forbids a live upgrade of this unit as it is now."""
    with contextlib.suppress(DeclarationError):  # the new version says that better
        if not Parameters.from_environment(plan.command.environment).enabled:
            remedy = f"systemctl restart {plan.unit.id}, which drops connections and state"
            raise TakeoverError(
                "UPGRADER=off in the unit makes a plain service of it", remedy=remedy
            )
    limits = list(live_limits(plan.unit, Running.from_description(source), plan.sockets))
    if not limits:
        return
    message = "; ".join(limit.cause for limit in limits)
    if any("User= has changed" in limit.cause for limit in limits) and os.geteuid() != 0:
        # PID 1 does that before it starts a control process, and nobody can prevent it here.
        message += (
            ". systemd has by now given its directories to the new user: until it is restarted,"
            " the running instance may fail to write there"
        )
    raise TakeoverError(message, remedy=limits[0].remedy)


def _start(
    plan: Plan, source: Mapping[str, Any], path: Path, line: socket.socket
) -> tuple[int, int]:
    """Start the new main process, held back; returns its PID and the FD that releases it."""
    more = _credentials(source)
    if source.get("rehearsal"):
        more[REHEARSAL] = "1"
    hold, release = os.pipe2(os.O_CLOEXEC)
    told, tell = os.pipe2(os.O_CLOEXEC)
    if (between := os.fork()) == 0:
        if os.fork() == 0:
            _become_main(plan, more, path, line, hold, tell, release)
        os._exit(0)
    os.waitpid(between, 0)
    os.close(tell)
    os.close(hold)
    line.close()
    with Fd(told) as end:
        pid = os.read(end.fileno(), 16)
    return int(pid), release


def _become_main(
    plan: Plan, more: Mapping[str, str], path: Path, line: socket.socket, hold: int,
    tell: int, release: int,
) -> None:  # fmt: skip
    command = plan.command
    try:
        os.close(release)
        os.setsid()
        os.write(tell, str(os.getpid()).encode())
        if not os.read(hold, 1):
            os._exit(1)  # takeover has died
        line.set_inheritable(True)
        environment = dict(command.environment)
        environment["SYSTEMD_EXEC_PID"] = str(os.getpid())
        adjustment = Path("/proc/self/oom_score_adj").read_text().strip()
        environment[TAKEOVER] = f"{line.fileno()}:{adjustment}:{path}"
        if "WATCHDOG_USEC" in environment:
            environment["WATCHDOG_PID"] = str(os.getpid())
        environment |= more
        # Should memory run out in the overlap, the one that does not serve yet goes first.
        Path("/proc/self/oom_score_adj").write_text("1000")
        os.execve(command.path, list(command.arguments), environment)
    except OSError as error:
        line.send(f"{FAILED}{command.path}: {error.strerror}".encode())
    finally:
        os._exit(1)


def _credentials(source: Mapping[str, Any]) -> dict[str, str]:
    """The credentials of the running instance; PID 1 gives none to a control process.

    In a mount namespace of its own they are seen by nobody else: the new process then gets an
    FD of the directory. Raises TakeoverError.
    """
    directory = source["credentials"]
    if not directory:
        return {}
    if not directory.startswith("/proc/self/") and os.access(directory, os.R_OK | os.X_OK):
        return {"CREDENTIALS_DIRECTORY": directory}
    place = f"/proc/{source['pid']}"
    there = f"{place}/root{directory}"
    if directory.startswith("/proc/self/"):
        there = place + directory.removeprefix("/proc/self")
    try:
        number = os.open(there, os.O_PATH | os.O_DIRECTORY)
    except FileNotFoundError:  # the running instance has nothing there, either
        return {"CREDENTIALS_DIRECTORY": directory}
    except OSError as error:
        why = f"the credentials of the running instance cannot be had: {there}: {error.strerror}"
        raise TakeoverError(why, remedy=RESTART.format(unit=unit_name())) from error
    os.set_inheritable(number, True)
    return {"CREDENTIALS_DIRECTORY": f"/proc/self/fd/{number}"}


def _follow(plan: Plan, line: socket.socket, pidfd: Fd) -> None:
    """Wait for the commit; raises TakeoverError with the reason if there is none."""
    while True:
        # Its end is seen at the pidfd: what it has forked may hold the line open.
        readable, _, _ = select.select([line.fileno(), pidfd.fileno()], [], [], plan.left)
        if not readable:
            raise TakeoverError("the new version was not ready in time (TimeoutStartSec=)")
        said = _hear(line)
        if said == COMMITTED:
            return
        if not said:
            raise TakeoverError(ENDED)
        if said.startswith(FAILED):
            raise TakeoverError(said.removeprefix(FAILED))


def _hear(line: socket.socket) -> str:
    """What the new process says; empty if it says nothing more."""
    try:
        return line.recv(4096, socket.MSG_DONTWAIT).decode(errors="replace")
    except OSError:
        return ""


def _clean_up(
    plan: Plan, sock: socket.socket, line: socket.socket, pid: int, pidfd: Fd, why: str
) -> bool:
    """Call the upgrade off, and kill the new process once the source says that it cannot migrate
    any more. True if it was too late for that: the new process has become the owner."""
    # It aborts by itself when it sees this; what it has said before is still heard.
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_WR)
    give_up = min(plan.deadline, time.monotonic()) + _BUS_TIMEOUT
    source_lives = True
    while time.monotonic() < give_up:
        while said := _hear(line):
            if said == COMMITTED:
                return True
        if _ended(pidfd) and not source_lives:
            return False
        if source_lives:
            try:
                call(sock, f"{INTERFACE}.Revoke", {"pid": pid, "why": why})
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
                return False
            except VarlinkError:  # in the middle of the exchange: the source decides
                pass
            except OSError:  # the source is gone: the new process is the only one left
                source_lives = False
        time.sleep(_PAUSE)
    return False


def _confirm(plan: Plan, pid: int, pidfd: Fd, source: Fd) -> None:
    """Read back from PID 1 that the new process is its main process; raises HalfwayError.

    The source names its successor. Should it have died, nobody else can but this process, which
    PID 1 listens to while it runs.
    """
    named = False
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        with contextlib.suppress(BusError), Bus(_BUS_TIMEOUT) as bus:
            if bus.get(plan.unit.id, "MainPID") == pid:
                return
        if _ended(pidfd):
            raise HalfwayError("has ended at once; Restart= brings back what was kept for that")
        if _ended(source) and not named:
            named = True
            with contextlib.suppress(NotifyError):
                notifier = Notifier.from_environment(os.environ)
                notifier.send(f"MAINPID={pid}")
                notifier.close()
        time.sleep(_PAUSE)
    raise HalfwayError(f"systemd does not say that process {pid} is the main one")


def _ended(pidfd: Fd) -> bool:
    return bool(select.select([pidfd.fileno()], [], [], 0)[0])


if __name__ == "__main__":
    sys.exit(main())
