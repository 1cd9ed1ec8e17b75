# SPDX-License-Identifier: LGPL-2.1-or-later
"""A mount namespace and a cgroup for the process that runs tests, so that nothing else on the machine
shows there: what is in them was put there by its tests."""

import contextlib
import os
import tempfile
from pathlib import Path

from upgrader.lab.private_systemd import cgroups, linux


class Isolation:
    """The place of one process; `cgroup` is its own directory in cgroup2, None without root."""

    def __init__(self) -> None:
        self.cgroup: Path | None = None

    def begin(self) -> None:
        """Move this process there. Where that is not allowed, system tests cannot run either."""
        if os.geteuid() != 0:
            return
        with contextlib.suppress(PermissionError):
            cgroups.enter_namespaces()
            place = Path(tempfile.mkdtemp(prefix="upgrader-tests-"))
            cgroups.mount(place)
            self.cgroup = cgroups.make(place, "tests-")
            _enter(self.cgroup)

    def end(self) -> None:
        """Move this process back; its other mounts go with it, a cgroup with processes stays."""
        if self.cgroup is not None:
            place = self.cgroup.parent
            _enter(place)
            with contextlib.suppress(OSError):
                cgroups.remove(self.cgroup)
            self.cgroup = None
            linux.unmount(str(place))
            place.rmdir()

    def mounts(self) -> dict[str, str]:
        """What is mounted, by the ID of the mount: place and type of the file system."""
        found = {}
        for line in Path("/proc/thread-self/mountinfo").read_text().splitlines():
            fields, _, kind = line.partition(" - ")
            number, _, _, _, place, *_ = fields.split()
            found[number] = f"{place} ({kind.split()[0]})"
        return found

    def cgroups(self) -> set[Path]:
        """The cgroups directly below this process's own."""
        if self.cgroup is None:
            return set()
        return {Path(entry.path) for entry in os.scandir(self.cgroup) if entry.is_dir()}


def _enter(cgroup: Path) -> None:
    (cgroup / "cgroup.procs").write_text("0")


#: Of this process.
OWN = Isolation()
