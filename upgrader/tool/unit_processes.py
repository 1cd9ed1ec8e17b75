# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tell apart the processes of a unit beside its main one: which an upgrade ends, and which nobody would."""

import contextlib
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

_PIDFD = re.compile(r"^Pid:\t(\d+)$", re.MULTILINE)


def started_by(main: int, pids: Iterable[int]) -> list[int]:
    """Those of `pids` that `main` has started, directly or not, and that it does not keep."""
    return _below({main}, set(pids) - _kept(main))


def strays(main: int, others: Collection[int], pids: Iterable[int]) -> list[int]:
    """Those of `pids` that belong to nobody: they are not below `main`, nor below one of `others`
    (takeover, instances that drain), and `main` does not keep them."""
    roots = {main, os.getpid(), *others}
    left = set(pids) - roots - _kept(main)
    return sorted(left - {*_below(roots, left)})


def named(pids: Iterable[int]) -> str:
    """Processes as people know them: `12 (python3), 13 (sh)`."""
    names = []
    for pid in pids:
        with contextlib.suppress(OSError):
            names.append(f"{pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})")
    return ", ".join(names)


def _below(roots: Collection[int], pids: Collection[int]) -> list[int]:
    parents = {}
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            parents[pid] = int(fields[1])
    found: set[int] = set()
    while new := {pid for pid, parent in parents.items() if parent in {*roots, *found}} - found:
        found |= new
    return sorted(found)


def _kept(main: int) -> set[int]:
    """The processes of which it has a pidfd that PID 1 may have too: `instance.keep`."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{main}/fdinfo").iterdir():
            with contextlib.suppress(OSError):
                found |= {int(number) for number in _PIDFD.findall(path.read_text())}
    return found
