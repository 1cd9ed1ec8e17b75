# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m upgrader.takeover`, for ExecReload=: starts the new main process and reports.

PID 1 has made this process afresh from the current unit file, so all that it starts gets today's
environment, sandbox and limits. What it has started is killed if it ends before the commit.
`upgrade` is what an operator asks for, and what calls for the reload.

Clients wait for nothing here, but an operator does, and its imports compete with the service: it
gets by on a part of the standard library, and has loaded all of it before it starts anything.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time

from upgrader.codes import Code
from upgrader.errors import BusError, NotifyError, UpgradeError
from upgrader.protocol.fd import Fd
from upgrader.protocol.rendezvous import PREFLIGHT, PREFLIGHT_1, TAKEOVER, UPGRADE, socket_path
from upgrader.protocol.systemd_syntax import boolean
from upgrader.protocol.takeover_line import Said, hear
from upgrader.protocol.varlink import INTERFACE, VarlinkError
from upgrader.protocol.varlink_client import answer, call
from upgrader.systemd import cgroup, journal, precedence
from upgrader.systemd.bus import Bus
from upgrader.systemd.journal import JournalOutcome, Priority
from upgrader.systemd.live_limits import RESTART, Limit, LimitKind, live_limits
from upgrader.systemd.main_command import MainCommand, given_environment, main_process
from upgrader.systemd.notify import PATIENCE, Notifier
from upgrader.systemd.process_start import process_age
from upgrader.systemd.unit import UNSET, SocketUnit, Unit
from upgrader.systemd.unit_settings import (
    Settings,
    command_checksum,
    environment_checksums,
    settings,
)
from upgrader.takeover.launch import NewProcess
from upgrader.takeover.running_instance import (
    Limited,
    RunningInstance,
    TakeoverError,
    begin_to_describe,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

_USAGE = """\
usage: python -m upgrader.takeover [--help]

Starts the new version of a service beside the running one, which then gives everything to it. It is
for the unit file, and is run by systemd:

    ExecReload=/usr/bin/python3 -m upgrader.takeover

To upgrade a service, run: upgrader upgrade UNIT
"""

#: Part of TimeoutStartSec= (which bounds a reload) after which takeover gives up by itself: killed
#: by PID 1 it could not say why. Measured from its start: a daemon-reload in between makes PID 1
#: forget EXTEND_TIMEOUT_USEC=.
_SHARE = 0.8
_BUS_TIMEOUT = 5.0
#: Between two questions to PID 1 or to the source about what it announces to nobody.
_PAUSE = 0.01
_TO_BE_FOUND = 1.0  # seconds that a new owner has before this reload is over
_TO_SERVE = 0.1  # seconds that a new owner has before PID 1 is asked about it

_NO_DIRECTORY = Limit(
    LimitKind.RUNTIME_DIRECTORY,
    "RUNTIME_DIRECTORY is not in the environment of the unit",
    "leave it out of UnsetEnvironment=",
)
_STOPPED = "takeover was told to stop"
#: Said of a new version that did not say why; what it wrote may.
ENDED = "the new version has ended before it was ready"
#: What is reported before what went wrong after the commit.
HALFWAY = "the new version has taken over, but "


class HalfwayError(UpgradeError):
    """The new instance has become the owner, and what follows went wrong."""


def main(arguments: Sequence[str]) -> int:
    """Upgrade the unit that this process is a control process of; the exit code of the reload."""
    if arguments:
        asked = arguments[0] in ("-h", "--help")
        (sys.stdout if asked else sys.stderr).write(_USAGE)
        return 0 if asked else 2
    takeover = Takeover()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, takeover.told_to_stop)
    # A program may be told to reload by this, together with all of its unit. What is executed has
    # the default again.
    signal.signal(signal.SIGHUP, lambda number, frame: None)
    try:
        takeover.run()
    except HalfwayError as error:
        takeover.report(f"{HALFWAY}{error}", Code.UNKNOWN)
        return 1
    except TakeoverError as error:
        if error.code is Code.PREFLIGHT_PASSED:
            return 0
        kind = {"LIMIT": str(error.kind)} if isinstance(error, Limited) else {}
        # The journal's last line of a failed `systemctl reload` is what an admin reads.
        message = f"not upgraded, the running instance serves on: {error}"
        takeover.report(message, error.code, REASON=str(error), **kind)
        return 1
    return 0


