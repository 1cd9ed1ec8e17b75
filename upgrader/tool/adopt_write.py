# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write the drop-in of an adopted unit, and remove it: PID 1 reads its unit files anew afterwards."""

import contextlib
import os
from pathlib import Path

from upgrader.systemd.live_limits import is_runner
from upgrader.tool.adopt import Adoption, AdoptObstacle, ObstacleKind
from upgrader.tool.adopt_drop_in import DROP_IN
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import unit_name


def write(systemd: Systemd, adoption: Adoption) -> AdoptObstacle | None:
    """Put the drop-in in its place; raises OSError, UnitError. If other files of the unit win over it, it is
    removed again, and this says which."""
    path = Path(adoption.path)
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # Written beside and renamed: PID 1 never reads half of it.
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(adoption.text)
        beside.chmod(0o644)
        beside.rename(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    systemd.daemon_reload(adoption.unit)
    unit = systemd.unit(adoption.unit)
    kept = {
        "ExecStart=": is_runner(unit),
        "Type=": unit.type == "notify",
        "KillMode=": unit.kill_mode == "process",
    }
    lost = [name for name, is_kept in kept.items() if not is_kept]
    if not lost:
        return None
    undo(systemd, adoption.unit)
    later = [each for each in unit.drop_in_paths if os.path.basename(each) > path.name]
    what = f"{' and '.join(lost)} of the drop-in would be undone by {', '.join(later)}"
    return AdoptObstacle(ObstacleKind.UNIT_FILES, what, "give that file a name before 60-")


def undo(systemd: Systemd, name: str) -> tuple[str, Path, bool]:
    """Remove the drop-in, whatever is left of it; the unit, the path, and whether it was
    there. Raises OSError, UnitError. A unit that is gone may still have one."""
    name = unit_name(name)
    path = Path(DROP_IN.format(unit=name))
    if found := path.exists():
        path.unlink()
    with contextlib.suppress(OSError):  # others have drop-ins there, or it is not there
        path.parent.rmdir()
    systemd.daemon_reload(name)
    return name, path, found
