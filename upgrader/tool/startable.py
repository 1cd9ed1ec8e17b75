# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make a unit startable however often it has failed; PID 1 keeps all it holds for it.

PID 1 forgets a unit, and its FD store with it, as soon as the unit is not failed any more and nothing
refers to it (https://systemd.io/FILE_DESCRIPTOR_STORE/). So no other module resets a failure of a unit
that serves clients.
"""

import contextlib
import os
from collections.abc import Iterator

from upgrader.systemd.unit import Unit
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import AccessDenied, JobRefused

#: Exists only while a unit is started, where PID 1 takes no reference to it.
DROP_IN = "90-upgrader-start.conf"
#: Where drop-ins are put that exist only while something is done.
RUNTIME = "/run/systemd/system/{unit}.d"


@contextlib.contextmanager
def startable(systemd: Systemd, unit: Unit) -> Iterator[None]:
    """Have the next job start the unit however often it has failed, and lose nothing it holds.

    The reference is that of the connection, so it lasts until `systemd` is closed. Over PID 1's
    private socket, which takes none, the failure stays and its limit is lifted for as long as this
    lasts. Raises UnitError, and OSError if the drop-in for that cannot be written.
    """
    try:
        systemd.pin(unit.id)
    except JobRefused:
        with drop_in(systemd, unit, DROP_IN, "[Unit]\nStartLimitIntervalSec=0\n"):
            yield
        return
    except AccessDenied:
        if not unit.serves:
            raise
        # What serves is not forgotten.
    systemd.reset_failed(unit.id)
    yield


@contextlib.contextmanager
def drop_in(systemd: Systemd, unit: Unit, name: str, text: str) -> Iterator[None]:
    """A drop-in of the unit below /run, gone again afterwards, whatever happens."""
    directory = RUNTIME.format(unit=unit.id)
    if systemd.user:
        runtime = os.environ.get("XDG_RUNTIME_DIR", "/run/user/nobody")
        directory = directory.replace("/run/systemd/system", f"{runtime}/systemd/user")
    path = f"{directory}/{name}"
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
        systemd.daemon_reload(unit.id)
        yield
    finally:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.unlink(path)
            with contextlib.suppress(OSError):
                os.rmdir(directory)  # only if nothing else is in it
            systemd.daemon_reload(unit.id)