class Takeover:
    """One reload."""

    def __init__(self) -> None:
        self._began = time.monotonic() - process_age(os.getpid())
        self._upgrade = os.urandom(16).hex()
        self._name = cgroup.own_unit()
        self._control = given_environment()
        self._generation = 0
        self._preflight = False
        self._starts = False  # from here on there is something to be called off
        self._told, self._tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def report(self, message: str, code: Code, **details: str) -> None:
        """Tell the journal what went wrong."""
        if self._preflight:
            details["PREFLIGHT"] = "1"
        journal.report(
            message, Priority.ERR, unit=self._name, generation=self._generation, side="takeover",
            phase="upgrade", outcome=JournalOutcome.FAILED,
            details={"ID": self._upgrade, "CODE": code, **details},
        )  # fmt: skip

    def told_to_stop(self, number: int, frame: object) -> None:
        """SIGTERM or KillSignal=: a stop of the unit in the middle of a reload is no failure of the unit, and the
        death of this process calls the upgrade off; else that is done in order."""
        with contextlib.suppress(BusError), Bus(_BUS_TIMEOUT) as bus:
            if bus.properties(self._name).get("ActiveState") == "deactivating":
                os._exit(0)
        if not self._starts:
            raise TakeoverError(_STOPPED, Code.TAKEOVER_STOPPED)
        os.write(self._tell, b"\n")

    def run(self) -> None:
        """Do what the reload is for; raises TakeoverError or HalfwayError."""
        path = socket_path(self._control)
        if path is None:
            self._ask_systemd()
            raise _limited(live_limits(self._unit) or [_NO_DIRECTORY])
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_BUS_TIMEOUT)
            try:
                failed = begin_to_describe(sock, path)  # it answers while systemd is asked
                self._ask_systemd()
                if failed:
                    raise failed
                source = RunningInstance.from_answer(answer(sock))
                self._generation = source.generation
                self._upgrade = source.upgrade or self._upgrade
                self._preflight = source.preflight
                if source.changed or source.expected or self._differs(source):
                    self._check(source)
                    self._start_and_follow(source, path, sock)
                else:
                    sock.settimeout(self._left)
                    call(sock, f"{INTERFACE}.Reload", {})
            except VarlinkError as error:
                usual = Code.BUSY if error.name == "Busy" else Code.REFUSED
                code = Code(error.parameters.get("code", usual))
                raise TakeoverError(f"{path}: {error}", code) from error
            except OSError as error:
                raise TakeoverError(f"{path}: {error}", Code.UNKNOWN) from error

    @property
    def _left(self) -> float | None:
        """Seconds until the deadline, None if there is none."""
        if self._deadline == float("inf"):
            return None
        return max(self._deadline - time.monotonic(), 0)

    def _ask_systemd(self) -> None:
        """What the unit is after the newest daemon-reload."""
        try:
            with Bus(_BUS_TIMEOUT) as bus:
                properties = bus.properties(self._name)
                self._unit = Unit.from_properties("", properties)
                self._sockets = [
                    SocketUnit.from_properties(bus.properties(each))
                    for each in self._unit.triggered_by
                    if each.endswith(".socket")
                ]
                if not self._unit.main_pid or not self._unit.exec_start:
                    raise TakeoverError(f"{self._name} has no main process", Code.REFUSED)
                self._settings = self._ask_settings(bus, properties)
        except BusError as error:
            why = f"systemd cannot be asked about {self._name or 'this process'}: {error}"
            raise TakeoverError(why, Code.UNKNOWN) from error
        for number in self._unit.kill_signals:
            with contextlib.suppress(OSError, ValueError):  # SIGKILL
                signal.signal(number, self.told_to_stop)
        span = self._unit.timeout_start_usec
        self._deadline = float("inf") if span == UNSET else self._began + span / 1e6 * _SHARE

    def _ask_settings(self, bus: Bus, properties: Mapping[str, Any]) -> Settings:
        """What PID 1 would make a main process from now; nothing if it does not say."""
        command = self._unit.exec_start[-1]
        made = main_process(self._unit, self._control, os.getpid(), {})
        with contextlib.suppress(BusError):
            return settings(bus, self._name, properties).replace(
                command=command_checksum(command),
                environment=environment_checksums(made.environment, bus.environment(), command),
            )
        return Settings()

    def _differs(self, source: RunningInstance) -> bool:
        """Whether a start now would make another process than the running one."""
        return not source.was_made_by(
            self._settings,
            lambda given: main_process(self._unit, self._control, source.pid, given),
        )

    def _check(self, source: RunningInstance) -> None:
        """Raise for what forbids a live upgrade of this unit as it is now."""
        with contextlib.suppress(ValueError):  # the new version says that better
            if not boolean(self._control.get("UPGRADER") or "yes"):
                raise TakeoverError(
                    "UPGRADER=off in the unit makes a plain service of it",
                    Code.REFUSED,
                    remedy=f"systemctl restart {self._name}, which drops connections and state",
                )
        if limits := live_limits(self._unit, source.running, self._sockets):
            raise _limited(limits)

    def _start_and_follow(self, source: RunningInstance, path: str, sock: socket.socket) -> None:
        running = source.environment(self._name)
        now = self._settings
        upgrade = f"{self._upgrade}:{now.checksum}:{now.command}"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def make(pid: int, line: int, adjustment: int) -> MainCommand:
            command = main_process(self._unit, self._control, pid, running)
            more = {TAKEOVER: f"{line}:{adjustment}:{path}", UPGRADE: upgrade}
            if source.preflight:
                more |= {PREFLIGHT: "1", PREFLIGHT_1: "1"}
            return command.replace(environment={**command.environment, **more})

        with ours, Fd(os.pidfd_open(source.pid)) as source_pidfd:
            self._starts = True
            with contextlib.closing(NewProcess(theirs, make)) as new:
                try:
                    self._place(new, source)
                    wanted = {"pid": new.pid, "upgrade": self._upgrade}
                    call(sock, f"{INTERFACE}.Register", wanted)
                    new.release()
                    self._follow(ours, new)
                except BaseException as error:
                    if not self._call_off(sock, ours, new, error):
                        raise _as_the_source_says(sock, self._upgrade, error) from error
                # It lets go of the line once it serves; until then, PID 1 would only be in its way.
                ends = [ours.fileno(), new.fileno(), self._told]
                select.select(ends, [], [], _TO_SERVE)
                select.select(ends[1:], [], [], precedence.FIRST_CLIENTS)
                self._confirm(new, source_pidfd)
                # By then it is found by whoever asks, as the next reload does.
                select.select(ends, [], [], _TO_BE_FOUND)

    def _place(self, new: NewProcess, source: RunningInstance) -> None:
        """With Delegate=, PID 1 keeps its control processes in a cgroup of their own."""
        try:
            cgroup.move(new.pid, source.pid)
        except OSError as error:
            why = f"Delegate=: the new version cannot be put where the running one is: {error}"
            remedy = RESTART.format(unit=self._name)
            raise Limited(why, LimitKind.CGROUP, remedy=remedy) from error

    def _follow(self, line: socket.socket, new: NewProcess) -> None:
        """Wait for the commit; raises TakeoverError with the reason if there is none."""
        watched = [line.fileno(), new.fileno(), self._told]
        courtesy = precedence.Courtesy(new.pid)
        while True:
            spans = [span for span in (self._left, courtesy.left) if span is not None]
            # Its end is seen at its pidfd: what it has forked may hold the line open.
            readable, _, _ = select.select(watched, [], [], min(spans, default=None))
            if not readable and courtesy.left is not None:
                courtesy.end()
                continue
            if not readable:
                why = "the new version was not ready in time (TimeoutStartSec=)"
                raise TakeoverError(why, Code.NOT_READY_IN_TIME)
            if self._told in readable:
                raise TakeoverError(_STOPPED, Code.TAKEOVER_STOPPED)
            words, more = hear(line)
            for word in words:
                if word.said is Said.COMMITTED:
                    return
                if word.said is Said.FAILED:
                    raise TakeoverError(word.reason, word.code)
            if not more or new.ended:
                raise TakeoverError(ENDED, Code.ENDED_EARLY)

    def _call_off(
        self, sock: socket.socket, line: socket.socket, new: NewProcess, why: BaseException
    ) -> bool:
        """Call the upgrade off, and kill the new process once the source says that it cannot migrate
        any more. True if it was too late for that: the new process has become the owner."""
        # It aborts by itself when it sees this; what it has said before is still heard.
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_WR)
        code = why.code if isinstance(why, TakeoverError) else Code.UNKNOWN
        wanted = {"pid": new.pid, "why": str(why), "code": code}
        give_up = min(self._deadline, time.monotonic()) + _BUS_TIMEOUT
        source_lives = True
        while time.monotonic() < give_up:
            words, _ = hear(line)
            if any(word.said is Said.COMMITTED for word in words):
                return True
            if not source_lives and new.ended:
                return False
            if source_lives:
                try:
                    call(sock, f"{INTERFACE}.Revoke", wanted)
                    new.kill()
                    return False
                except VarlinkError:  # in the middle of the exchange: the source decides
                    pass
                except OSError:  # the source is gone: the new process is the only one left
                    source_lives = False
            time.sleep(_PAUSE)
        return False

    def _confirm(self, new: NewProcess, source: Fd) -> None:
        """Read back from PID 1 that the new process is its main process; raises HalfwayError.

        The source names its successor. Should it have died, nobody else can but this process, which
        PID 1 listens to while it runs.
        """
        named = False
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            with contextlib.suppress(BusError), Bus(_BUS_TIMEOUT) as bus:
                if bus.get(self._name, "MainPID") == new.pid:
                    return
            if new.ended:
                why = "has ended at once; Restart= brings back what was kept for that"
                raise HalfwayError(why)
            if not named and select.select([source.fileno()], [], [], 0)[0]:
                named = True
                with contextlib.suppress(NotifyError):
                    notifier = Notifier.from_environment(os.environ)
                    notifier.send(f"MAINPID={new.pid}")
                    notifier.close()
            if select.select([self._told], [], [], _PAUSE)[0]:
                raise HalfwayError("takeover was told to stop before systemd had taken note of it")
        raise HalfwayError(f"systemd does not say that process {new.pid} is the main one")


