# SPDX-License-Identifier: LGPL-2.1-or-later
"""What PID 1 has given to this process at its start: for takeover, which must give it to the next.

It is also how takeover sees that a setting of the unit has changed, which no file of the program
shows.
"""

import contextlib
import os
import re
import sys
from collections.abc import Sequence

from upgrader.errors import BusError
from upgrader.protocol.varlink_types import Started
from upgrader.systemd import cgroup
from upgrader.systemd.bus import SYSTEM_BUS, Bus
from upgrader.systemd.main_command import expand, parse_environment
from upgrader.systemd.unit import commands
from upgrader.systemd.unit_settings import (
    Settings,
    command_checksum,
    environment_checksums,
    is_command_of,
    settings,
)

_BUS = 5.0
_PID = 7  # where a line of ExecStartEx has the process that was made of it
_ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)


def ask_settings(unit: str, number: int, environ: bytes, word: str | None) -> Settings:
    """What this process was made from, as far as PID 1 says. `number`: this process, as PID 1 knows it;
    `environ`: what it was given, as proc_pid_environ(5) has it; `word`: what takeover has told, None
    for a process that PID 1 has made."""
    given = parse_environment(environ)
    if given.get("INVOCATION_ID") != os.environ.get("INVOCATION_ID"):
        given = dict(os.environ)  # a program that writes its own title has overwritten it
    found = Settings(hidden=not os.path.exists(SYSTEM_BUS))
    with contextlib.suppress(BusError), Bus(_BUS) as bus:
        bus.get(unit, "MainPID")
        found = Settings(heard=True)
        properties = bus.properties(unit)
        now = settings(bus, unit, properties)
        if not (started := properties.get("ExecStartEx")):
            return found
        found = now.replace(checksum="")  # whatever was read since
        command = commands(started)[-1]
        arguments = command.arguments
        if "no-env-expand" not in command.flags:
            arguments = tuple(expand(arguments, given))
        # PID 1 still says of what it has made this process, unless it has read the unit anew: then it
        # names no process, and all that it says is of the new file.
        checksum, _, made_of = (word or "").partition(":")
        if word is None and started[-1][_PID] == number:
            checksum, made_of = now.checksum, command_checksum(command)
        found = found.replace(
            checksum=checksum,
            command=made_of,
            environment=environment_checksums(given, bus.environment(), command),
            direct=is_command_of(sys.orig_argv, command.path, arguments),
            identifier=now.identifier or os.path.basename(command.path),
        )
    return found


def describe(activated: Sequence[str], known: Settings | None) -> Started:
    """For the answer to Describe; `known`: as far as PID 1 was asked."""
    settings = known or Settings()
    return Started(
        list(activated), list(settings.credentials), _memory(), settings.checksum,
        settings.command, dict(settings.environment), settings.direct, _cache(),
    )  # fmt: skip


def _memory() -> int:
    """Bytes that belong to this process alone: so much more will its successor need."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        if match := _ANONYMOUS.search(file.read()):
            return int(match[1]) * 1024
    return 0


def _cache() -> int:
    """Bytes of files that are read from, and that the kernel forgets first if memory is scarce."""
    with contextlib.suppress(OSError, ValueError):
        return sum(cgroup.statistics("memory.stat", {"inactive_file", "active_file"}))
    return 0
