# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a process is in the cgroups that systemd keeps, and so of which unit; asks the kernel."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


def own_unit() -> str:
    """The unit of this process; empty outside of systemd."""
    try:
        return unit_of(_read("self"))
    except OSError:
        return ""


def unit_of(cgroup: str) -> str:
    """The unit that a /proc/PID/cgroup names, or an empty text.

    The last `*.service` component counts: with Delegate=yes there are groups of our own below.
    An underscore in front is systemd's escape of names such as `memory.service`.
    """
    for _, path in _groups(cgroup):
        for part in reversed(path.split("/")):
            if part.endswith((".service", ".scope")):
                return part.removeprefix("_")
    return ""


def directory() -> str:
    """The directory of the cgroup of this process's unit; raises OSError."""
    for hierarchy, path in _groups(_read("self")):
        parts = path.split("/")
        while parts and not parts[-1].endswith((".service", ".scope")):
            parts.pop()
        if parts:
            return _place(hierarchy, "/".join(parts))
    raise FileNotFoundError(2, "no unit", "/proc/self/cgroup")


def move(pid: int, other: int) -> None:
    """Move a process to where another one is, unless it is there; raises OSError."""
    there = dict(_groups(_read(other)))
    for hierarchy, path in _groups(_read(pid)):
        if path != there.get(hierarchy, path):
            with open(f"{_place(hierarchy, there[hierarchy])}/cgroup.procs", "w") as file:
                file.write(str(pid))


def statistics(file: str, names: set[str]) -> list[int]:
    """Numbers of the cgroup of this process, by the names that a file of it gives them (cgroup2 only);
    raises OSError."""
    path = dict(_groups(_read("self"))).get("", "/")
    with open(f"{_place('', path)}/{file}", encoding="ascii") as lines:
        pairs = (line.split() for line in lines)
        return [int(value) for name, value in pairs if name in names]


def _read(pid: int | str) -> str:
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _groups(cgroup: str) -> Iterator[tuple[str, str]]:
    """The groups in systemd's hierarchies: that of cgroup2 (""), or of version 1 ("name=systemd"), or
    both."""
    for line in cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" or controllers == "name=systemd":
            yield controllers, path


def _place(hierarchy: str, path: str) -> str:
    """The directory of a group; raises FileNotFoundError."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields, _, more = line.partition(" - ")
            root, place = fields.split()[3:5]
            kind, _, options = more.split()
            wanted = kind == "cgroup" and hierarchy in options.split(",")
            if not hierarchy:
                wanted = kind == "cgroup2"
            if wanted and f"{path}/".startswith(root):
                return place + "/" + path[len(root) :]
    raise FileNotFoundError(2, "not mounted here", path)
