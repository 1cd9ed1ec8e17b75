# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a runner has for its program whatever it is at: its instance and children, what PID 1 has given it
and keeps for it, and commands."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from socket import socket as Socket
from typing import Any

from upgrader.aio.instance import AsyncioInstance
from upgrader.codes import Code
from upgrader.errors import BusError, DeclarationError, UpgradeError, VerifyError
from upgrader.protocol.fd import Fd
from upgrader.protocol.parameters import Mode
from upgrader.runner.children import Children
from upgrader.runner.notifications import Notifications, relayed
from upgrader.runner.options import Listen, RunnerOptions
from upgrader.runner.passing import Given
from upgrader.runner.processes import HARD, RunningProcess, end, orphans
from upgrader.runner.spawn import Held, StartOrder, soft_limits
from upgrader.runner.waiting_process import WaitingProcess
from upgrader.systemd.bus import Bus
from upgrader.systemd.fdstore import StoreName
from upgrader.systemd.listen_fds import forget
from upgrader.systemd.main_command import given_environment
from upgrader.systemd.own_unit import TIMEOUT
from upgrader.systemd.process_start import process_started

#: What is kept with PID 1: a program, by its PID; what programs share, by its name; a state.
PROGRAM = "program."
TRIAL = "trial."  #: likewise, of a check and of a program that is only tried
SHARED = "shared."
STATE = "state"
#: What is set on a state once all of it is there. It may be emptied still.
WHOLE = fcntl.F_SEAL_GROW
#: Settings with which a process cannot outlive the stop of its unit, and their harmless values.
_BOUND_TO_A_START = {"PrivateTmp": False, "DynamicUser": False, "PrivatePIDs": "no"}
#: A command in front of another one, with which that writes to FD 3.
_TO_FD_3 = ("/bin/sh", "-c", 'exec "$@" </dev/null >&3 2>&3 3>&-', "sh")
_PATIENCE = 5.0  # seconds for a command that only tells something


class ProgramEnded(UpgradeError):
    """A process has ended by itself, with `status` (negative for a signal)."""

    def __init__(self, program: str, status: int) -> None:
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        super().__init__(f"{program} has ended {how}")
        self.status = status


