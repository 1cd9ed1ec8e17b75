# SPDX-License-Identifier: LGPL-2.1-or-later
"""One QEMU, as it is asked over QMP: how the machine is, its state out of one process and into another.

Memory and state do not travel together: the memory is shared (x-ignore-shared), so a state is what
devices hold, some 300 kB in a memfd. A machine whose state was saved stands still in the process that
saved it, and can be resumed there until it runs in another one.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
)

from upgrader.errors import UpgradeError
from upgrader.protocol.fd import Fd

#: What a machine may be doing that is saved; of others nobody knows what a copy would do.
SAVABLE = ("running", "paused")
_DONE = ("completed", "failed", "cancelled")
_CHUNK = 1 << 20
_LARGEST = 1 << 30  # bytes of a state
_NAME = "upgrader-state"
#: Bytes a second: the state is small, and the machine stands still meanwhile.
_BANDWIDTH = 1 << 40
_PATIENCE = 20.0  # seconds for one answer, and for a state to come through
_FINAL = 5.0  # seconds until a migration is over for good, and the machine can be resumed
_AGAIN = 0.001


# What it has to say, the errors say that are raised here.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class QemuError(UpgradeError):
    """A QEMU has not done what it was asked for."""


class QemuEnded(QemuError):
    """A QEMU has closed its session: it ends, and says why at its own pace."""


class _Unlogged(QMPClient):
    """Keeps no log of messages: they would be written for it, also in a pause, whoever reads it."""

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


class Monitor:
    """A QMP session. Only one is served at a time: others wait for its end."""

    def __init__(self, client: QMPClient, events: EventListener) -> None:
        self._client = client
        self._events = events
        self._writer = Fd(-1)  # of the pipe at which a QEMU waits for a state
        #: Called as soon as the machine stands still to be saved.
        self.on_stop: Callable[[], None] = lambda: None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path, limit: float) -> AsyncIterator["Monitor"]:
        """Ask the QEMU that listens at a path; raises QemuError if it does not answer within `limit`
        seconds, QemuEnded if it listens no more."""
        client = _Unlogged("upgrader")
        try:
            async with asyncio.timeout(limit):
                await client.connect(str(path))
        except TimeoutError as error:
            raise QemuError(f"QEMU does not answer at {path} within {limit:g} s") from error
        except (ConnectError, OSError) as error:
            raise QemuEnded(f"QEMU does not answer at {path}: {_show(error)}") from error
        try:
            with client.listener(("MIGRATION", "STOP")) as events:
                monitor = cls(client, events)
                with contextlib.closing(monitor):
                    yield monitor
        finally:
            with contextlib.suppress(QMPError, EOFError, OSError):
                await client.disconnect()

    def close(self) -> None:
        """Give up the pipe of a state that has never come."""
        self._writer.close()

    async def ask(self, command: str, **arguments: Any) -> Any:
        """Execute one command; raises QemuError, with QEMU's own words, or QemuEnded."""
        wanted = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            async with asyncio.timeout(_PATIENCE):
                return await self._client.execute(command, wanted)
        except TimeoutError as error:
            raise QemuError(f"QEMU has not answered {command} in {_PATIENCE:.0f} s") from error
        except ExecuteError as error:
            raise QemuError(f"QEMU refuses {command}: {error}") from error
        except (ExecInterruptedError, QMPError, OSError) as error:
            raise QemuEnded(f"QEMU has ended at {command}") from error

    async def status(self) -> str:
        """What the machine is doing: RunState of the QMP reference."""
        return str((await self.ask("query-status"))["status"])

    async def save(self, state: Fd) -> None:
        """Stop the machine and write its state to a file; it stands still then. Raises QemuError, and
        the machine does what it did."""
        before = await self.status()
        if before not in SAVABLE:
            raise QemuError(f"the machine is {before}, and cannot be saved")
        try:
            await self._prepare()
            reader, writer = _pipe()
            with reader:
                with writer:
                    await self._give(writer)
                await self._move(_copy(reader, state), "migrate")
        except BaseException:
            with contextlib.suppress(QemuError):
                await self.ask("migrate_cancel")
                await self.resume(before)
            raise

    async def expect(self) -> None:
        """Have a QEMU wait for a state: `load` has only to give it one then. Raises QemuError."""
        await self._prepare(late_block_activate=True)
        reader, self._writer = _pipe()
        with reader:
            await self._give(reader)
        await self._begin("migrate-incoming")

    async def load(self, state: Fd) -> None:
        """Load a state into a QEMU that waits for one; the machine stands still. Raises QemuError."""
        if self._writer.fileno() < 0:
            await self.expect()
        writer, self._writer = self._writer, Fd(-1)
        await self._move(_feed(state, writer))

    async def resume(self, wanted: str = "running") -> None:
        """Have the machine do what it did before its state was saved, or in the process that has
        loaded it; raises QemuError."""
        if wanted != "running":
            return
        deadline = asyncio.get_running_loop().time() + _FINAL
        while True:
            refused = None
            try:
                await self.ask("cont")  # before it is asked anything else: it stands still
            except QemuError as error:
                refused = error
            if (status := await self.status()) == "running":
                return
            late = asyncio.get_running_loop().time() > deadline
            if late or (refused and status != "finish-migrate"):
                raise refused or QemuError(f"the machine is {status}")
            await asyncio.sleep(_AGAIN)

    async def _prepare(self, *, late_block_activate: bool = False) -> None:
        wanted = {"events": True, "x-ignore-shared": True}
        if late_block_activate:
            wanted["late-block-activate"] = True
        await self.ask(
            "migrate-set-capabilities",
            capabilities=[{"capability": n, "state": v} for n, v in wanted.items()],
        )
        await self.ask("migrate-set-parameters", max_bandwidth=_BANDWIDTH)

    async def _give(self, fd: Fd) -> None:
        self._client.send_fd_scm(fd.fileno())
        await self.ask("getfd", fdname=_NAME)

    async def _begin(self, command: str) -> None:
        self._events.clear()
        await self.ask(command, uri=f"fd:{_NAME}")

    async def _move(self, pumped: Coroutine[Any, Any, None], command: str = "") -> None:
        """Have a state go through the pipe that was given, and be `pumped` at its other end; raises
        QemuError unless it is whole. `command` begins that, unless it has begun."""
        pump = asyncio.ensure_future(pumped)
        try:
            if command:
                await self._begin(command)
            status = await self._end_of_migration()
            if status != "completed":
                why = (await self.ask("query-migrate")).get("error-desc", status)
                raise QemuError(f"QEMU could not move the state: {why}")
            async with asyncio.timeout(_PATIENCE):
                await pump
        except TimeoutError as error:
            raise QemuError("QEMU has not let go of a state") from error
        finally:
            pump.cancel()
            await asyncio.wait((pump,))

    async def _end_of_migration(self) -> str:
        """How it has ended, as MigrationStatus of the QMP reference; raises QemuEnded if QEMU has."""
        ended = asyncio.ensure_future(self._client.runstate_changed())
        try:
            async with asyncio.timeout(_PATIENCE):
                while True:
                    said = asyncio.ensure_future(self._events.get())
                    try:
                        await asyncio.wait((said, ended), return_when=asyncio.FIRST_COMPLETED)
                        if not said.done():
                            raise QemuEnded("QEMU has ended while a state was moved")
                        told: Any = said.result()
                    finally:
                        said.cancel()
                    if told["event"] == "STOP":
                        self.on_stop()
                    elif (status := str(told["data"]["status"])) in _DONE:
                        return status
        except TimeoutError as error:
            raise QemuError(f"no state has come through in {_PATIENCE:.0f} s") from error
        finally:
            ended.cancel()


