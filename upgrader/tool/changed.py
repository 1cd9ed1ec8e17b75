# SPDX-License-Identifier: LGPL-2.1-or-later
"""Say what has changed since a service was started, so that an upgrade would make a difference."""

import contextlib
import os
import time
from collections.abc import Iterator

from upgrader.errors import BusError
from upgrader.protocol.varlink_types import Description, Started
from upgrader.systemd.bus import Bus
from upgrader.systemd.process_start import process_age
from upgrader.systemd.unit import Unit, as_text
from upgrader.systemd.unit_settings import Settings, command_checksum, settings
from upgrader.tool.systemd_client import Systemd

_BUS = 5.0  # seconds


def changes(systemd: Systemd, unit: Unit, said: Description | None) -> Iterator[str]:
    """What has changed, for people; nothing if a start now would make the same process.

    `said` is what the instance says of itself. What cannot be asked counts as changed.
    """
    if said is None:
        yield "what runs, which cannot be asked"
        return
    if said.changed:
        more = f" and {len(said.changed) - 1} more" if said.changed[1:] else ""
        yield f"files of the program: {said.changed[0]}{more}"
    if said.reread:
        yield f"a file that it reads at a reload: {said.reread[0]}"
    if unit.need_daemon_reload:
        yield "its unit file"
    elif _settings_differ(systemd, unit, said.started):
        yield "settings of its unit"
    for path in _newer(systemd, unit):
        yield f"its environment file {path}"


def _settings_differ(systemd: Systemd, unit: Unit, started: Started) -> bool:
    before = Settings(started.settings, started.command)
    now = Settings(command=command_checksum(unit.exec_start[-1]) if unit.exec_start else "")
    if before.checksum and not systemd.user:
        with contextlib.suppress(BusError), Bus(_BUS) as bus:
            now = now.replace(checksum=settings(bus, unit.id, bus.properties(unit.id)).checksum)
    return now.differs(before)


def _newer(systemd: Systemd, unit: Unit) -> Iterator[str]:
    """The files of EnvironmentFile= that were written after the main process was started."""
    with contextlib.suppress(OSError):
        age = process_age(unit.main_pid)
        began = time.time() - age
        for path, _ in systemd.properties(unit).get("EnvironmentFiles", ()):
            with contextlib.suppress(FileNotFoundError):
                # A copy may bring its time of modification along.
                if os.stat(as_text(path)).st_ctime > began:
                    yield as_text(path)
