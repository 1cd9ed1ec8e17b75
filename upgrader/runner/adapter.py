# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a runner asks about its program, and the answers for one that has listeners and no state.

The runner owns all FDs and processes, and decides when each call is made; an adapter knows the program.
A subclass in `upgrader/programs/` overrides what is special; docs/programs.md has one of each kind.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from upgrader.protocol.fd import Fd
from upgrader.protocol.programs import Passing, Readiness
from upgrader.runner.getsocks import OldHaproxy
from upgrader.runner.options import RunnerOptions
from upgrader.runner.passing import Given, arguments, variables
from upgrader.runner.processes import HARD, RunningProcess, end
from upgrader.runner.readiness import listens
from upgrader.runner.spawn import StartOrder

_LOOK = 0.01  # seconds between two looks whether a program listens


@dataclass(frozen=True, slots=True)
class StartRequest:
    """What a program is to be started with.

    `words` and `environment`: as PID 1 would start it; `listeners`: with their addresses; `shared`: what
    `ProgramAdapter.shared` has said, by name; `incoming`: another program's state will come to `load`, so it
    must not begin on its own; `private`: nothing that it does may be noticed, since it ends before
    anybody is its client: its listeners are its own, and `shared` is another program's.
    """

    words: Sequence[str]
    environment: Mapping[str, str]
    listeners: Sequence[Given]
    shared: Mapping[str, Fd] = field(default_factory=dict)
    incoming: bool = False
    private: bool = False


class AdapterHost(Protocol):
    """What the runner has for its adapter."""

    options: RunnerOptions
    directory: Path  #: for sockets and the like: RUNTIME_DIRECTORY=, or else /run

    @property
    def notified(self) -> asyncio.Event:
        """Set once the program that is being started has sent READY=1."""

    async def run(self, words: Sequence[str], **variables: str) -> None:
        """Run a command to its end, with further variables; raises VerifyError unless that is 0."""