class Host:
    """That of one runner; implements `adapter.AdapterHost`."""

    def __init__(self, options: RunnerOptions, waiting: WaitingProcess | None = None) -> None:
        """Before the library changes anything of this process."""
        self.options = options
        self._waiting = waiting  # for the first program
        self.given = given_environment()
        self.directory = Path(self.given.get("RUNTIME_DIRECTORY", "").partition(":")[0] or "/run")
        self.serves = False  #: this is the owner, and PID 1 listens to it
        self.named = 0  #: the process that the program has called its main one
        #: Called whenever it does, while this serves.
        self.on_named: Callable[[], None] = lambda: None
        self.properties: dict[str, Any] = {}  #: of the unit
        self._environment = _of_the_program(self.given)
        self._limits = soft_limits()

    def attach(self, instance: AsyncioInstance, *, needs_listener: bool) -> None:
        """Declare the listeners; raises DeclarationError if there are none and one is needed."""
        self.instance = instance
        self.children = Children()
        self.notified = asyncio.Event()
        self.notifications = Notifications(self._hear, self.directory)
        asyncio.get_running_loop().add_reader(self.notifications, self.notifications.receive)
        listen = self.options.listen or [Listen(name, None) for name in _passed_names(self.given)]
        if needs_listener and not listen:
            raise DeclarationError("--listen", "the program is given no listener")
        self._declared = [
            (instance.datagrams if each.datagrams else instance.listener)(
                each.name, bind=each.address
            )
            for each in listen
        ]
        with contextlib.suppress(BusError), Bus(TIMEOUT) as bus:
            self.properties = bus.properties(instance._parts.report.unit)

    def close(self) -> None:
        """Hear nothing of a program any more."""
        asyncio.get_running_loop().remove_reader(self.notifications)
        self.notifications.close()

    @property
    def listeners(self) -> list[Given]:
        """All sockets that the program is given."""
        sockets = [(each.name, sock) for each in self._declared for sock in each.sockets]
        return [Given(name, sock, sock.getsockname()) for name, sock in sockets]

    @property
    def sockets(self) -> list[Socket]:
        """The same, without their names."""
        return [sock for each in self._declared for sock in each.sockets]

    def sockets_of(self, name: str) -> list[Socket]:
        """Those of one listener; from any thread."""
        return [sock for each in self._declared if each.name == name for sock in each.sockets]

    @property
    def is_live(self) -> bool:
        """Whether this runner was started beside another one, that serves."""
        return self.instance._parts.destination.live

    @property
    def environment(self) -> dict[str, str]:
        """What PID 1 gives a main process of the unit."""
        return dict(self._environment)

    @property
    def may_be_left(self) -> bool:
        """Whether a program may outlive this process: PID 1 takes nothing away from under it."""
        return all(self.properties.get(n) in (None, "", v) for n, v in _BOUND_TO_A_START.items())

    @property
    def leaves_program(self) -> bool:
        """Whether this process ends, or becomes another one, and its program serves on meanwhile."""
        migration = self.instance._parts.report.progress.now
        if migration.mode == Mode.EXEC and not migration.phase.ended:
            return True
        return self.instance._runtime._stop.is_set() and self.may_be_left

    # What PID 1 keeps

    def programs(self) -> dict[str, RunningProcess]:
        """All processes that PID 1 keeps, those of earlier runners as well, by the name of that."""
        found = {}
        for item in self.instance.passed:
            if item.name.startswith((PROGRAM, TRIAL)):
                with contextlib.suppress(OSError):
                    found[item.name] = RunningProcess(item.fd.duplicate())
        return found

    def shared(self) -> dict[str, Fd]:
        """What its programs share, by name."""
        passed = self.instance.passed
        return {p.name.removeprefix(SHARED): p.fd for p in passed if p.name.startswith(SHARED)}

    @property
    def state(self) -> Fd | None:
        """What a program has saved, if no other one may have gone on from it."""
        for item in self.instance.passed:
            if item.name == STATE and _is_whole(item.fd):
                return item.fd
        return None

    def keep_shared(self, wanted: Mapping[str, Fd]) -> None:
        """Have PID 1 keep what it does not know yet; raises as `Instance.keep`."""
        known = self.shared()
        for name, fd in wanted.items():
            if name not in known:
                self.instance.keep(SHARED + name, fd)

    def forget_all(self) -> None:
        """Have PID 1 give up all that it keeps for programs: the unit has ended."""
        names = [item.name for item in self.instance.passed]
        for name in names:
            if name == STATE or name.startswith((PROGRAM, TRIAL, SHARED)):
                self.instance.forget(name)

    # Processes

    def hold(self, order: StartOrder, *, notifies: bool = False) -> Held:
        """A process that becomes what is ordered as PID 1 would start it, and is kept before it may;
        raises OSError and NotifyError."""
        own = [*order.own_pid]
        own += [n for n in ("SYSTEMD_EXEC_PID", "WATCHDOG_PID") if n in order.environment]
        environment, waiting = dict(order.environment), None
        if notifies:
            waiting, self._waiting = self._waiting or WaitingProcess(), None
            if "NOTIFY_SOCKET" in environment:
                environment["NOTIFY_SOCKET"] = self.notifications.name_for(waiting.pid)
        held = Held(
            StartOrder(
                order.arguments,
                environment,
                order.fds,
                own,
                self._limits,
                ignores_sigpipe=self.properties.get("IgnoreSIGPIPE", True),
            ),
            waiting,
        )
        self.children.expect(held.process.pid)
        return held

    async def run(self, words: Sequence[str], **variables: str) -> None:
        """Run a command to its end, and what it leaves in the background, with further variables; raises
        VerifyError unless that is 0."""
        held = self.hold(StartOrder(words, {**self._environment, **variables}))
        name, serves = f"{TRIAL}{held.process.pid}", self.serves
        try:
            with contextlib.closing(held):
                if not serves:  # should this process be killed, it must not run on
                    self.instance.keep(name, held.process.pidfd)
                held.release()
            status = await self.children.end_of(held.process.pid)
        except BaseException:
            await in_thread(end, [held.process], ())
            raise
        finally:
            # What it has left in the background would stay for as long as the unit is there.
            await in_thread(end, orphans(held.process.pid), HARD)
            if not (serves or self.is_live):  # else the one that serves gives it up
                await in_thread(self.instance.forget, name)
        if status != 0:
            raise VerifyError(str(ProgramEnded(words[0], status)))

    async def succeeded(self, began: float) -> None:
        """Return once the upgrade under way has come to its end, if there is a program with the listeners
        that was started after this one, which `began` then (see `process_started`)."""
        progress = self.instance._parts.report.progress
        limit = self.instance._parts.report.parameters.migration_timeout
        younger = False
        for name, process in self.programs().items():
            if name.startswith(PROGRAM) and not process.ended:
                with contextlib.suppress(OSError):
                    younger |= process_started(process.pid) > began
        if younger and not progress.now.phase.ended:
            await in_thread(progress.wait_decided, progress.last.id, limit)

    async def output(self, words: Sequence[str], most: int) -> str:
        """What a command writes, so many bytes at most; raises VerifyError if it takes long, and OSError."""
        reading, writing = map(Fd, os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
        with reading:
            with writing:
                os.set_blocking(writing.fileno(), True)
                held = self.hold(StartOrder([*_TO_FD_3, *words], self._environment, [writing]))
            try:
                with contextlib.closing(held):
                    held.release()
                async with asyncio.timeout(_PATIENCE):
                    await self.children.end_of(held.process.pid)
            except TimeoutError:
                raise VerifyError(f"{words[0]} has not ended within {_PATIENCE:g} s") from None
            finally:
                await in_thread(end, [held.process], ())
            with contextlib.suppress(BlockingIOError):
                return os.read(reading.fileno(), most).decode(errors="replace")
        return ""

    async def lives(self, program: RunningProcess, work: Coroutine[Any, Any, None]) -> None:
        """Wait for some work on a program that this runner has started; cancel it and raise VerifyError if
        the program ends before."""
        ended, doing = self.children.end_of(program.pid), asyncio.ensure_future(work)
        try:
            await asyncio.wait((doing, ended), return_when=asyncio.FIRST_COMPLETED)
            if program.ended:  # which explains whatever the work has met
                await ended
            if ended.done():
                raise VerifyError(
                    f"{ProgramEnded(str(program), ended.result())}, before it was ready",
                    code=Code.ENDED_EARLY,
                )
            doing.result()
        finally:
            doing.cancel()

    def _hear(self, fields: Mapping[str, str]) -> None:
        """What the program says: the library tells PID 1 that the unit is ready."""
        if fields.get("READY") == "1":
            self.notified.set()
        if (named := fields.get("MAINPID", "")).isdecimal():
            self.named = int(named)
            if self.serves:
                self.on_named()
        report = self.instance._parts.report
        # Nobody but a first instance is heard by PID 1 before it serves, and nobody once it is replaced.
        heard = (self.serves or not self.is_live) and report.speaks
        if heard and (lines := relayed(fields)):
            with contextlib.suppress(UpgradeError):
                report.notifier.send(*lines)


def _is_whole(state: Fd) -> bool:
    """Whether a program has saved all of it, and nobody has gone on from it."""
    seals = fcntl.fcntl(state.fileno(), fcntl.F_GET_SEALS)
    return bool(seals & WHOLE and os.fstat(state.fileno()).st_size)


def leader(name: str) -> int:
    """The PID of a process that PID 1 keeps by this name; it leads a session, and may be gone."""
    return int(name.rpartition(".")[2])


async def in_thread(call: Callable[..., object], *values: Any) -> None:
    """Call something that waits, while the loop goes on, and to its end whatever happens here."""
    await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, call, *values))


def _of_the_program(given: Mapping[str, str]) -> dict[str, str]:
    """What PID 1 gives a main process, without what is ours."""
    environment = {n: v for n, v in given.items() if not n.startswith("UPGRADER")}
    forget(environment)
    return environment


def _passed_names(environment: Mapping[str, str]) -> list[str]:
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    return list(dict.fromkeys(n for n in names if n and StoreName.parse(n) is None))
