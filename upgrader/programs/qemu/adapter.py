# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a runner does with QEMUs: each machine has one that runs it, and for a moment a next one.

The next one is complete before the machine is stopped, and stands still with the state loaded until its
runner is the owner. So at each instant one of the two can go on, and only one ever does.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import structs

from upgrader.backends.tap import TapFacts
from upgrader.errors import VerifyError
from upgrader.instance.control_listener import remove_dead
from upgrader.programs import AdapterHost, ProgramAdapter, RunningProcess, StartOrder, StartRequest
from upgrader.programs.qemu import shared, tap
from upgrader.programs.qemu.machine import Machine, Placing, difference, token
from upgrader.programs.qemu.monitor import SAVABLE, Monitor, QemuEnded, QemuError
from upgrader.programs.qemu.offers import offers
from upgrader.programs.qemu.shared import Note
from upgrader.programs.qemu.versions import versioned
from upgrader.protocol.fd import Fd
from upgrader.runner.passing import arguments
from upgrader.systemd.listen_fds import FIRST

_SOCKET = "qemu-{}.sock"
_ANSWERS = 30.0  # seconds for a QEMU to start
_ASKED = 5.0  # seconds for one that runs
_LAST_WORDS = 1.0  # seconds for one that ends to say why: the old one may stand still meanwhile
_TRIED = "try{}-{}"  # the interfaces of a QEMU that is only tried: their place, and our PID
_PINNED = "machine-type"  # in StateDirectory=
_log = logging.getLogger("upgrader")


