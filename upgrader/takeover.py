# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m upgrader.takeover`, for ExecReload=: starts the new main process and reports.

PID 1 has made this process afresh from the current unit file, so all that it starts gets today's
environment, sandbox and limits. It is started twice removed (double fork), so that it is PID 1's
own from the beginning, and is killed if this process ends before the commit.
"""

import contextlib
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upgrader.backends import Fd
from upgrader.control import call
from upgrader.errors import BusError, UpgradeError
from upgrader.parameters import TAKEOVER, socket_path
from upgrader.systemd import journal
from upgrader.systemd.bus import Bus
from upgrader.systemd.journal import Outcome, Priority
from upgrader.systemd.stop import unit_name
from upgrader.varlink import INTERFACE, VarlinkError

#: Part of TimeoutStartSec= (which bounds a reload) after which takeover gives up by itself: killed
#: by PID 1 it could not say why. Measured from its start: a daemon-reload in between makes PID 1
#: forget EXTEND_TIMEOUT_USEC=.
_SHARE = 0.8
_BUS_TIMEOUT = 5.0
_PER_PROCESS = re.compile(
    r"MAINPID(FDID)?|LISTEN_.*|SYSTEMD_EXEC_PID|EXIT_.*|SERVICE_RESULT|JOURNAL_STREAM|WATCHDOG_.*"
    r"|MEMORY_PRESSURE_.*|CREDENTIALS_DIRECTORY|TRIGGER_.*|UPGRADER_TAKEOVER"
)
#: Variables of a control process that a main process does not have, or has as its own.
_NOT_INHERITED = re.compile(r"MAINPID(FDID)?|LISTEN_.*|SYSTEMD_EXEC_PID|EXIT_.*|SERVICE_RESULT")


class TakeoverError(UpgradeError):
    """The upgrade was not done, and the running instance serves on."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start, as PID 1 has it after the newest daemon-reload."""

    unit: str
    path: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    main_pid: int
    deadline: float  # of `time.monotonic`


def main() -> int:
    """Upgrade the unit that this process is a control process of; the exit code of the reload."""
    started = time.monotonic()
    try:
        plan = _plan(started)
        _take_over(plan)
    except UpgradeError as error:
        # The journal's last line of a failed `systemctl reload` is what an admin reads.
        journal.report(
            f"not upgraded, the running instance serves on: {error}", Priority.ERR,
            unit=unit_name(), generation=0, side="takeover", phase="upgrade",
            outcome=Outcome.FAILED,
        )  # fmt: skip
        return 1
    return 0


def _plan(started: float) -> Plan:
    unit = unit_name()
    if os.getpid() == 1:
        raise TakeoverError("PrivatePIDs= hides the service from its successor", remedy=_RESTART)
    try:
        with Bus(_BUS_TIMEOUT) as bus:
            commands = bus.get(unit, "ExecStartEx")
            main_pid = int(bus.get(unit, "MainPID"))
            watchdog = int(bus.get(unit, "WatchdogUSec"))
            span = bus.time_span(unit, "TimeoutStartUSec")
    except BusError as error:
        raise TakeoverError(
            f"systemd cannot be asked about {unit or 'this process'}: {error}"
        ) from error
    if not main_pid:
        raise TakeoverError(f"{unit} has no main process")
    path, argv, flags = commands[-1][:3]
    environment = {n: v for n, v in os.environ.items() if not _NOT_INHERITED.fullmatch(n)}
    if 0 < watchdog < 2**64 - 1:
        environment["WATCHDOG_USEC"] = str(watchdog)
    arguments = list(argv)
    if "no-env-expand" not in flags:
        arguments = arguments[:1] + expand(arguments[1:], environment)
    return Plan(unit, path, arguments, environment, main_pid, started + span * _SHARE)


_RESTART = "restart it instead: upgrader upgrade --mode restart"