class ProgramAdapter:
    """One kind of program. Each method is called on the runner's loop; what it raises refuses what is
    under way. Say VerifyError for what an admin should read.

    Without state (the default), the old and the new program serve side by side until the old one is
    drained. With it (`stateful`), only one of them serves at a time:

    - `starting`, `ready`, `check`: the new program is there, and waits; the old one serves.
    - `quiesce`: the old one serves still, for `drain-timeout` at most.
    - `save`: the old one stops, within `downtime-limit`.
    - `load`: the new one has the state, and does nothing with it yet.
    - `resume`: the new one serves, once its runner is the owner; or the old one does, if anything
      before that has failed.
    - `drain`: the old one, afterwards.
    """

    #: Whether its programs hand a state from one to the next, by the calls from `quiesce` to `resume`.
    stateful = False

    #: Whether it makes no sense without a listener.
    needs_listener = True

    #: Whether a program that ends by itself with status 0 has ended its unit well: a machine that was
    #: shut down from within. Of others, a runner fails then, and Restart= starts both again.
    may_end = False

    #: Whether an upgrade begins with a preflight unless its wish says otherwise: programs that may not
    #: load what another one has saved, and should be asked before the one that serves has stopped.
    preflight_first = False

    def __init__(self, host: AdapterHost) -> None:
        self.host = host
        #: What the program that was started last could do, for `upgrader status`; it decides nothing.
        self.offers: Sequence[str] = ()
        #: Paths of UNIX sockets that were made for it alone, as each program has others.
        self.sockets: Sequence[str] = ()

    @property
    def is_private(self) -> bool:
        """Whether the program can be started beside another one, and unnoticed (`StartRequest.private`): not
        one that finds its listeners by the addresses in its configuration."""
        words = self.host.options.program
        match self.host.options.passing:
            case Passing.LISTEN_FDS | Passing.SERVER_STARTER:
                return True
            case Passing.NONE:
                return any("{fd:" in word for word in words)
            case Passing.NGINX | Passing.HAPROXY | Passing.PHP_FPM:
                return False

    def shared(self, known: Mapping[str, Fd]) -> Mapping[str, Fd]:
        """The FDs that all programs of the unit share besides listeners, by name: memory, a device. Those
        that are not `known` are made here. The runner has PID 1 keep them; each start gets them."""
        return known

    @contextlib.asynccontextmanager
    async def starting(self, start: StartRequest) -> AsyncIterator[StartOrder]:
        """Say what process to start; what stands after the `yield` runs once it is ready, or has failed.

        The runner adds limits, the signals, and a NOTIFY_SOCKET= of its own.
        """
        options, words = self.host.options, start.words
        with contextlib.ExitStack() as until_ready:
            if options.passing is Passing.HAPROXY:
                path = self.host.directory / f"haproxy-{os.getpid()}.sock"
                sockets = [each.sock for each in start.listeners]
                until_ready.callback(OldHaproxy(path, sockets).close)
                words = [words[0], "-x", str(path), *words[1:]]
            yield StartOrder(
                arguments(words, start.listeners),
                {**start.environment, **variables(options.passing, start.listeners)},
                [each.sock for each in start.listeners],
                ["LISTEN_PID"] if options.passing is Passing.LISTEN_FDS else [],
            )

    async def ready(self, program: RunningProcess, start: StartRequest) -> None:
        """Return once the program serves, or waits for what is `incoming`; cancelled if it ends."""
        match self.host.options.ready:
            case Readiness.NOTIFY:
                await self.host.notified.wait()
            case Readiness.AFTER:
                await asyncio.sleep(self.host.options.ready_after)
            case Readiness.LISTENING:
                inodes = [os.fstat(each.sock.fileno()).st_ino for each in start.listeners]
                while not listens(program, inodes):
                    await asyncio.sleep(_LOOK)

    async def check(self, program: RunningProcess, start: StartRequest) -> None:
        """Find out whether it is good, once it is ready; the old one serves still."""
        if words := arguments(self.host.options.check, start.listeners):
            await self.host.run(words, MAINPID=str(program.pid))

    async def test(self) -> None:
        """What a preflight does with a program that is not `is_private`: test its configuration."""
        if self.host.options.test:
            await self.host.run([*self.host.options.program, *self.host.options.test])

    async def quiesce(self, program: RunningProcess) -> None:
        """Have it come to rest while it serves still, so that `save` is short. May be called in vain."""

    async def save(self, program: RunningProcess, state: Fd) -> None:
        """Have it stop, and write its state to a file in memory. It may be a program that an earlier
        runner has started, and that has died since."""

    async def load(self, program: RunningProcess, state: Fd) -> None:
        """Have a program that was started for what is `incoming` read it, to its end and without doing
        anything with it; the old one may `resume` still."""

    async def resume(self, program: RunningProcess) -> None:
        """Have it serve: with what it has loaded, or again after `save`, which may have failed."""

    def restore(self) -> None:
        """Set back what a program has changed of what is `shared`: it was refused, and has ended. In a
        thread, and in the runner that serves as well if its own is gone."""

    def drain(self, program: RunningProcess) -> None:
        """Have one that was replaced end after what it is at; called once. The runner bounds it, and one
        that is refused gets the drain signal."""
        program.send(self.host.options.drain)

    async def while_draining(self, program: RunningProcess) -> None:
        """Do what else it needs after `drain`; cancelled once it has ended, or when the next runner calls
        this. What it raises is told in the journal."""

    def end(
        self, programs: Sequence[RunningProcess], seconds: float, *, told: bool = False
    ) -> None:
        """In a thread: end programs whose listeners others go on with, and all below them. They get the drain
        signal, unless they were `told`, so many seconds for it, and have to end then."""
        end(programs, ((None if told else self.host.options.drain, seconds), *HARD))

    def stop(self, program: RunningProcess) -> None:
        """Have it end because the unit is stopped, within `drain-timeout`; `while_draining` is next."""
        self.drain(program)