def _limited(limits: Sequence[Limit]) -> TakeoverError:
    """The error for what forbids a live upgrade."""
    message = "; ".join(limit.cause for limit in limits)
    if any(limit.kind is LimitKind.USER for limit in limits) and os.geteuid() != 0:
        # PID 1 does that before it starts a control process, and nobody can prevent it here.
        message += (
            ". systemd has by now given its directories to the new user: until it is restarted,"
            " the running instance may fail to write there"
        )
    return Limited(message, limits[0].kind, remedy=limits[0].remedy)


def _as_the_source_says(sock: socket.socket, upgrade: str, error: BaseException) -> BaseException:
    """Why it has come to nothing: the new process that the source has given up on is killed, or sees
    its channel end, and blames itself; the source knows why."""
    if not isinstance(error, TakeoverError) or not error.code.suspects_version:
        return error
    with contextlib.suppress(OSError, VarlinkError):
        last: Any = call(sock, f"{INTERFACE}.Describe", {}).get("last")
        if isinstance(last, dict) and (last.get("id"), last.get("decision")) == (
            upgrade,
            "aborted",
        ):
            code = Code(str(last.get("code")))
            if error.code is Code.ENDED_EARLY or not code.suspects_version:
                return TakeoverError(str(last.get("reason")), code)
    return error


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    # To take the interpreter down in order is of no use, and takes the CPU from the instance that has just
    # begun to serve.
    os._exit(status)
