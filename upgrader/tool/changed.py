# SPDX-License-Identifier: LGPL-2.1-or-later
"""What has changed since a service was started, so that an upgrade would make a difference; does nothing."""

import contextlib
import os
import time
from collections.abc import Iterator

from upgrader.errors import BusError
from upgrader.protocol.varlink_types import Description
from upgrader.systemd.bus import Bus
from upgrader.systemd.process_start import process_started
from upgrader.systemd.unit import Unit, as_text
from upgrader.systemd.unit_settings import settings
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
    if unit.need_daemon_reload:
        yield "its unit file"
    elif _settings_differ(systemd, unit, said.started.settings):
        yield "settings of its unit"
    for path in _newer(systemd, unit):
        yield f"its environment file {path}"


def _settings_differ(systemd: Systemd, unit: Unit, before: str) -> bool:
    if not before or systemd.user:
        return False
    with contextlib.suppress(BusError), Bus(_BUS) as bus:
        return settings(bus, unit.id).checksum not in ("", before)
    return False


def _newer(systemd: Systemd, unit: Unit) -> Iterator[str]:
    """The files of EnvironmentFile= that were written after the main process was started."""
    with contextlib.suppress(OSError):
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - process_started(unit.main_pid)
        began = time.time() - age
        for path, _ in systemd.properties(unit).get("EnvironmentFiles", ()):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(as_text(path)).st_mtime > began:
                    yield as_text(path)
