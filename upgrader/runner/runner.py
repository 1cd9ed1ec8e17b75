# SPDX-License-Identifier: LGPL-2.1-or-later
"""The main process of a unit whose program knows nothing of upgrader: an instance that holds the
listeners, and never accepts from them; the program does.

A program is found again whatever happens to its runner: its pidfd is in the FD store before it may
run. So the old program serves on through a restart and a crash, and whichever runner serves next
drains it once its own program is ready.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from socket import socket as Socket
from typing import Any

import upgrader
from upgrader.aio.instance import Instance
from upgrader.codes import Code
from upgrader.errors import BusError, DeclarationError, UpgradeError, VerifyError
from upgrader.protocol.identity import identify
from upgrader.protocol.programs import Passing, Readiness
from upgrader.protocol.rendezvous import PREFLIGHT, PREFLIGHT_1
from upgrader.runner.children import Children
from upgrader.runner.getsocks import OldHaproxy
from upgrader.runner.notifications import Notifications, relayed
from upgrader.runner.options import RunnerOptions
from upgrader.runner.passing import Given, arguments, variables
from upgrader.runner.processes import RunningProcess, end
from upgrader.runner.readiness import listens
from upgrader.runner.shared_sockets import Paths, SocketSettings, record
from upgrader.runner.spawn import Held, StartOrder, soft_limits
from upgrader.systemd.bus import Bus
from upgrader.systemd.fdstore import StoreName
from upgrader.systemd.listen_fds import Passed, forget
from upgrader.systemd.main_command import given_environment
from upgrader.systemd.own_unit import TIMEOUT
from upgrader.systemd.process_start import process_started
from upgrader.systemd.subreaper import adopt_orphans

#: Signals that an admin sends to the main process and means for the program.
FORWARDED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
#: What is done with a program that was refused: nobody is told before it is gone.
REFUSED = 2.0  # seconds for its drain signal
_HARD = ((signal.SIGTERM, 1.0),)  # then, before SIGKILL
_MOST = 2  # programs that are drained at a time
_LOOK = 0.01  # seconds between two looks whether a program listens
_KEPT = "program."  # what is kept with PID 1 is called so, and by its PID
_ORDINARY = "/proc/{}/oom_score_adj"
#: SocketSettings with which a process cannot outlive the stop of its unit, and their harmless values.
_BOUND_TO_A_START = {"PrivateTmp": False, "DynamicUser": False, "PrivatePIDs": "no"}

_log = logging.getLogger("upgrader")


class ProgramEnded(UpgradeError):
    """The program has ended by itself, with `status` (negative for a signal)."""

    def __init__(self, program: str, status: int) -> None:
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        super().__init__(f"{program} has ended {how}")
        self.status = status


@upgrader.state("upgrader-run")
class ToldToDrain:
    """Programs that were told to drain, by PID: they are not told twice."""

    pids: list[int] = field(default_factory=list)


class Runner:
    """One runner, from its start to its end."""

    def __init__(self, options: RunnerOptions) -> None:
        self._options = options
        self._limits = soft_limits()  # before the library raises them
        self._given = given_environment()
        self._environment = _of_the_program(self._given)
        self._serves = False  # this is the owner, and PID 1 listens to it
        self._program: RunningProcess | None = None
        self._old: dict[str, RunningProcess] = {}  # by what PID 1 keeps them as
        self._settings: list[SocketSettings] = []  # as this program wants them
        self._paths = Paths(options.pid_file)
        self._properties: dict[str, Any] = {}

    async def run(self) -> None:
        """Start the program, look after it, and end or leave it; raises SystemExit."""
        adopt_orphans()
        loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._ready = asyncio.Event()
        self._children = Children()
        self._notifications = Notifications(self._hear)
        loop.add_reader(self._notifications, self._notifications.receive)
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        for number in FORWARDED:
            loop.add_signal_handler(number, self._forward, number)
        try:
            async with upgrader.attach(self._options.name) as self._instance:
                self._declare(self._instance)
                ended = await self._instance.serve([self.look_after])
                await self._leave(ended)
        except SystemExit:
            if self._stopping.is_set():  # told so before it served: for PID 1, no failure
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            raise

    def _declare(self, instance: Instance) -> None:
        listen = [(each.name, each.address) for each in self._options.listen]
        listen = listen or [(name, None) for name in _passed_names(self._given)]
        if not listen:
            raise DeclarationError("--listen", "the program is given no listener")
        self._listeners = [instance.listener(name, bind=address) for name, address in listen]
        self._told = instance.state(ToldToDrain)
        instance.prepare(self.start)
        instance.refused(self.end_refused)
        instance.reload(self.reload)
        for path in _files(self._options.program):
            instance.watch_file(path)
        with contextlib.suppress(BusError), Bus(TIMEOUT) as bus:
            self._properties = bus.properties(instance._parts.report.unit)

    # Starting a program

    async def start(self) -> None:
        """Start the program beside the one that serves; return when it is ready and checked.

        Raises VerifyError, and nothing is left of it then. A preflight starts nothing: on these
        listeners, it would serve.
        """
        if {PREFLIGHT, PREFLIGHT_1} & self._given.keys():
            await self._require_startable()
            return
        starting = asyncio.ensure_future(self._start())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            starting.cancel()  # does nothing if it is done
            await asyncio.wait((starting,))
        if starting.cancelled():
            why = "told to stop before the program was ready"
            raise VerifyError(why, code=Code.TAKEOVER_STOPPED)
        starting.result()

    async def _start(self) -> None:
        sockets = self._sockets
        settings = record(sockets)
        given = [Given(n, s, s.getsockname()) for n, s in self._named_sockets]
        with contextlib.ExitStack() as until_ready:
            words = self._options.program
            if self._options.passing is Passing.HAPROXY:
                path = Path(self._runtime_directory, f"haproxy-{os.getpid()}.sock")
                until_ready.callback(OldHaproxy(path, sockets).close)
                words = [words[0], "-x", str(path), *words[1:]]
            await self._start_held(Held(self._order(words, given)), settings)

    async def _start_held(self, held: Held, settings: Sequence[SocketSettings]) -> None:
        sockets = self._sockets
        program = held.process
        self._children.expect(program.pid)
        self._notifications.program = program.pid
        try:
            with contextlib.closing(held):
                self._instance.keep(f"{_KEPT}{program.pid}", program.pidfd)
                held.release()
            await self._until_ready(program)
            if self._instance._parts.destination.live or self._kept():
                for each in settings:
                    each.require_kept(str(program))
            if self._options.check:
                await self._require(self._options.check, MAINPID=str(program.pid))
        except BaseException:
            await self._refuse(program, settings)
            raise
        for each in settings:
            each.restore(options=False)
        self._program, self._settings = program, record(sockets)
        self._paths.keep(sockets)
        self._paths.note_pid(program.pid)

    async def _refuse(self, program: RunningProcess, settings: Sequence[SocketSettings]) -> None:
        # An orphan of the program is this process's child by now.
        below = [program, *RunningProcess.of(os.getpid()).tree()[1:]]
        await _in_thread(end, below, ((self._options.drain, REFUSED), *_HARD))
        for each in settings:
            each.restore(options=True)
        self._paths.restore()
        if not self._instance._parts.destination.live:  # else the one that serves keeps it
            await _in_thread(self._instance.forget, f"{_KEPT}{program.pid}")

    def end_refused(self, items: Sequence[Passed]) -> None:
        """In a thread: end what a new runner has started, which has not taken over and may be gone."""
        started = [RunningProcess(item.fd.duplicate()) for item in items]
        end(started, ((self._options.drain, REFUSED), *_HARD))
        for each in self._settings:
            each.restore(options=True)
        self._paths.restore()

    async def _require_startable(self) -> None:
        """Have the program test its configuration, if it can; raises VerifyError."""
        words = self._options.program
        if shutil.which(words[0]) is None:
            raise VerifyError(f"{words[0]}: no such program")
        if self._options.test:
            await self._require([*words, *self._options.test])

    async def _until_ready(self, program: RunningProcess) -> None:
        ended = self._children.end_of(program.pid)
        waiting = asyncio.ensure_future(self._readiness(program))
        try:
            await asyncio.wait((waiting, ended), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise VerifyError(
                    f"{ProgramEnded(str(program), ended.result())}, before it was ready"
                )
            waiting.result()
        finally:
            waiting.cancel()

    async def _readiness(self, program: RunningProcess) -> None:
        match self._options.ready:
            case Readiness.NOTIFY:
                await self._ready.wait()
            case Readiness.AFTER:
                await asyncio.sleep(self._options.ready_after)
            case Readiness.LISTENING:
                inodes = [identify(sock).inode for sock in self._sockets]
                while not listens(program, inodes):
                    await asyncio.sleep(_LOOK)

    async def _require(self, words: Sequence[str], **variables: str) -> None:
        """Run a command to its end; raises VerifyError unless that is 0."""
        environment = {**self._environment, **variables}
        live = self._instance._parts.destination.live
        held = Held(StartOrder(words, environment, limits=self._limits))
        self._children.expect(held.process.pid)
        try:
            if not self._serves:  # should this process be killed, it must not run on
                self._instance.keep(f"{_KEPT}{held.process.pid}", held.process.pidfd)
            held.release()
            status = await self._children.end_of(held.process.pid)
        except BaseException:
            await _in_thread(end, [held.process], ())
            raise
        finally:
            if not (live or self._serves):
                await _in_thread(self._instance.forget, f"{_KEPT}{held.process.pid}")
        if status != 0:
            raise VerifyError(str(ProgramEnded(words[0], status)))

    @property
    def _runtime_directory(self) -> str:
        return self._given.get("RUNTIME_DIRECTORY", "").partition(":")[0] or "/run"

    def _order(self, words: Sequence[str], given: Sequence[Given]) -> StartOrder:
        options = self._options
        own: list[str] = [n for n in ("SYSTEMD_EXEC_PID", "WATCHDOG_PID") if n in self._environment]
        if options.passing is Passing.LISTEN_FDS:
            own.append("LISTEN_PID")
        environment = {**self._environment, **variables(options.passing, given)}
        if "NOTIFY_SOCKET" in environment:
            environment["NOTIFY_SOCKET"] = self._notifications.address
        return StartOrder(
            arguments(words, given),
            environment,
            [each.sock for each in given],
            own,
            self._limits,
            ignores_sigpipe=self._properties.get("IgnoreSIGPIPE", True),
        )

    @property
    def _named_sockets(self) -> list[tuple[str, Socket]]:
        return [(each.name, sock) for each in self._listeners for sock in each.sockets]

    @property
    def _sockets(self) -> list[Socket]:
        return [sock for _, sock in self._named_sockets]

    def _kept(self) -> dict[str, RunningProcess]:
        """All programs that PID 1 keeps, this one's and those of earlier runners."""
        kept = [p for p in self._instance.passed if p.name.startswith(_KEPT)]
        return {item.name: RunningProcess(item.fd.duplicate()) for item in kept}

    # While it serves

    async def look_after(self) -> None:
        """Drain what served before, and wait for the end of the program, which raises ProgramEnded."""
        assert self._program
        self._serves = True
        own = f"{_KEPT}{self._program.pid}"
        self._old = {name: each for name, each in self._kept().items() if name != own}
        self._make_ordinary(self._program)
        old = sorted(self._old, key=lambda name: _age(self._old[name]))
        limit = self._options.drain_limit
        drains = [
            asyncio.ensure_future(self._drain(name, limit if place < _MOST else 0))
            for place, name in enumerate(old)
        ]
        try:
            status = await self._children.end_of(self._program.pid)
        finally:
            for each in drains:
                each.cancel()
        # What it has left behind would serve beside the next one.
        left = RunningProcess.of(os.getpid()).tree()[1:]
        await _in_thread(end, left, _HARD)
        raise ProgramEnded(" ".join(self._options.program), status)

    async def _drain(self, name: str, limit: float) -> None:
        process, told = self._old[name], self._told.value.pids
        if process.pid not in told and not process.ended:
            told.append(process.pid)
            process.send(self._options.drain)
        if not await _ended(process, limit):
            _log.warning("%s has not ended within %.0f s after it was replaced", process, limit)
            await _in_thread(end, [process], _HARD)
        self._paths.restore()
        told[:] = [pid for pid in told if pid != process.pid]
        await _in_thread(self._instance.forget, name)

    def _make_ordinary(self, program: RunningProcess) -> None:
        """A program that was started beside another one is the first to go when memory runs out, and
        from now on is no more than this process."""
        for each in program.tree():
            with contextlib.suppress(OSError):
                with open(_ORDINARY.format("self"), encoding="ascii") as file:
                    wanted = file.read()
                with open(_ORDINARY.format(each.pid), "w", encoding="ascii") as file:
                    file.write(wanted)

    async def reload(self) -> None:
        """Do what the program calls a reload; raises VerifyError if the command for it fails."""
        wanted = self._options.reload
        assert self._program
        if isinstance(wanted, signal.Signals):
            self._program.send(wanted)
        elif wanted:
            await self._require(wanted, MAINPID=str(self._program.pid))

    def _forward(self, number: signal.Signals) -> None:
        if self._program:
            self._program.send(number)

    def _hear(self, fields: Mapping[str, str]) -> None:
        """What the program says: the library tells PID 1 that the unit is ready."""
        if fields.get("READY") == "1":
            self._ready.set()
        if self._serves and (lines := relayed(fields)):
            with contextlib.suppress(UpgradeError):
                self._instance._parts.report.notifier.send(*lines)

    # The end

    async def _leave(self, ended: upgrader.Ended) -> None:
        """End the programs, or leave them to the runner that goes on with the listeners."""
        self._serves = False
        if ended is upgrader.Ended.MIGRATED and self._instance._runtime.replaced:
            await self._outlive_program()
            return
        if ended is upgrader.Ended.MIGRATED and self._may_be_left:
            return
        left = [each for each in self._kept().values() if not each.ended]
        patience = max(self._instance._runtime.deadline - time.monotonic() - _HARD[0][1], 1.0)
        await _in_thread(end, left, ((self._options.drain, patience), *_HARD))
        if ended is upgrader.Ended.STOPPED:
            self._paths.forget()

    async def _outlive_program(self) -> None:
        """The next runner drains it; but some programs take the death of their parent for an upgrade,
        and remove the files of their listeners at their end."""
        if self._program:
            await self._children.end_of(self._program.pid)

    @property
    def _may_be_left(self) -> bool:
        """Whether a program may outlive this process: PID 1 takes nothing away from under it."""
        return all(self._properties.get(n) in (None, "", v) for n, v in _BOUND_TO_A_START.items())


