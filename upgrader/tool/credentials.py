# SPDX-License-Identifier: LGPL-2.1-or-later
"""Say whether the credentials that a service has are what their files hold now.

PID 1 reads LoadCredential= at a start, and gives a new instance that of the running one.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from upgrader.protocol.varlink_types import Description
from upgrader.systemd.unit import Unit, as_text
from upgrader.tool.systemd_client import Systemd

#: Where PID 1 looks for a credential without a path; systemd.exec(5).
_STORES = ("/etc/credstore", "/run/credstore", "/usr/local/lib/credstore", "/usr/lib/credstore")
_MOST = 1 << 20  # bytes, CREDENTIALS_TOTAL_SIZE_MAX of systemd


def stale_credentials(systemd: Systemd, unit: Unit, said: Description) -> tuple[str, ...]:
    """The names of those whose files hold something else now, as far as this user may read both. None
    if PID 1 reads them at each reload, as it can from systemd 260 on."""
    values = systemd.properties(unit)
    if not said.credentials or "credentials" in map(as_text, values.get("RefreshOnReload", ())):
        return ()
    inside = said.credentials.removeprefix("/proc/self/")
    place = f"/proc/{unit.main_pid}/" + (inside if inside != said.credentials else f"root{inside}")
    return tuple(name for name, path in _sources(values) if _differ(path, Path(place, name)))


def _sources(values: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """The names and files of LoadCredential=."""
    for row in values.get("LoadCredential", ()):
        name, source = map(as_text, row[:2])
        places = [Path(source)] if source.startswith("/") else [Path(s, source) for s in _STORES]
        for path in places:
            with contextlib.suppress(OSError):
                if path.is_dir():
                    yield from ((f"{name}_{each.name}", each) for each in sorted(path.iterdir()))
                    break
                if path.is_file():
                    yield name, path
                    break


def _differ(path: Path, other: Path) -> bool:
    """Whether two files hold something else; no if one cannot be read."""
    found = []
    for each in path, other:
        try:
            with open(os.open(each, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
                found.append(file.read(_MOST))
        except OSError:
            return False
    return found[0] != found[1]


def show_stale(unit: str, names: tuple[str, ...]) -> str:
    """What an admin should know of them."""
    what = "credentials" if names[1:] else "credential"
    return (
        f"{what} {', '.join(names)}: the file holds something else now, and only a restart has systemd"
        f" read it; that keeps connections and state as well: upgrader restart {unit}"
    )