def _pipe() -> tuple[Fd, Fd]:
    """One that a whole state fits into, if that is allowed: nobody waits for a reader then."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _CHUNK)
    return Fd(reader), Fd(writer)


async def _copy(reader: Fd, state: Fd) -> None:
    """From a pipe to a file, until the pipe ends; raises QemuError for too much, which is read still."""
    loop, size = asyncio.get_running_loop(), 0
    os.set_blocking(reader.fileno(), False)
    while True:
        try:
            if size <= _LARGEST:
                moved = os.splice(reader.fileno(), state.fileno(), _CHUNK)
            else:
                moved = len(os.read(reader.fileno(), _CHUNK))
        except BlockingIOError:
            await _ready(reader, loop.add_reader, loop.remove_reader)
            continue
        if not moved:
            break
        size += moved
    if size > _LARGEST:
        raise QemuError(f"a state of more than {_LARGEST >> 20} MiB: is the memory shared?")


async def _feed(state: Fd, writer: Fd) -> None:
    """From the beginning of a file to a pipe, as far as somebody reads; the pipe ends with it."""
    loop, place = asyncio.get_running_loop(), 0
    os.set_blocking(writer.fileno(), False)
    with writer, contextlib.suppress(BrokenPipeError):
        size = os.fstat(state.fileno()).st_size
        while place < size:
            try:
                place += os.splice(state.fileno(), writer.fileno(), size - place, place)
            except BlockingIOError:
                await _ready(writer, loop.add_writer, loop.remove_writer)


async def _ready(fd: Fd, add: Callable[..., Any], remove: Callable[..., Any]) -> None:
    event = asyncio.Event()
    add(fd.fileno(), event.set)
    try:
        await event.wait()
    finally:
        remove(fd.fileno())


def _show(error: BaseException) -> str:
    return str(error) or type(error).__name__
