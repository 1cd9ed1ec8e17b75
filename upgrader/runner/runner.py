# SPDX-License-Identifier: LGPL-2.1-or-later
"""The main process of a unit whose program knows nothing of upgrader: an instance that holds the
listeners, and never accepts from them; the program does.

A program is found again whatever happens to its runner: its pidfd is in the FD store before it may
run. So the old program serves on through a restart and a crash, and whichever runner serves next
drains it once its own program is ready.
"""

import asyncio
import contextlib
import functools
import logging
import math
import os
import signal
import time
from collections.abc import Sequence

import upgrader
from upgrader.codes import Code
from upgrader.errors import VerifyError
from upgrader.protocol.programs import Readiness
from upgrader.runner.adapters import adapter_for
from upgrader.runner.draining import Draining, ToldToDrain, draining
from upgrader.runner.host import PROGRAM, Host, ProgramEnded, in_thread
from upgrader.runner.kept_paths import Paths, put_back
from upgrader.runner.options import RunnerOptions
from upgrader.runner.processes import HARD, RunningProcess, end
from upgrader.runner.program_report import ProgramReport
from upgrader.runner.program_state import ProgramState
from upgrader.runner.shared_sockets import record
from upgrader.runner.shut_listeners import ShutListeners
from upgrader.runner.spawn import find_program
from upgrader.runner.start import ProgramStart
from upgrader.runner.waiting_process import WaitingProcess
from upgrader.systemd.subreaper import adopt_orphans

#: Signals that an admin sends to the main process and means for the program.
FORWARDED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
_ORDINARY = "/proc/{}/oom_score_adj"
#: What was waited for in vain, or the check was.
_UNREADY = {
    Readiness.NOTIFY: "it has not sent READY=1, or its check has not ended",
    Readiness.LISTENING: "it does not wait for its listeners in epoll(7), or its check has not ended",
    Readiness.AFTER: "its time was not over, or its check has not ended",
}
_REAPED = 5.0  # seconds in which a child that has ended is seen
_log = logging.getLogger("upgrader")


