# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mode exec: this process becomes the new version, and its image waits for it in a channel.

Nothing is started and nobody else is needed. PID 1 holds a copy of the channel as it does in a
restart, so that a version which fails after the execve(2) loses nothing if Restart= follows.
"""

import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import MutableMapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from upgrader.codes import Code
from upgrader.errors import ChannelError, NotifyError, UpgradeError
from upgrader.instance import save
from upgrader.instance.process import given_limits
from upgrader.protocol import image
from upgrader.protocol.channel import ParkedChannel
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import HasFileno
from upgrader.protocol.rendezvous import EXECUTED, EXECUTED_PASSED, UPGRADE
from upgrader.systemd.bus import Bus
from upgrader.systemd.fdstore import FdStore, StoreName
from upgrader.systemd.listen_fds import Passed, own_number
from upgrader.systemd.main_command import MainCommand, given_environment, main_process
from upgrader.systemd.unit import Unit

_BUS = 1.0  # seconds for each answer of PID 1
_log = logging.getLogger("upgrader")


class ExecutionError(UpgradeError):
    """This process could not become the new version, and serves on as it was."""


@dataclass(frozen=True, slots=True)
class Execution:
    """A request to execute `command`, in the upgrade of that id; if it fails, `failed` gets the
    reason."""

    command: MainCommand
    upgrade: str = ""
    failed: Future[str] = field(default_factory=Future)

    def check(self) -> None:
        """Raise ExecutionError if it is not a program; asked before anything is disturbed."""
        path = self.command.path
        if not os.path.isfile(path):
            raise ExecutionError(f"{path}: there is no such file")
        if not os.access(path, os.X_OK):
            raise ExecutionError(f"{path}: not executable for this user")


def command(words: Sequence[str], unit: str, notify_socket: str) -> MainCommand:
    """What is executed: these words, or else what ExecStart= of the unit says now. Raises OSError,
    UpgradeError."""
    given, at_start = {**os.environ, "NOTIFY_SOCKET": notify_socket}, given_environment()
    if "LC_CTYPE" not in at_start:  # Python adds it to its own
        given.pop("LC_CTYPE", None)
    if words:
        path = words[0] if "/" in words[0] else shutil.which(words[0])
        return MainCommand(path or words[0], words, given)
    with Bus(_BUS) as bus:
        now = Unit.from_properties("", bus.properties(unit))
    return main_process(now, given, int(own_number(os.environ)), at_start)


def become(
    execution: Execution,
    manifest: image.Manifest,
    fds: Sequence[HasFileno],
    beyond: Sequence[tuple[str, HasFileno]],
    name: StoreName,
    store: FdStore | None,
    unit: str,
) -> None:
    """Become the new version with this image; returns never, or raises ExecutionError.

    `beyond`: what PID 1 would pass to a start besides, by its FDNAME. `store` is None where there is none. Then, and where PID 1 does not take the channel, a version
    that fails takes everything with it.
    """
    carried: list[tuple[StoreName, socket.socket]] = []
    also: list[tuple[str, Fd]] = []

    def keep(reader: socket.socket) -> None:
        part = name.further(len(carried))
        carried.append((part, reader.dup()))
        if store is None:
            return
        try:
            save.push(store, unit, part, reader)
        except (ChannelError, NotifyError) as error:
            _log.warning("a version that fails would lose everything: %s", error)

    try:
        save.carry(manifest, fds, keep)
        channel = carried[0][1]
        channel.set_inheritable(True)
        for text, owner in (*beyond, *((str(part), sock) for part, sock in carried[1:])):
            also.append((text, Fd(os.dup(owner.fileno()))))
            os.set_inheritable(also[-1][1].fileno(), True)
        environment = {
            **execution.command.environment,
            EXECUTED: f"{channel.fileno()}:{name}",
            EXECUTED_PASSED: json.dumps([(text, fd.fileno()) for text, fd in also]),
            UPGRADE: execution.upgrade,
        }
        _flush()
        with given_limits():
            os.execve(execution.command.path, list(execution.command.arguments), environment)
    except (UpgradeError, OSError) as error:
        # PID 1's copy must not be loaded one day: what was in it goes on here.
        for _, fd in also:
            fd.close()
        for part, sock in carried:
            ParkedChannel(sock, str(part)).spend()
        if store is not None:
            store.remove(*(part for part, _ in carried))
        if isinstance(error, OSError):
            why, code = f"{error.strerror}", Code.LOAD_FAILED
        else:
            why, code = str(error), Code.SOURCE_FAILED
        raise ExecutionError(f"{execution.command.path}: {why}", code=code) from error


def carried(environment: MutableMapping[str, str]) -> list[Passed]:
    """The channel that this process has brought along through an execve(2), if it has, and what PID 1
    would pass to a start besides."""
    line = environment.pop(EXECUTED, "")
    also = json.loads(environment.pop(EXECUTED_PASSED, "[]"))  # version 0.1.0 brings nothing along
    if not line:
        return []
    number, _, name = line.partition(":")
    found = [(name, int(number)), *also]
    for _, each in found:
        os.set_inheritable(each, False)
    return [Passed(text, Fd(each)) for text, each in found]


def _flush() -> None:
    """Nothing that was written may be lost: an execve(2) runs no clean-up."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
