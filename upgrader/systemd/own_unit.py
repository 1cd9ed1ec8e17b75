# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which unit a process belongs to; asks the kernel, not PID 1."""

from __future__ import annotations


def own_unit() -> str:
    """The unit of this process; empty outside of systemd."""
    try:
        with open("/proc/self/cgroup", encoding="ascii", errors="replace") as file:
            return unit_of(file.read())
    except OSError:
        return ""


def unit_of(cgroup: str) -> str:
    """The unit that a /proc/PID/cgroup names, or an empty text.

    The last `*.service` component counts: with Delegate=yes there are groups of our own below.
    An underscore in front is systemd's escape of names such as `memory.service`.
    """
    for line in cgroup.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" or controllers == "name=systemd":
            for part in reversed(path.split("/")):
                if part.endswith((".service", ".scope")):
                    return part.removeprefix("_")
    return ""
