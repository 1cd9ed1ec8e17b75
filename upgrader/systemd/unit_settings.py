# SPDX-License-Identifier: LGPL-2.1-or-later
"""What PID 1 makes a main process from, in checksums: whether that has changed, no file shows.

Compared is what PID 1 was asked for, then and now. What a process looks like in /proc may be anything:
that of a script is its interpreter, and some programs write their own.
"""

from __future__ import annotations

import binascii

from upgrader.protocol.values import Value
from upgrader.systemd.main_command import PER_PROCESS
from upgrader.systemd.unit import credential_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from upgrader.systemd.bus import Bus
    from upgrader.systemd.unit import ExecCommand

#: What PID 1 makes of no setting.
_OF_PID_1 = {"NOTIFY_SOCKET", "INVOCATION_ID"}
#: What Python adds to its own environment in a C locale (PEP 538).
_COERCED = {"LC_CTYPE=C.UTF-8", "LC_CTYPE=C.utf8", "LC_CTYPE=UTF-8"}


class Settings(Value):
    """What a main process is made from: settings and command line of its unit, each in a checksum that
    is empty if nobody knows, and checksums of its variables.

    `direct`: the command line is that of the process itself, and not of what has started it with
    variables of its own; `credentials`: names; `directory`: WorkingDirectory= as it is named; `heard`:
    whether PID 1 could be asked; `hidden`: whether no bus is to be seen; `identifier`:
    SyslogIdentifier=, or what PID 1 has in its place.
    """

    checksum: str = ""
    command: str = ""
    environment: Mapping[str, str] = {}
    direct: bool = True
    credentials: tuple[str, ...] = ()
    directory: str = ""
    heard: bool = False
    hidden: bool = False
    identifier: str = ""

    def differs(self, before: Settings) -> bool:
        """Whether these are others than before; what is not known differs from nothing."""
        if "" not in (self.checksum, before.checksum) and self.checksum != before.checksum:
            return True
        if "" in (self.command, before.command):
            return False
        if any(before.environment.get(name) != each for name, each in self.environment.items()):
            return True
        left_out = before.direct and before.environment.keys() - self.environment.keys()
        return self.command != before.command or bool(left_out)


def settings(bus: Bus, unit: str, properties: Mapping[str, Any]) -> Settings:
    """What PID 1 calls constant of a unit with these properties: all that changes at run time is left
    out. Raises BusError."""
    constants = bus.constants(unit, properties)
    directory = constants.get("WorkingDirectory", "")
    return Settings(
        checksum=_checksum(sorted(constants.items())),
        credentials=credential_names(constants),
        directory=directory.lstrip("-!") if isinstance(directory, str) else "",
        heard=True,
        identifier=str(constants.get("SyslogIdentifier", "")),
    )


def command_checksum(command: ExecCommand) -> str:
    """A line of ExecStart=, before its variables are expanded."""
    return _checksum((command.path, command.arguments, sorted(command.flags)))


def environment_checksums(
    environment: Mapping[str, str], general: Mapping[str, str], command: ExecCommand
) -> dict[str, str]:
    """The variables that a unit gives to its process, or names in its command line.

    Those in `general`, which PID 1 gives to all, are passed on and compared with nothing: that of a
    user has others after each login.
    """
    words = "\0".join(command.arguments)
    return {
        name: _checksum(value)
        for name, value in environment.items()
        if name not in PER_PROCESS | _OF_PID_1
        and f"{name}={value}" not in _COERCED
        and (general.get(name) != value or f"${name}" in words or f"${{{name}}}" in words)
    }


def is_command_of(words: Sequence[str], path: str, arguments: Sequence[str]) -> bool:
    """Whether a process with the command line `words` is what was executed as `path`; a script is run
    by the interpreter of its first line, which may have arguments."""
    script = [path, *arguments[1:]]
    return [*words] == [*arguments] or [*words[1:]][-len(script) :] == script


def _checksum(value: object) -> str:
    return f"{binascii.crc32(repr(value).encode(errors='surrogateescape')):08x}"
