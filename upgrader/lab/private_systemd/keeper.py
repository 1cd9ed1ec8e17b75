# SPDX-License-Identifier: LGPL-2.1-or-later
"""Own the cgroup and the PID 1 of one machine, and clean up after it even if its caller is killed.

This is a process of its own, in a session of its own. The caller gives it a plan on standard input
and reads events from its standard output. The machine ends with the input, with the caller, and with
the keeper itself, because the kernel then kills the PID 1 that it forked.
"""

import contextlib
import os
import select
import selectors
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from upgrader.lab.private_systemd import cgroups, interior, linux
from upgrader.lab.private_systemd.linux import Namespace
from upgrader.lab.private_systemd.plan import (
    Failed,
    Gone,
    MachineEvent,
    MachineReady,
    MachineStarted,
    Plan,
    Stopping,
)

# In the keeper's own mount namespace. Not on /sys/fs/cgroup: the kernel refuses to mount cgroup2 on
# itself, and that is where a machine with only cgroup2 has it.
_WORK = Path("/sys")
_CGROUPS = _WORK / "cgroup"
_CONSOLE_LIMIT = 64 * 1024
# Killing 10,000 processes takes seconds on a slow machine; after this the keeper says what is left.
_END_TIMEOUT = 20.0


def _own_cgroup() -> Path:
    """Make a cgroup below the caller's own, in namespaces of the keeper's own."""
    cgroups.enter_namespaces()
    linux.mount("tmpfs", str(_WORK), data="mode=0700")
    _CGROUPS.mkdir()
    cgroups.mount(_CGROUPS)
    cgroup = cgroups.make(_CGROUPS)
    (cgroup / "commands").mkdir()
    return cgroup


class _Keeper:
    """The machine of one plan, from its first process to its last."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.cgroup = _own_cgroup()
        self.console = bytearray()
        self.status: int | None = None
        self.over = False
        self.selector = selectors.DefaultSelector()

    def run(self) -> None:
        self._start()
        while not self.over:
            for key, _ in self.selector.select():
                react: Callable[[], None] = key.data
                react()
        self._end()

    def _watch(self, source: int | socket.socket, react: Callable[[], None]) -> None:
        self.selector.register(source, selectors.EVENT_READ, react)

    def _start(self) -> None:
        self.terminal, console = os.openpty()
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.trouble, trouble = os.pipe()
        permission, go = os.pipe()
        linux.unshare(Namespace.PID)
        self.pid = os.fork()
        if self.pid == 0:
            self._inner(permission, go, trouble, os.ttyname(console))
        os.close(trouble)
        os.close(permission)
        # The slave side stays open: without it the terminal reports EIO whenever nobody writes.
        self.process = os.pidfd_open(self.pid)
        self._watch(0, self._input)
        self._watch(self.terminal, self._read_console)
        self._watch(self.notify, self._read_notify)
        self._watch(self.process, self._ended)
        self._watch(self.trouble, self._read_trouble)
        with contextlib.suppress(ProcessLookupError):
            self._watch(os.pidfd_open(self.plan.caller), self._stop)
        tell(MachineStarted(self.pid, str(self.cgroup)))
        os.write(go, b"g")
        os.close(go)

    def _inner(self, permission: int, go: int, trouble: int, console: str) -> None:
        try:
            os.close(go)
            os.setsid()
            linux.die_with_starter(signal.SIGKILL)
            # A keeper that died before the line above took effect never says go.
            if os.read(permission, 1) == b"g":
                (self.cgroup / "cgroup.procs").write_text("0")
                interior.become(self.plan, console, self.notify)
        except BaseException as error:
            os.write(trouble, _explain(error).encode())
        os._exit(1)

    def _stop(self) -> None:
        self.over = True

    def _input(self) -> None:
        # A word from the caller or its end: either way the machine is not wanted any more.
        os.read(0, 4096)
        self._stop()

    def _read_console(self) -> None:
        self.console += os.read(self.terminal, 65536)
        del self.console[:-_CONSOLE_LIMIT]

    def _read_notify(self) -> None:
        message = self.notify.recv(65536).splitlines()
        if f"X_SYSTEMD_UNIT_INACTIVE={interior.TARGET}".encode() in message:
            tell(Stopping())
        elif b"READY=1" in message:
            tell(MachineReady())

    def _read_trouble(self) -> None:
        message = os.read(self.trouble, 65536)
        self.selector.unregister(self.trouble)
        if message:
            tell(Failed(message.decode()))

    def _ended(self) -> None:
        self._reap()
        self._stop()

    def _reap(self) -> None:
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)

    def _end(self) -> None:
        """Kill PID 1 (and with it everything in its namespace), then remove the cgroups."""
        deadline = time.monotonic() + _END_TIMEOUT
        # Whoever entered reaps what it forked inside; until that is done the namespace stays.
        self._resume_commands()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process, signal.SIGKILL)
        patient = self._await_end(_END_TIMEOUT / 4)
        (self.cgroup / "cgroup.kill").write_text("1")
        leftover = remove_when_empty(self.cgroup, deadline)
        if not patient and not self._await_end(deadline - time.monotonic()):
            leftover = (
                leftover or f"process {self.pid}: something does not reap what it started there"
            )
        self._drain_console()
        tell(Gone(self.console.decode(errors="replace"), self.status, leftover))

    def _resume_commands(self) -> None:
        for listing in self.cgroup.glob("commands/*/cgroup.procs"):
            for pid in listing.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGCONT)

    def _await_end(self, seconds: float) -> bool:
        """Wait up to `seconds` for the end of PID 1 and reap it; return whether it has ended."""
        if self.status is None:
            if not select.select([self.process], [], [], max(0.0, seconds))[0]:
                return False
            self._reap()
        return True

    def _drain_console(self) -> None:
        os.set_blocking(self.terminal, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._read_console()


def remove_when_empty(cgroup: Path, deadline: float) -> str:
    """Remove `cgroup` once its processes are gone; return "", or what is left at `deadline`."""
    events = os.open(cgroup / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    # The kernel reports a change of cgroup.events as POLLPRI.
    poll = select.poll()
    poll.register(events, select.POLLPRI)
    try:
        while b"populated 1" in os.pread(events, 4096, 0):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return f"cgroup {cgroup} still has processes"
    finally:
        os.close(events)
    try:
        cgroups.remove(cgroup)
    except OSError as error:
        return str(error)
    return ""


def tell(event: MachineEvent) -> None:
    """Report `event` to the caller, if it is still there."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, msgspec.json.encode(event) + b"\n")


def _explain(error: BaseException) -> str:
    """Format an error: one line for an OSError, the traceback for anything else."""
    return str(error) if isinstance(error, OSError) else "".join(traceback.format_exception(error))


def _read_plan() -> Plan:
    line = bytearray()
    while not line.endswith(b"\n"):
        # Byte-wise, so that nothing after the plan is taken: the rest of the input is the lifeline.
        piece = os.read(0, 1)
        if not piece:
            raise SystemExit(1)
        line += piece
    return msgspec.json.decode(line, type=Plan)


def main() -> None:
    """Keep one machine until the standard input ends."""
    # Only the caller's end or its word ends the machine; a Ctrl-C in its terminal reaches it alone.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    plan = _read_plan()
    try:
        _Keeper(plan).run()
    except OSError as error:
        tell(Failed(_explain(error)))
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