def _of_the_program(given: Mapping[str, str]) -> dict[str, str]:
    """What PID 1 gives a main process, without what is ours."""
    environment = {n: v for n, v in given.items() if not n.startswith("UPGRADER")}
    forget(environment)
    return environment


def _passed_names(environment: Mapping[str, str]) -> list[str]:
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    return list(dict.fromkeys(n for n in names if n and StoreName.parse(n) is None))


def _files(words: Sequence[str]) -> tuple[str, ...]:
    """The program and its scripts on disk. Its configuration has a reload."""
    paths = [shutil.which(words[0]) or "", *words[1:]]
    return tuple(
        os.path.abspath(path)
        for path in paths
        if os.path.isfile(path) and not os.path.abspath(path).startswith("/etc/")
    )


def _age(process: RunningProcess) -> float:
    """Seconds since boot at which it was started, the youngest first; 0 if it has ended."""
    try:
        return -process_started(process.pid)
    except OSError:
        return 0.0


async def _in_thread(call: Any, *values: Any) -> None:
    """Call something that waits, while the loop goes on, and to its end whatever happens here."""
    await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, call, *values))


async def _ended(process: RunningProcess, seconds: float) -> bool:
    """Whether a process ends in time."""
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    if process.ended:
        return True
    loop.add_reader(process, event.set)
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(process)
    return True
