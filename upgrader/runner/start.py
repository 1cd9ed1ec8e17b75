# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starting a program beside the one that serves, until it is ready and checked; or nothing is left of
it."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from socket import socket as Socket

from upgrader.errors import VerifyError
from upgrader.protocol.rendezvous import PREFLIGHT, PREFLIGHT_1
from upgrader.runner.accepted import Accepted
from upgrader.runner.adapter import ProgramAdapter, StartRequest
from upgrader.runner.host import PROGRAM, TRIAL, Host, in_thread, leader
from upgrader.runner.kept_paths import Paths
from upgrader.runner.passing import Given
from upgrader.runner.private_listeners import private_listeners
from upgrader.runner.processes import HARD, RunningProcess, end, session
from upgrader.runner.readiness import has
from upgrader.runner.shared_sockets import SocketSettings, record
from upgrader.runner.spawn import StartOrder, find_program
from upgrader.systemd.listen_fds import Passed
from upgrader.systemd.process_start import process_started

#: What is done with a program that was refused: nobody is told before it is gone.
REFUSED = 2.0  # seconds for its drain signal
_log = logging.getLogger("upgrader")


class ProgramStart:
    """The start of the program of one runner."""

    def __init__(self, host: Host, adapter: ProgramAdapter, paths: Paths) -> None:
        self.began = 0.0  #: when the program was started, as of `process_started`
        self.incoming = False  #: it waits for another program's state
        self.settings: list[SocketSettings] = []  #: of the listeners, as the program wants them
        self._host = host
        self._adapter = adapter
        self._paths = paths

    @property
    def is_preflight(self) -> bool:
        """Whether the program must not be noticed."""
        return bool({PREFLIGHT, PREFLIGHT_1} & self._host.given.keys())

    async def run(self) -> RunningProcess | None:
        """Start it; None if it was only tried. Raises VerifyError and OSError, and nothing is left then.

        With a check, and while another program serves, it is tried in private first: as soon as it has
        the listeners, clients may be answered by it.
        """
        program = None
        try:
            program = await self._run()
        finally:
            if program is None:
                # None is started after it, and takeover kills this process as soon as it says so.
                self._host.notifications.withdraw()
        return program

    async def _run(self) -> RunningProcess | None:
        host, adapter = self._host, self._adapter
        if not host.is_live:
            for old in host.programs().values():
                if not old.ended:
                    host.notifications.stand_in_for(old.pid)
        words = host.options.program
        if not find_program(words[0]):
            raise VerifyError(f"{words[0]}: no such program")
        if self.is_preflight:
            if adapter.is_private:
                return await self._try(ends=not adapter.stateful)
            await adapter.test()
            return None
        if adapter.is_private and not adapter.stateful and host.options.check and self._is_beside:
            await self._try(ends=True)
        if host.options.socket_modes:
            from upgrader.runner.socket_modes import set_modes  # seldom needed

            set_modes(host.options.socket_modes, host.listeners)
        start = self._what(host.listeners)
        settings = record(host.sockets)
        if host.options.blocking:
            for sock, each in zip(host.sockets, settings, strict=True):
                each.require_blocking(beside=self._may_be_served(sock))
        async with adapter.starting(start) as order:
            program = await self._start(order, start, settings)
        for each in settings:
            each.restore(options=False)
        self.settings = record(host.sockets)
        self._paths.keep(host.sockets)
        self._paths.note_pid(program.pid)
        return program

    async def refuse(
        self, program: RunningProcess, settings: Sequence[SocketSettings] | None = None
    ) -> None:
        """End a program and all below it, and put back what it has changed."""
        await in_thread(self._adapter.end, [program], REFUSED)
        # An orphan of the program is this process's child by now.
        left = RunningProcess.of(os.getpid()).tree()[1:]
        await in_thread(end, left, ((self._host.options.drain, REFUSED), *HARD))
        await in_thread(self._put_back, self.settings if settings is None else settings)
        if not self._host.is_live:  # else the one that serves gives it up
            for kept in (PROGRAM, TRIAL):
                await in_thread(self._host.instance.forget, f"{kept}{program.pid}")

    def end_refused(self, items: Sequence[Passed]) -> None:
        """In a thread: end what a new runner has started, which has not taken over and may be gone."""
        kept = [item for item in items if item.name.startswith((PROGRAM, TRIAL))]
        started = [RunningProcess(item.fd.duplicate()) for item in kept]
        self._adapter.end(started, REFUSED)
        # One that was killed has left its workers behind, which accept.
        left = [each for item in kept for each in session(leader(item.name))]
        end(left, ((self._host.options.drain, REFUSED), *HARD))
        self._put_back(self.settings)
        self._host.notifications.remove_dead()

    def _put_back(self, settings: Sequence[SocketSettings]) -> None:
        """In a thread: undo what a program that was refused has changed."""
        self._adapter.restore()
        for each in settings:
            each.restore(options=True)
        self._paths.restore()

    @property
    def _is_beside(self) -> bool:
        """Whether another program may serve."""
        return self._host.is_live or any(not p.ended for p in self._host.programs().values())

    def _may_be_served(self, sock: Socket) -> bool:
        """Whether another program may have a listener. After a restart, that which is bound anew has none."""
        if self._host.is_live:
            return True
        inode = os.fstat(sock.fileno()).st_ino
        return any(has(each, inode) for each in self._host.programs().values() if not each.ended)

    def _what(self, listeners: Sequence[Given], *, private: bool = False) -> StartRequest:
        host, adapter = self._host, self._adapter
        shared = adapter.shared(host.shared())
        if not private:
            host.keep_shared(shared)
        self.incoming = adapter.stateful and (self._is_beside or host.state is not None)
        return StartRequest(
            host.options.program, host.environment, listeners, shared, self.incoming, private
        )  # fmt: skip

    async def _try(self, *, ends: bool) -> RunningProcess | None:
        """Start it where nobody notices; unless it `ends` then, it waits for a state."""
        host = self._host
        with private_listeners(host.listeners, host.directory) as listeners:
            start = self._what(listeners, private=True)
            async with self._adapter.starting(start) as order:
                program = await self._start(order, start, [])
            if not ends:
                return program
            await self.refuse(program, [])
        return None

    async def _start(
        self, order: StartOrder, start: StartRequest, settings: Sequence[SocketSettings]
    ) -> RunningProcess:
        host, adapter = self._host, self._adapter
        host.notified.clear()
        host.named = 0
        held = host.hold(order, notifies=True)
        program = held.process
        self.began = process_started(program.pid)
        host.notifications.program = program.pid
        accepted = Accepted(program, start.listeners)
        beside = self._is_beside and not start.private
        watching = asyncio.ensure_future(accepted.watch()) if beside else None
        try:
            with contextlib.closing(held):
                kept = TRIAL if start.private else PROGRAM
                host.instance.keep(f"{kept}{program.pid}", program.pidfd)
                held.release()
            for wait in (adapter.ready, adapter.check):
                await host.lives(program, wait(program, start))
                for each in settings if beside else ():
                    each.require_kept(str(program))
        except BaseException as error:
            await self.refuse(program, settings)
            if accepted.count and isinstance(error, VerifyError):
                why = f"{error.message}; it had at least {accepted.count} clients by then"
                raise VerifyError(why, remedy=error.remedy) from error
            raise
        finally:
            if watching:
                watching.cancel()
        if accepted.count:
            _log.info("%s had at least %d clients before it took over", program, accepted.count)
        return program
