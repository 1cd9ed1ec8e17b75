# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collect what is known of a unit that is to be adopted: properties of PID 1, and what its processes listen
on. No unit file is read."""

import contextlib
import grp
import os
import pwd
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upgrader.systemd.unit import Unit, as_text, commands
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import AccessDenied
from upgrader.tool.unit_sockets import OpenSocket, open_sockets

#: What distributions install; packaging/lib/run.
_PACKAGED = "/usr/lib/upgrader/run"
_NAMES = {80: "http", 443: "https"}


@dataclass(frozen=True, slots=True)
class Listened:
    """One listener of the unit: its name below a runner, its address, and whether a `.socket` unit
    passes it. `mode`: of its file, with its owner, as of --socket-mode; empty for what a runner's would be."""

    name: str
    address: str
    passed: bool = False
    mode: str = ""

    def option(self, trial: str = "") -> str:
        """For --listen. In a trial, with `trial` as its directory, nothing is passed, and the user of
        the service may not make files wherever PID 1 may."""
        if not (trial and self.passed):
            return self.name if self.passed else f"{self.name}={self.address}"
        address = f"unix:{trial}/{self.name}" if self.address.startswith("unix:/") else self.address
        return f"{self.name}={address}"


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """What is known of a unit that is to be adopted. `executable`: the file that its main process
    executes; `pid_file`: the file with its PID; `activated`: names of `.socket` units' listeners, and
    `modes` as `Listened.mode`, by address."""

    unit: Unit
    properties: Mapping[str, Any]
    sockets: tuple[OpenSocket, ...] = ()
    executable: str = ""
    pid_file: str = ""
    activated: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable
    modes: Mapping[str, str] = field(default_factory=dict)

    @property
    def runner(self) -> tuple[str, ...]:
        """How a runner is started: by the package's own file, if this is the package's library."""
        if Path(_PACKAGED).exists() and __file__.startswith("/usr/lib/"):
            return (_PACKAGED,)
        return (self.python, "-P", "-m", "upgrader.run")

    def texts(self, name: str) -> tuple[str, ...]:
        """The command lines of one setting."""
        lines = commands(self.properties.get(f"{name}Ex", ()))
        return tuple(" ".join((line.path, *line.arguments[1:])) for line in lines)


def facts(systemd: Systemd, unit: Unit) -> UnitFacts:
    """All that is known of a unit that serves; raises UnitError."""
    try:
        sockets = open_sockets(systemd.processes(unit))
        executable = os.readlink(f"/proc/{unit.main_pid}/exe") if unit.main_pid else ""
    except PermissionError as error:
        raise AccessDenied(unit.id, "look at its sockets") from error
    except OSError:  # the main process has ended
        executable = ""
    properties = systemd.properties(unit)
    activated: dict[str, str] = {}
    for each in systemd.sockets(unit):
        for kind, address in each.listens:
            if each.active and kind in ("Stream", "Datagram"):
                activated |= dict.fromkeys(_as_open(address), each.name)
    given = as_text(properties.get("PIDFile", ""))
    return UnitFacts(
        unit,
        properties,
        sockets,
        executable,
        given or _pid_file(unit.main_pid),
        activated,
        modes={each.address: _mode(unit, properties, each) for each in sockets},
    )


def named(known_facts: UnitFacts) -> tuple[Listened, ...]:
    """The listeners by name; of both families at one port, one."""
    addresses = list(dict.fromkeys(
        each.address for each in known_facts.sockets if each.is_stream and not each.removed
    ))  # fmt: skip
    for address in [each for each in addresses if each not in known_facts.activated]:
        port = address.removeprefix("0.0.0.0:")
        if port != address and (other := f"[::]:{port}") in addresses:
            addresses[addresses.index(address)] = f":{port}"
            addresses.remove(other)
    found: dict[str, Listened] = {}
    for address in addresses:
        if name := known_facts.activated.get(address, ""):
            found[name] = Listened(name, address, passed=True)
            continue
        name = first = _name(address)
        number = 1
        while name in found:
            number += 1
            name = f"{first}-{number}"
        found[name] = Listened(name, address, mode=known_facts.modes.get(address, ""))
    return tuple(found.values())


def _name(address: str) -> str:
    if address.startswith("unix:"):
        stem = os.path.basename(address.removeprefix("unix:")).partition(".sock")[0]
        return re.sub(r"[^A-Za-z0-9-]+", "-", stem).strip("-")[:50] or "socket"
    port = int(address.rpartition(":")[2])
    return _NAMES.get(port, f"port-{port}")


def _mode(unit: Unit, properties: Mapping[str, Any], each: OpenSocket) -> str:
    path = each.address.removeprefix("unix:")
    if not path.startswith("/"):
        return ""
    try:
        found = os.stat(f"/proc/{min(each.pids)}/root{path}")
        user = pwd.getpwnam(unit.user or "root")
        group = as_text(properties.get("Group", ""))
        made = user.pw_uid, grp.getgrnam(group).gr_gid if group else user.pw_gid
    except (OSError, KeyError):  # it is gone, or its user is one that PID 1 makes up
        return ""
    mode = stat.S_IMODE(found.st_mode)
    own = "" if found.st_uid == made[0] else _user(found.st_uid)
    owner = "" if (found.st_uid, found.st_gid) == made else f":{own}:{_group(found.st_gid)}"
    usual = 0o777 & ~int(properties.get("UMask", 0o022))
    return "" if mode == usual and not owner else f"{mode:04o}{owner}"


def _user(number: int) -> str:
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(number).pw_name
    return str(number)


def _group(number: int) -> str:
    with contextlib.suppress(KeyError):
        return grp.getgrgid(number).gr_name
    return str(number)


def _pid_file(pid: int) -> str:
    """The file in which a process has left its number, where such files are."""
    for pattern in ("*.pid", "*/*.pid"):
        for path in sorted(Path("/run").glob(pattern)):
            with contextlib.suppress(OSError, ValueError):
                if pid and int(path.read_text(encoding="ascii")) == pid:
                    return str(path)
    return ""


def _as_open(address: str) -> tuple[str, ...]:
    """An address of a `.socket` unit, as `open_sockets` may write it: it depends on BindIPv6Only=."""
    if address.startswith(("/", "@")):
        return (f"unix:{address}",)
    return (address, address.removeprefix("[::]"))
