# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read and write the command line of QEMU: options, and the properties in their values.

qemu(1); QEMU's own parser takes `-x` and `--x` alike, a word without a dash as the first disk, and `,,`
in a value for a comma.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Options that take no value; qemu-options.hx of 7.2 to 11.1. All others take one.
_ALONE = frozenset(
    {
        *(
            "h",
            "help",
            "version",
            "audio-help",
            "nodefaults",
            "no-user-config",
            "nographic",
            "portrait",
        ),
        *(
            "enable-kvm",
            "no-reboot",
            "no-shutdown",
            "no-acpi",
            "no-hpet",
            "no-fd-bootchk",
            "preconfig",
        ),
        *("daemonize", "snapshot", "full-screen", "win2k-hack", "only-migratable", "mem-prealloc"),
        *("s", "S", "singlestep", "no-quit", "alt-grab", "ctrl-grab", "curses", "usb", "mlock"),
        *(
            "semihosting",
            "xen-attach",
            "xen-domid-restrict",
            "enable-sync-profile",
            "async-teardown",
        ),
    }
)
_SIZE = re.compile(r"(\d+)([bkmgtBKMGT]?)")
_POWERS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40}
#: The word before the value in options whose first property has no name.
_IMPLIED = {
    "machine": "type",
    "m": "size",
    "netdev": "type",
    "chardev": "backend",
    "object": "qom-type",
    "device": "driver",
    "smp": "cpus",
}


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its name without dashes, `M` as `machine`, and its value, None for those without."""

    name: str
    value: str | None = None

    def words(self) -> list[str]:
        """As QEMU reads it."""
        return [f"-{self.name}"] if self.value is None else [f"-{self.name}", self.value]

    def properties(self) -> dict[str, str]:
        """The value as names and values, the first one by the name that QEMU gives it; JSON as well.
        A property without a value is `on`."""
        text = self.value or ""
        if text.startswith("{"):
            return _flat(json.loads(text))
        found = {}
        for place, part in enumerate(_split(text)):
            name, equals, value = part.partition("=")
            if place == 0 and not equals and self.name in _IMPLIED:
                name, equals, value = _IMPLIED[self.name], "=", part
            found[name] = value if equals else "on"
        return found

    def __str__(self) -> str:
        return " ".join(self.words())


def read(words: Sequence[str]) -> tuple[Option, ...]:
    """The options of a command line without the program; raises ValueError for one without its value."""
    found = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-") or word == "-":
            found.append(Option("hda", word))
            continue
        name = word.removeprefix("-").removeprefix("-")
        name = {"M": "machine", "net0": "net"}.get(name, name)
        if name in _ALONE:
            found.append(Option(name))
        elif (value := next(rest, None)) is None:
            raise ValueError(f"{word} needs a value")
        else:
            found.append(Option(name, value))
    return tuple(found)


def text(properties: Mapping[str, str], first: str = "") -> str:
    """Properties as a value; the one called `first` stands before all others, without its name."""
    parts = [properties[first]] if first in properties else []
    parts += [f"{n}={_escape(v)}" for n, v in properties.items() if n != first]
    return ",".join(parts)


def bytes_of(size: str, unit: str = "m") -> int:
    """A size such as `512`, `512M` or `4G` in bytes; raises ValueError."""
    found = _SIZE.fullmatch(size)
    if not found:
        raise ValueError(f"{size!r} is no size")
    return int(found[1]) << _POWERS[(found[2] or unit).lower()]


def _escape(value: str) -> str:
    return value.replace(",", ",,")


def _split(text: str) -> Iterator[str]:
    """The parts between single commas."""
    for part in re.findall(r"((?:[^,]|,,)+)(?:,|$)", text):
        yield part.replace(",,", ",")


def _flat(value: Any, before: str = "") -> dict[str, str]:
    """Nested properties by names with dots."""
    if not isinstance(value, dict):
        shown = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        return {before: str(shown)}
    found: dict[str, str] = {}
    for name, each in value.items():
        found |= _flat(each, f"{before}.{name}" if before else str(name))
    return found
