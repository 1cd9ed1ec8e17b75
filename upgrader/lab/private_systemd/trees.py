# SPDX-License-Identifier: LGPL-2.1-or-later
"""Resolve the root tree to boot: the machine's own, a Debian suite, or a path."""

import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import upgrader
from upgrader.lab.private_systemd.errors import TreeError
from upgrader.lab.private_systemd.plan import File, Plan
from upgrader.lab.private_systemd.suites import SUITES, fetch

#: The directory of the package `upgrader`, which every tree gets to see.
PACKAGE = Path(upgrader.__file__).resolve().parent

# Their content is part of a machine even where they are file systems of their own.
_SYSTEM_PLACES = ("/usr", "/etc", "/var", "/opt")
# Fresh and empty inside: what lies there is invisible unless it is shown on purpose.
_FRESH_PLACES = ("/tmp", "/run", "/dev")
_DIST_PACKAGES = "/usr/lib/python3/dist-packages"


@dataclass(frozen=True, slots=True)
class Tree:
    """A root tree and the Python in it: `name` for messages, `python` as a command prefix."""

    name: str
    root: Path
    python: tuple[str, ...]
    layers: tuple[str, ...] = ()
    reachable: tuple[str, ...] = ()
    readable: tuple[str, ...] = ()
    files: tuple[File, ...] = ()
    package: tuple[str, str] | None = None

    def plan(self, caller: int) -> Plan:
        """Make the plan for the keeper of a machine over this tree; the machine ends with process `caller`."""
        return Plan(
            root=str(self.root),
            caller=caller,
            layers=self.layers,
            reachable=self.reachable,
            readable=self.readable,
            files=self.files,
            package=self.package,
        )


def resolve(tree: str | Path, progress: Callable[[str], None]) -> Tree:
    """Return the tree that `tree` names: "host", a Debian suite, or a path; raises TreeError.

    A suite that is not in the cache is fetched; `progress` gets a line about it.
    """
    if tree == "host":
        return _host()
    if tree in SUITES:
        return _given(str(tree), fetch(str(tree), progress))
    if not Path(tree).is_dir():
        raise TreeError(
            f"there is no root tree {str(tree)!r}",
            remedy=f"name a directory, one of the suites {', '.join(SUITES)}, or host",
        )
    return _given(str(tree), Path(tree))


def _launcher(python: tuple[str, ...]) -> str:
    return f'#!/bin/sh\nexec {shlex.join(python)} -m upgrader "$@"\n'


@functools.cache
def _own_python() -> tuple[str, ...]:
    """Return a command prefix for this interpreter, with which `import upgrader` works anywhere."""
    found = subprocess.run(
        [sys.executable, "-c", "import upgrader"],
        cwd="/",
        env={"PATH": os.defpath},
        capture_output=True,
        check=False,
    )
    if found.returncode == 0:
        return (sys.executable,)
    # Not installed, only on this process's path: say it in a way that every service inherits.
    ways = [str(PACKAGE.parent), *(path for path in sys.path if path and Path(path).exists())]
    return ("/usr/bin/env", f"PYTHONPATH={':'.join(dict.fromkeys(ways))}", sys.executable)


def _host() -> Tree:
    python = _own_python()
    needed = [sys.prefix, sys.base_prefix, sys.executable, os.path.realpath(sys.executable)]
    needed += [str(PACKAGE), *(path for path in sys.path if path and os.path.exists(path))]
    return Tree(
        name="host",
        root=Path("/"),
        python=python,
        layers=_layers((*_SYSTEM_PLACES, *needed)),
        reachable=tuple(dict.fromkeys(needed)),
        readable=(str(PACKAGE),),
        files=(File("/usr/local/bin/upgrader", _launcher(python), 0o755),),
    )


def _layers(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Return the directories among `paths` that the overlay of `/` does not show by itself."""
    device = os.stat("/").st_dev
    found: dict[str, int] = {}
    for path in sorted({os.path.realpath(path) for path in paths}):
        directory = path if os.path.isdir(path) else os.path.dirname(path)
        if not os.path.isdir(directory):
            continue
        own = os.stat(directory).st_dev
        hidden = any(
            directory == place or directory.startswith(place + "/") for place in _FRESH_PLACES
        )
        if own == device and not hidden:
            continue
        # Shown already, by a layer above it on the same file system.
        if any(directory.startswith(f"{above}/") and found[above] == own for above in found):
            continue
        found[directory] = own
    return tuple(found)


def _given(name: str, root: Path) -> Tree:
    missing = [
        path
        for path in ("usr/lib/systemd/systemd", "usr/lib/systemd/system/dbus.socket")
        if not (root / path).exists()
    ]
    if missing:
        raise TreeError(
            f"{root} cannot be booted: {' and '.join(missing)} missing in it",
            remedy="install systemd and dbus there; a cached tree may be removed, it is then made anew",
        )
    python = ("/usr/bin/python3",)
    package = f"{_DIST_PACKAGES}/{PACKAGE.name}"
    return Tree(
        name=name,
        root=root.resolve(),
        python=python,
        files=(File("/usr/bin/upgrader", _launcher(python), 0o755),),
        readable=(package,),
        package=(str(PACKAGE), package),
    )