class QemuAdapter(ProgramAdapter):
    """One machine."""

    stateful = True
    needs_listener = False
    may_end = True
    preflight_first = True

    def __init__(self, host: AdapterHost) -> None:
        """Raises DeclarationError for a machine that could not move."""
        super().__init__(host)
        self._machine = Machine.read(host.options.program)
        self._shared: dict[str, Fd] = {}
        self._mark = ""  # the token of the QEMU that was started, until it runs the machine
        # The session with one that waits for its state: nobody waits for another one in the pause.
        self._open: dict[int, Monitor] = {}  # by its PID
        self._sessions = contextlib.AsyncExitStack()

    @property
    def is_private(self) -> bool:
        """It can be started unnoticed: what it writes to the memory is its own then."""
        return True

    def shared(self, known: Mapping[str, Fd]) -> Mapping[str, Fd]:
        """Its memory, its interfaces, and the note of what it is."""
        found = dict(known)
        if shared.MEMORY not in known:
            found[shared.MEMORY] = shared.make_memory(self._machine.memory)
            found[shared.NOTE] = shared.make_note()
            for line in self._machine.changed:
                _log.info("%s", line)
        for each in self._machine.taps:
            name = shared.TAP + each.interface
            if name not in known:
                found[name] = tap.open_tap(each.interface)
        self._shared = {name: fd.duplicate() for name, fd in found.items()}
        return found

    @contextlib.asynccontextmanager
    async def starting(self, start: StartRequest) -> AsyncIterator[StartOrder]:
        """A QEMU: the first one of a machine, one that waits for its state, or one that is only tried."""
        self._mark = mark = os.urandom(6).hex()
        remove_dead(str(self.host.directory), _SOCKET.format("*"))  # of QEMUs that have ended
        with contextlib.ExitStack() as until_ready:
            taps = {}
            for place, each in enumerate(self._machine.taps):
                name = each.interface
                taps[name] = start.shared[shared.TAP + name]
                if start.private:
                    tried = tap.open_tap(_TRIED.format(place, os.getpid()))
                    taps[name] = until_ready.enter_context(tried)
            listeners = [each.sock for each in start.listeners]
            first = FIRST + len(listeners)
            placing = Placing(
                mark,
                first,
                first + 1,
                {name: first + 2 + place for place, name in enumerate(taps)},
                incoming=start.incoming,
                private=start.private,
            )
            command = self._command(start, placing)
            listener = until_ready.enter_context(socket.socket(socket.AF_UNIX))
            path = self._path(mark)
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen()
            self.sockets = (str(path),)
            if start.incoming and not start.private:
                until_ready.enter_context(tap.guarded(self._devices()))
            yield StartOrder(
                arguments(command, start.listeners),
                start.environment,
                [*listeners, start.shared[shared.MEMORY], listener, *taps.values()],
            )

    def _command(self, start: StartRequest, placing: Placing) -> list[str]:
        """Its command line; raises VerifyError if the machine that runs is another one."""
        machine, fd = self._machine, start.shared[shared.NOTE]
        note = shared.read_note(fd) if start.incoming else None
        if start.incoming and note is None:
            raise VerifyError("nothing is known of the machine that runs")
        if note is None:
            kind = self._pin(start.environment)
            command = machine.command(kind, placing)
            shared.empty_memory(start.shared[shared.MEMORY], machine.memory)
            shared.write_note(fd, Note(kind, machine.type, command))
            _log.info("machine: %s, whatever the next QEMU takes for the newest one", kind)
            return command
        command = machine.command(note.type, placing)
        said = difference(note.command, command)
        if machine.type not in (note.written, note.type):
            said = f"its type is {note.type}, and not {machine.type}"
        if said:
            raise VerifyError(
                f"the machine that runs is another one: {said}",
                remedy="a machine changes when it is stopped and started",
            )
        return command

    def _devices(self) -> dict[Fd, TapFacts]:
        """How the guest wants each device; noted for whoever must set it back."""
        taps, note = self._interfaces(), self._note()
        now = {name: tap.settings(name, each) for name, each in taps.items()}
        # Those of an attempt that nobody could undo are right.
        wanted = now | (note.devices if note else {})
        self._note(devices=wanted)
        return {fd: wanted[name] for name, fd in taps.items()}

    def _interfaces(self) -> dict[str, Fd]:
        """By name."""
        found = {
            n.removeprefix(shared.TAP): fd
            for n, fd in self._shared.items()
            if n.startswith(shared.TAP)
        }
        return {each.interface: found[each.interface] for each in self._machine.taps}

    async def ready(self, program: RunningProcess, start: StartRequest) -> None:
        """Return once it answers."""
        opened = Monitor.open(self._path(self._mark), _ANSWERS)
        async with _to_its_end(program):
            monitor = await self._sessions.enter_async_context(opened)
            await monitor.status()
            if not start.private:
                self.offers = await offers(monitor)
            if start.incoming:
                await monitor.expect()  # so that the pause has less to do
                if not start.private:
                    self._fill()
        if start.private:  # nobody else asks it
            self._path(self._mark).unlink(missing_ok=True)
        if start.incoming:
            self._open[program.pid] = monitor
        else:
            self._mark = ""
            await self._close()

    async def quiesce(self, program: RunningProcess) -> None:
        """Find out whether its machine can be saved; nothing of it needs to come to rest."""
        async with self._monitor(program) as monitor:
            if (status := await monitor.status()) not in SAVABLE:
                raise VerifyError(f"the machine is {status}")

    async def save(self, program: RunningProcess, state: Fd) -> None:
        """Stop the machine, and write what its devices hold."""
        async with self._monitor(program) as monitor:
            note = self._note()
            if note and not note.moving:
                self._note(moving=True, status=await monitor.status())
            monitor.on_stop = self._fill
            await monitor.save(state)

    def _fill(self) -> None:
        """Have QEMUs that stand still read what nobody misses."""
        for each in self._machine.taps:
            tap.fill(each.interface)

    async def load(self, program: RunningProcess, state: Fd) -> None:
        """Have a QEMU that waits for it load that; the machine stands still."""
        async with self._monitor(program) as monitor:
            await monitor.load(state)

    async def resume(self, program: RunningProcess) -> None:
        """Have the machine do what it did before it was saved."""
        self._set_back()
        note = self._note()
        async with self._monitor(program) as monitor:
            await monitor.resume(note.status if note else "running")
        self._note(moving=False)
        self._mark = ""
        await self._close()

    def restore(self) -> None:
        """Set back what a QEMU that was refused has changed of the interfaces, and remove its socket."""
        self._set_back()
        if self._mark:
            self._path(self._mark).unlink(missing_ok=True)

    def _set_back(self) -> None:
        note = self._note() if self._shared else None
        taps = self._interfaces()
        for name, wanted in note.devices.items() if note else ():
            if name in taps:
                tap.set_back(taps[name], wanted)
        if note and note.devices:
            self._note(devices={})

    def stop(self, program: RunningProcess) -> None:
        """Press the power button of the machine: its guest ends it, or systemd's patience does."""
        self._stopping = asyncio.ensure_future(self._press(program))

    async def _press(self, program: RunningProcess) -> None:
        try:
            async with self._monitor(program) as monitor:
                await monitor.ask("system_powerdown")
        except QemuError as error:
            _log.warning("%s: %s", program, error)
            program.send(signal.SIGTERM)

    def _note(self, **changes: Any) -> Note | None:
        """The note of the machine, with changes."""
        fd = self._shared[shared.NOTE]
        note = shared.read_note(fd)
        if note and changes:
            note = structs.replace(note, **changes)
            shared.write_note(fd, note)
        return note

    @contextlib.asynccontextmanager
    async def _monitor(self, program: RunningProcess) -> AsyncIterator[Monitor]:
        if not (monitor := self._open.get(program.pid)):
            async with (
                _to_its_end(program),
                Monitor.open(self._path(_token_of(program)), _ASKED) as opened,
            ):
                yield opened
            return
        async with _to_its_end(program):
            yield monitor

    async def _close(self) -> None:
        """End sessions: another runner may ask from now on."""
        self._open.clear()
        await self._sessions.aclose()

    def _path(self, mark: str) -> Path:
        return self.host.directory / _SOCKET.format(mark)

    def _pin(self, environment: Mapping[str, str]) -> str:
        """The versioned type of a machine that begins: with a StateDirectory=, always the first one."""
        directory = environment.get("STATE_DIRECTORY", "").partition(":")[0]
        path = Path(directory, _PINNED)
        if directory and path.exists():
            try:
                return versioned(self._machine.binary, path.read_text().strip())
            except VerifyError as error:
                raise VerifyError(str(error), remedy=f"for a new machine, remove {path}") from error
        kind = versioned(self._machine.binary, self._machine.type)
        if directory:
            path.write_text(f"{kind}\n")
        return kind


@contextlib.asynccontextmanager
async def _to_its_end(program: RunningProcess) -> AsyncIterator[None]:
    """Say that a QEMU has ended only once it has, and has said why."""
    try:
        yield
    except QemuEnded:
        await program.ends(_LAST_WORDS)
        raise


def _token_of(program: RunningProcess) -> str:
    """By which a QEMU says where it can be asked; raises QemuError if it has not come so far."""
    with contextlib.suppress(OSError):
        words = (
            Path(f"/proc/{program.pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        )
        if found := token(words):
            return found
    raise QemuError(f"{program} is no QEMU that can be asked")
