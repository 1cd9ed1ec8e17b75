# SPDX-License-Identifier: LGPL-2.1-or-later
"""Start a unit's program behind a runner once, in the unit's own sandbox, and see whether it takes its
listeners: beside the unit that serves, which must not notice.

The trial is a unit of its own below /run with the same [Service], so the same user, limits and
sandbox. The addresses are the same as well, in a network namespace of its own; so are the paths in
/run, where the files and sockets of the unit are hidden from the trial, and the trial's from all.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from upgrader.systemd.unit import Unit
from upgrader.tool import failure_cause
from upgrader.tool.adopt import TRIAL, Adoption, AdoptObstacle, ObstacleKind
from upgrader.tool.outcome import Tell
from upgrader.tool.presence import look
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import JobConflict, UnitError, WaitTimeout
from upgrader.tool.unit_sockets import open_sockets

_PLACE = Path("/run/systemd/system")
_LOCK = "/run/upgrader-adopt.lock"
_LONGEST = 60  # seconds for a start, and then for a stop
#: In the network namespace of the trial, and never in PID 1's, any address may be bound, and if PID 1
#: passes listeners otherwise, any port by any user; Documentation/networking/ip-sysctl.rst of Linux.
_SYSCTL = "ExecStartPre=+-/bin/sh -c 'test /proc/self/ns/net -ef /proc/1/ns/net || {}'"
_NONLOCAL = "echo 1 | tee /proc/sys/net/ipv4/ip_nonlocal_bind >/proc/sys/net/ipv6/ip_nonlocal_bind"
_ANY_PORT = "echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start"
#: What the unit does around its program is done by the unit alone.
_RESET = ("ExecCondition", "ExecStartPre", "ExecStartPost", "ExecStopPost")


def try_out(systemd: Systemd, unit: Unit, adoption: Adoption, say: Tell) -> AdoptObstacle | None:
    """Why it does not work, or None if it does; one trial at a time. Raises UnitError, OSError.

    Whatever ends this process, the trial ends after two minutes, and the next one begins anew.
    """
    for each in adoption.listens:
        path = each.address.removeprefix("unix:")
        if (
            not each.passed
            and path != each.address
            and not path.startswith(("@", "/run/", "/var/run/"))
        ):
            cause = f"it cannot be tried: its listener {path} is not in /run"
            return AdoptObstacle(ObstacleKind.TRIAL, cause, "to write it untried: --untried")
    name = TRIAL + unit.id
    place = _PLACE / name
    since = time.monotonic_ns() // 1000
    say(f"{unit.id}: its program is started beside it, as {name}")
    with (
        _alone(unit),
        _unit_file(systemd, place, "\n".join(_lines(systemd, unit, adoption)) + "\n"),
    ):
        trial = systemd.unit(name)
        if not trial.settled or trial.serves:  # somebody was killed in a trial
            _stop(systemd, trial)
        try:
            job = systemd.start(trial)
            result = systemd.wait_job(trial, job, 2 * _LONGEST)
            if result == "done":
                return _compare(systemd, systemd.unit(name), adoption)
        except WaitTimeout:
            pass
        finally:
            _stop(systemd, trial)
        ended = systemd.unit(name)
        entries = failure_cause.read(ended, since)
        why = failure_cause.cause(entries, ended).text
        if said := failure_cause.last_words(entries, {ended.exec_main_pid}):
            why = f"{why}: {said}"
        remedy = f"see: journalctl -u {name}"
        return AdoptObstacle(
            ObstacleKind.TRIAL, f"its program was tried behind a runner: {why}", remedy
        )


def _compare(systemd: Systemd, trial: Unit, adoption: Adoption) -> AdoptObstacle | None:
    """Whether the program has what the runner has, and no more, and the runner can ask systemd."""
    said = look(systemd, trial).said
    if said and said.can is not None and "bus" not in said.can:
        cause = "the runner of its trial could not ask systemd, which it has to"
        remedy = "let it reach /run/dbus/system_bus_socket"
        return AdoptObstacle(ObstacleKind.BUS, cause, remedy)
    sockets = open_sockets(systemd.processes(trial))
    for each in sockets:
        if each.pids == {trial.main_pid} and not each.removed:
            where = f"it does not take its listener {each}, as it was started"
            remedy = "docs/programs.md has ways to pass it: upgrader adopt UNIT -- --pass HOW"
            return AdoptObstacle(
                ObstacleKind.TRIAL, f"{adoption.program} was tried: {where}", remedy
            )
        if trial.main_pid not in each.pids and not each.removed:
            cause = (
                f"{adoption.program} was tried: it binds {each} itself, and so would a second one"
            )
            return AdoptObstacle(
                ObstacleKind.BINDS, cause, "have it use none, or one that is passed"
            )
    return None


def _lines(systemd: Systemd, unit: Unit, adoption: Adoption) -> Iterator[str]:
    """The unit file of the trial."""
    yield "[Unit]"
    yield "StartLimitIntervalSec=0"
    yield "[Service]"
    for path in (unit.fragment_path, *unit.drop_in_paths):
        if path:
            yield from service_lines(Path(path).read_text(errors="surrogateescape"))
    for name in _RESET:
        yield f"{name}="
    yield from (line for line in adoption.lines if not line.startswith(("[", "StartLimit")))
    yield "ExecStart="
    yield adoption.start
    yield "Restart=no"
    yield "ExecStopPost="  # what the trial leaves, PID 1 ends
    yield "KillMode=control-group"
    yield f"TimeoutStartSec={_LONGEST}"
    yield f"RuntimeMaxSec={_LONGEST}"
    yield "FileDescriptorStorePreserve=no"
    yield "RuntimeDirectory="
    yield f"RuntimeDirectory={TRIAL}{unit.id}"
    yield "RuntimeDirectoryPreserve=no"
    if unit.dynamic_user:  # or its directories would be given to another one
        yield f"User={systemd.dynamic_user(unit.uid)}"
    yield "NetworkNamespacePath="
    yield "PrivateNetwork=yes"
    yield _SYSCTL.format(_NONLOCAL)
    if any(each.passed for each in adoption.listens):
        yield _SYSCTL.format(_ANY_PORT)
    yield from _private_run(unit, adoption)


def service_lines(text: str) -> Iterator[str]:
    """What a unit file has below [Service], as it is; systemd.syntax(7)."""
    inside, continued = False, False
    for line in text.splitlines():
        if not continued and line.lstrip().startswith("["):
            inside = line.strip() == "[Service]"
        elif inside:
            yield line
        comment = line.lstrip().startswith(("#", ";"))
        continued = continued if comment else line.endswith("\\")


def _private_run(unit: Unit, adoption: Adoption) -> Iterator[str]:
    """A /run with all that others have there, and none of the unit's own."""
    own = {f"/run/{name.split('/')[0]}" for name in unit.runtime_directories}
    files = [adoption.pid_file, *(each.rpartition(" ")[2] for each in adoption.left_alone)]
    files += [each.address.removeprefix("unix:") for each in adoption.listens]
    for path in files:
        real = os.path.realpath(path) if path.startswith("/") else ""
        if real.startswith("/run/") and real.count("/") > 2:
            own.add("/".join(real.split("/")[:3]))
    yield "TemporaryFileSystem=/run:mode=0755"
    for each in sorted(own):
        with contextlib.suppress(OSError):
            found = os.stat(each)
            mode = stat.S_IMODE(found.st_mode)
            yield f"TemporaryFileSystem={each}:mode={mode:04o},uid={found.st_uid},gid={found.st_gid}"
    with os.scandir("/run") as entries:
        shown = [each.path for each in entries if each.is_dir(follow_symlinks=False)]
    shown.append(f"/run/{TRIAL}{unit.id}")
    for path in sorted({*shown} - own - {"/run/credentials"}):
        if " " not in path and ":" not in path:
            yield f"BindPaths=-{path}"


@contextlib.contextmanager
def _alone(unit: Unit) -> Iterator[None]:
    """While no other process tries anything; raises JobConflict, OSError."""
    with open(_LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobConflict(unit.id, "a unit is being tried for adoption") from None
        yield


@contextlib.contextmanager
def _unit_file(systemd: Systemd, place: Path, text: str) -> Iterator[None]:
    """A unit below /run, gone again afterwards, whatever happens."""
    place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        place.write_text(text, errors="surrogateescape")
        systemd.daemon_reload(place.name)
        yield
    finally:
        with contextlib.suppress(UnitError):
            systemd.reset_failed(place.name)
        place.unlink(missing_ok=True)
        shutil.rmtree(f"/run/{place.name}", ignore_errors=True)
        systemd.daemon_reload(place.name)


def _stop(systemd: Systemd, trial: Unit) -> None:
    with contextlib.suppress(UnitError):
        systemd.wait_job(trial, systemd.stop(trial, replaces=True), _LONGEST)