def expand(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Variables in a command line, by the rules of systemd.service(5).

    `${A}` anywhere is replaced; `$A` as a word of its own is split at white space into none or
    more words; `$$` is a dollar sign. An unset variable is empty.
    """
    words: list[str] = []
    for argument in arguments:
        if match := re.fullmatch(r"\$([A-Za-z_][A-Za-z0-9_]*)", argument):
            words += environment.get(match[1], "").split()
            continue
        words.append(
            re.sub(
                r"\$\$|\$\{([A-Za-z_][A-Za-z0-9_]*)\}",
                lambda m: environment.get(m[1], "") if m[1] else "$",
                argument,
            )
        )
    return words


def _take_over(plan: Plan) -> None:
    path = socket_path(plan.environment)
    if path is None:
        raise TakeoverError("the unit has no RuntimeDirectory=, so its instance has no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_BUS_TIMEOUT)
        try:
            sock.connect(str(path))
            source = call(sock, f"{INTERFACE}.Describe", {})
            if not (source["changed"] or source["expected"] or _differs(plan, source["pid"])):
                call(sock, f"{INTERFACE}.Reload", {})
                return
            _check(source)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with ours:
                pid, release = _start(plan, source, path, theirs)
                with Fd(os.pidfd_open(pid)) as pidfd, Fd(release) as gate:
                    try:
                        call(sock, f"{INTERFACE}.Register", {"pid": pid})
                        os.write(gate.fileno(), b"\n")
                        _follow(plan, ours)
                    except BaseException as error:
                        ours.close()  # it aborts by itself when it sees this
                        _clean_up(plan, sock, pid, pidfd, str(error))
                        raise
                    _confirm(plan, pid)
        except (OSError, VarlinkError) as error:
            raise TakeoverError(f"{path}: {error}") from error


def _differs(plan: Plan, pid: int) -> bool:
    """Whether the running instance was started with another command line or environment."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")[:-1]
    except OSError:
        return True
    running = dict(item.decode(errors="replace").partition("=")[::2] for item in environment)
    return [word.decode(errors="replace") for word in command] != list(plan.arguments) or (
        _settings(running) != _settings(plan.environment)
    )


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that is not different in every process."""
    return {n: v for n, v in environment.items() if not _PER_PROCESS.fullmatch(n)}


def _check(source: dict[str, Any]) -> None:
    uid = (
        os.stat(f"/proc/{source['pid']}").st_uid
        if Path(f"/proc/{source['pid']}").exists()
        else None
    )
    if uid != os.geteuid():
        raise TakeoverError(f"User= has changed (uid {uid} to {os.geteuid()})", remedy=_RESTART)
    credentials = source["credentials"]
    if credentials and not os.access(credentials, os.R_OK):
        raise TakeoverError(f"the credentials in {credentials} cannot be read", remedy=_RESTART)


def _start(plan: Plan, source: dict[str, Any], path: Path, line: socket.socket) -> tuple[int, int]:
    """Start the new main process, held back; returns its PID and the FD that releases it."""
    hold, release = os.pipe2(os.O_CLOEXEC)
    told, tell = os.pipe2(os.O_CLOEXEC)
    if (between := os.fork()) == 0:
        if os.fork() == 0:
            _become_main(plan, source, path, line, hold, tell, release)
        os._exit(0)
    os.waitpid(between, 0)
    os.close(tell)
    os.close(hold)
    line.close()
    with Fd(told) as end:
        pid = os.read(end.fileno(), 16)
    return int(pid), release


def _become_main(
    plan: Plan, source: dict[str, Any], path: Path, line: socket.socket, hold: int, tell: int,
    release: int,
) -> None:  # fmt: skip
    try:
        os.close(release)
        os.setsid()
        os.write(tell, str(os.getpid()).encode())
        if not os.read(hold, 1):
            os._exit(1)  # takeover has died
        line.set_inheritable(True)
        environment = dict(plan.environment)
        environment["SYSTEMD_EXEC_PID"] = str(os.getpid())
        adjustment = Path("/proc/self/oom_score_adj").read_text().strip()
        environment[TAKEOVER] = f"{line.fileno()}:{adjustment}:{path}"
        if "WATCHDOG_USEC" in environment:
            environment["WATCHDOG_PID"] = str(os.getpid())
        if source["credentials"]:
            environment["CREDENTIALS_DIRECTORY"] = source["credentials"]
        # Should memory run out in the overlap, the one that does not serve yet goes first.
        Path("/proc/self/oom_score_adj").write_text("1000")
        os.execve(plan.path, list(plan.arguments), environment)
    except OSError as error:
        line.send(f"failed: {plan.path}: {error.strerror}".encode())
    finally:
        os._exit(1)


def _follow(plan: Plan, line: socket.socket) -> None:
    """Wait for the commit; raises TakeoverError with the reason if there is none."""
    while True:
        left = plan.deadline - time.monotonic()
        readable, _, _ = select.select([line], [], [], max(left, 0))
        if not readable:
            raise TakeoverError("the new version was not ready in time (TimeoutStartSec=)")
        said = line.recv(4096).decode(errors="replace")
        if said == "committed":
            return
        if not said:
            raise TakeoverError("the new version has ended before it was ready")
        if said.startswith("failed: "):
            raise TakeoverError(said.removeprefix("failed: "))


def _clean_up(plan: Plan, sock: socket.socket, pid: int, pidfd: Fd, why: str) -> None:
    """Kill a new process that did not take over, once the source says that it cannot any more."""
    while True:
        try:
            call(sock, f"{INTERFACE}.Revoke", {"pid": pid, "why": why})
        except VarlinkError:  # in the middle of the exchange: the source decides
            if time.monotonic() > plan.deadline + _BUS_TIMEOUT:
                return
            time.sleep(0.02)
            continue
        except OSError:  # the source is gone: the new process is the only one left
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
        return


def _confirm(plan: Plan, pid: int) -> None:
    """Read back from PID 1 that the new process is its main process."""
    while time.monotonic() < plan.deadline:
        with Bus(_BUS_TIMEOUT) as bus:
            if bus.get(plan.unit, "MainPID") == pid:
                return
        time.sleep(0.01)
    raise TakeoverError(f"systemd has not taken process {pid} as the main process")


if __name__ == "__main__":
    sys.exit(main())