class Runner:
    """One runner, from its start to its end."""

    def __init__(self, options: RunnerOptions, waiting: WaitingProcess | None = None) -> None:
        """`waiting`: what the first program is made of."""
        self._options = options
        self._host = Host(options, waiting)
        self._adapter = adapter_for(self._host)
        self._program: RunningProcess | None = None
        self._paths = Paths(options.pid_file)
        self._start = ProgramStart(self._host, self._adapter, self._paths)
        self._state = ProgramState(self._host, self._adapter, self._start)
        self._report = ProgramReport(self._host, self._adapter)

    async def run(self) -> None:
        """Start the program, look after it, and end or leave it; raises SystemExit."""
        adopt_orphans()
        loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
        for number in FORWARDED:
            loop.add_signal_handler(number, self._forward, number)
        try:
            async with upgrader.attach(self._options.name) as self._instance:
                self._declare()
                with contextlib.closing(self._host):
                    ended = await self._instance.serve([self.look_after])
                    await self._leave(ended)
        except SystemExit:
            if self._stopping.is_set():  # told so before it served: for PID 1, no failure
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            raise

    def _declare(self) -> None:
        instance = self._instance
        put_back(self._options.listen)
        self._host.attach(instance, needs_listener=self._adapter.needs_listener)
        self._draining = Draining(
            self._host, self._adapter, self._paths, instance.state(ToldToDrain)
        )
        instance.prepare(self.start)
        instance.refused(self._start.end_refused)
        instance.reload(self.reload)
        self._state.declare(instance)
        for path in _files(self._options.program):
            instance.watch_file(path)

    async def start(self) -> None:
        """Start the program beside the one that serves; return when it is ready and checked.

        Raises VerifyError, and nothing is left of it then.
        """
        starting = asyncio.gather(self._start.run(), self._report.learn_version())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            stopped = starting.cancel()  # not if it is done
            await asyncio.wait((starting,))
        if stopped:
            starting.cancelled() or starting.exception()  # which is that it was cancelled
            why = f"told to stop before the program was ready: {_UNREADY[self._options.ready]}"
            raise VerifyError(
                why, remedy="--ready says how that is known", code=Code.TAKEOVER_STOPPED
            )
        self._program = self._state.program = starting.result()[0]

    # While it serves

    async def look_after(self) -> None:
        """Drain what served before, and wait for the end of the program, which raises ProgramEnded."""
        assert self._program
        self._host.serves = True
        await self._state.begin()  # before anything else: nobody serves
        self._make_ordinary(self._program)
        self._report.begin(self._program)
        self._draining.begin(self._program)
        self._host.on_named = self._go_on_with_another
        self._go_on_with_another()
        try:
            with self._paths.watched(), ShutListeners(record(self._host.sockets)) as listeners:
                status = await self._ends_unless(listeners.lost)
        finally:
            self._draining.cancel()
        # What it has left behind would serve beside the next one.
        left = RunningProcess.of(os.getpid()).tree()[1:]
        await in_thread(end, left, HARD)
        # One that has the listeners already serves sooner than one that is started again.
        await self._host.succeeded(self._start.began)
        if status == 0 and self._adapter.may_end:
            await in_thread(self._host.forget_all)
            logging.shutdown()
            os._exit(0)  # nobody goes on from here, so there is nothing to leave
        raise ProgramEnded(" ".join(self._options.program), status)

    def _go_on_with_another(self) -> None:
        """From now on, the process that the program has called its main one is the program: some upgrade
        themselves so. MAINPID= in sd_notify(3)."""
        pid = self._host.named
        if not (pid and self._program and pid != self._program.pid):
            return
        found = [each for each in RunningProcess.of(os.getpid()).tree()[1:] if each.pid == pid]
        if not found:
            return
        self._host.children.expect(pid)
        try:
            self._instance.keep(f"{PROGRAM}{pid}", found[0].pidfd)
        except upgrader.UpgradeError as error:
            _log.warning("%s cannot be the program: %s", found[0], error)
            return
        _log.info("%s is the program now, instead of %s", found[0], self._program)
        self._program = found[0]
        self._host.notifications.program = pid
        self._paths.note_pid(pid)
        self._report.begin(self._program)

    async def _ends_unless(self, lost: asyncio.Future[None]) -> int:
        """How the program has ended; raises what `lost` raises if that comes before."""
        ending = asyncio.ensure_future(self._end())
        try:
            await asyncio.wait((ending, lost), return_when=asyncio.FIRST_COMPLETED)
            return ending.result() if ending.done() else lost.result() or 1
        finally:
            ending.cancel()

    async def _end(self) -> int:
        """How the program has ended, and no other one goes on for it."""
        while True:
            program = self._program
            assert program
            await program.ends(math.inf)
            if program is self._program:
                break
            await in_thread(self._instance.forget, f"{PROGRAM}{program.pid}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REAPED):
                return await self._host.children.end_of(program.pid)
        return 1  # another process was its parent, and knows

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
            await self._host.run(wanted, MAINPID=str(self._program.pid))

    def _forward(self, number: signal.Signals) -> None:
        if self._program:
            self._program.send(number)

    # The end

    async def _leave(self, ended: upgrader.Ended) -> None:
        """End the programs, or leave them to the runner that goes on with the listeners."""
        self._host.serves = False
        if ended is upgrader.Ended.MIGRATED and self._instance._runtime.replaced:
            # Without a next runner, PID 1 starts one once this process has ended.
            if self._instance._parts.source.successor_lives():
                await self._outlive_program()
            return
        if ended is upgrader.Ended.MIGRATED and self._host.may_be_left:
            return
        adapter, stopped = self._adapter, ended is upgrader.Ended.STOPPED
        if stopped:
            self._paths.give_up()
        left = [each for each in self._host.programs().values() if not each.ended]
        for each in left:
            (adapter.stop if stopped or adapter.stateful else adapter.drain)(each)
        patience = max(self._instance._runtime.deadline - time.monotonic() - HARD[0][1], 1.0)
        async with draining(adapter, left):
            if stopped:
                await in_thread(end, left, ((None, patience), *HARD))
            else:
                await in_thread(functools.partial(adapter.end, left, patience, told=True))
        self._paths.restore()
        if stopped:
            self._paths.forget()
            await in_thread(self._host.forget_all)

    async def _outlive_program(self) -> None:
        """The next runner drains it; but some programs take the death of their parent for an upgrade,
        and remove the files of their listeners at their end."""
        if self._program:
            await self._host.children.end_of(self._program.pid)


def _files(words: Sequence[str]) -> tuple[str, ...]:
    """The program and its scripts on disk. Its configuration has a reload."""
    paths = [find_program(words[0]), *words[1:]]
    return tuple(
        os.path.abspath(path)
        for path in paths
        if os.path.isfile(path) and not os.path.abspath(path).startswith("/etc/")
    )
