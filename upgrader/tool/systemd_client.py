# SPDX-License-Identifier: LGPL-2.1-or-later
"""The units and jobs of PID 1 over D-Bus, in typed values.

pystemd gives the connection and the encoding. Its classes that introspect an object are not used:
one `GetAll` reads a whole unit, and each question to PID 1 during a restart lengthens the pause.
"""

import contextlib
import difflib
import math
import os
import re
import select
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from upgrader.systemd.unit import (
    Change,
    FdStoreContents,
    Job,
    SocketUnit,
    Unit,
    as_text,
)
from upgrader.tool.bus_errors import bus_errors, translated
from upgrader.tool.unit_errors import (
    BusUnreachable,
    InvalidUnitName,
    MissingPackage,
    NoSuchUnit,
    WaitTimeout,
    unit_name,
)

if TYPE_CHECKING:
    from pystemd.dbuslib import DBus, DbusMessage

_PID1 = b"org.freedesktop.systemd1"
_PID1_PATH = b"/org/freedesktop/systemd1"
_PID1_INTERFACE = b"org.freedesktop.systemd1.Manager"
_PROPERTIES = b"org.freedesktop.DBus.Properties"
_BUS = (b"org.freedesktop.DBus", b"/org/freedesktop/DBus", b"org.freedesktop.DBus")

#: As systemctl falls back to: takes root only, no references, and sends all signals unasked.
_PRIVATE = "/run/systemd/private"
#: It is there as long as systemd is PID 1: sd_booted(3).
_BOOTED = "/run/systemd/system"
_SIGNAL = 4  # SD_BUS_MESSAGE_SIGNAL
# sd_bus_process() may handle a message by itself and return none although more are queued.
_EMPTY_READS = 3
# Longest wait for one event before the queue is looked at again.
_POLL_MS = 1000


class Systemd:
    """A connection to PID 1, closed by `with`; all that goes wrong is raised as UnitError.

    One thread at a time. A call blocks at most as long as sd-bus waits for a reply, 25 s.
    """

    def __init__(self, *, user: bool = False) -> None:
        """`user`: this user's own service manager, not PID 1."""
        self.user = user
        self._watched: set[str] = set()
        self._bus, self._direct = _connected(user)
        try:
            version = self._get(_PID1_PATH.decode(), _PID1_INTERFACE, "Version")
        except BaseException:
            self.close()
            raise
        self.version = as_text(version)
        self.release = int("".join(re.findall(r"^\d+", self.version)) or 0)

    def close(self) -> None:
        """Close the connection; jobs go on."""
        self._bus.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # What there is

    def unit(self, name: str) -> Unit:
        """Read a unit, through its aliases; raises NoSuchUnit."""
        name = unit_name(name)
        if "@." in name:
            running = name.replace("@.", "@*.")
            raise InvalidUnitName(
                name,
                "this is a template",
                remedy=f"name an instance of it; all that run: '{running}'",
            )
        with translated(name, "read this unit"):
            path = as_text(self._call("LoadUnit", b"s", name))
        unit = self._read(name, path)
        if unit.load_state == "not-found" and not unit.serves:
            raise NoSuchUnit(name, self.similar(name))
        return unit

    def properties(self, unit: Unit) -> dict[str, Any]:
        """All properties of a unit, as D-Bus has them."""
        with translated(unit.id, "read this unit"):
            return self._get_all(unit.path)

    def services(self) -> tuple[str, ...]:
        """The names of all service units in memory, by name; also of those that run on without a file."""
        with translated("", "list units"):
            rows = self._call("ListUnitsByPatterns", b"asas", [], ["*.service"])
        there = [row for row in rows if as_text(row[2]) == "loaded" or as_text(row[3]) == "active"]
        return tuple(sorted(as_text(row[0]) for row in there))

    def keeps(self, name: str) -> bool:
        """Whether a unit in memory has an FD store, which every service of this library needs, or nobody
        knows, because its file is gone."""
        with translated(name, "read this unit"):
            path = as_text(self._call("LoadUnit", b"s", name))
            if as_text(self._get(path, _PID1 + b".Unit", "LoadState")) == "not-found":
                return True
            return bool(self._get(path, _PID1 + b".Service", "FileDescriptorStoreMax"))

    def similar(self, name: str) -> tuple[str, ...]:
        """At most two names of service units that look like `name`."""
        with translated(name, "list units"):
            files = self._call("ListUnitFilesByPatterns", b"asas", [], ["*.service"])
            loaded = self._call("ListUnitsByPatterns", b"asas", [], ["*.service"])
        names = {as_text(path).rpartition("/")[2] for path, _ in files}
        names |= {as_text(row[0]) for row in loaded if as_text(row[2]) == "loaded"}
        names = {each for each in names if "@." not in each and each != name}
        return tuple(difflib.get_close_matches(name, sorted(names), n=2, cutoff=0.7))

    def running(self, pattern: str, *, failed: bool = False) -> tuple[str, ...]:
        """The names of service units that match `pattern` (as with systemctl) and serve, sorted.

        `failed`: also of those that have failed, or are between two attempts to start.
        """
        states = ["active", "reloading", *(("failed", "activating") if failed else ())]
        with translated(pattern, "list units"):
            rows = self._call("ListUnitsByPatterns", b"asas", states, [pattern])
        return tuple(sorted(as_text(row[0]) for row in rows))

    def job(self, unit: Unit) -> Job | None:
        """The job in flight for this unit, as of now."""
        with translated(unit.id, "read its job"):
            number, path = self._get(unit.path, _PID1 + b".Unit", "Job")
            if not number:
                return None
            try:
                kind, state = (
                    as_text(self._get(as_text(path), _PID1 + b".Job", name))
                    for name in ("JobType", "State")
                )
            except bus_errors() as error:
                if type(error).__name__ == "DBusUnknownObjectError":
                    return None  # done in the meantime
                raise
        return Job(int(number), kind, state)

    def fd_store(self, unit: Unit) -> FdStoreContents:
        """What PID 1 holds for this unit; the names are readable from systemd 254 on."""
        with (
            contextlib.suppress(NoSuchUnit),  # PID 1 has forgotten it: nothing is stored for it
            translated(unit.id, "read its FD store"),
        ):
            if self.release < 254:
                count = self._get(unit.path, _PID1 + b".Service", "NFileDescriptorStore")
                return FdStoreContents(int(count), None)
            if not unit.fd_store_max:
                return FdStoreContents(0, ())  # PID 1 refuses to list what is not enabled
            entries = self._call("DumpUnitFileDescriptorStore", b"s", unit.id)
            names = tuple(as_text(entry[0]) for entry in entries)
            return FdStoreContents(len(names), names)
        return FdStoreContents(0, ())

    def sockets(self, unit: Unit) -> tuple[SocketUnit, ...]:
        """The `.socket` units that start this one."""
        found = []
        for name in unit.triggered_by:
            if name.endswith(".socket"):
                with translated(name, "read this unit"):
                    path = as_text(self._call("LoadUnit", b"s", name))
                    values = self._get_all(path)
                found.append(SocketUnit.from_properties(values))
        return tuple(found)

    def stored_inodes(self, unit: Unit) -> dict[str, int]:
        """The inode of each FD that PID 1 holds for this unit, by name; none before systemd 254."""
        if self.release < 254 or not unit.fd_store_max:
            return {}
        with translated(unit.id, "read its FD store"):
            entries = self._call("DumpUnitFileDescriptorStore", b"s", unit.id)
        return {as_text(entry[0]): int(entry[4]) for entry in entries}

    def processes(self, unit: Unit) -> tuple[int, ...]:
        """The processes of a unit, in all its cgroups."""
        with translated(unit.id, "list its processes"):
            rows = self._call("GetUnitProcesses", b"s", unit.id)
        return tuple(sorted(int(row[1]) for row in rows))

    def dynamic_user(self, uid: int) -> str:
        """The name of a user that DynamicUser= has made; raises UnitError if PID 1 knows none."""
        with translated("", "look up a dynamic user"):
            return as_text(self._call("LookupDynamicUserByUID", b"u", uid))

    # What is done

    def daemon_reload(self, unit: str) -> None:
        """Make PID 1 read its unit files anew; `unit` only names it in an error."""
        with translated(unit, "reload unit files"):
            self._call("Reload", b"")

    def reset_failed(self, unit: str) -> None:
        """Forget a failure and the count of starts that StartLimitBurst= bounds, before a start."""
        with translated(unit, "start it"):
            self._call("ResetFailedUnit", b"s", unit)

    def pin(self, unit: str) -> None:
        """Keep the unit, and so its FD store, in PID 1 while this connection is open."""
        with translated(unit, "keep the unit loaded"):
            self._call("RefUnit", b"s", unit)

    def start(self, unit: Unit) -> int:
        """Queue a start job and return its id; raises JobConflict, never replaces another job."""
        return self._submit("StartUnit", "start", unit)

    def stop(self, unit: Unit, *, replaces: bool = False) -> int:
        """Queue a stop job and return its id, as `start`; if it `replaces`, in place of any other job."""
        return self._submit("StopUnit", "stop", unit, "replace" if replaces else "fail")

    def restart(self, unit: Unit) -> int:
        """Queue a restart job and return its id, as `start`."""
        return self._submit("RestartUnit", "restart", unit)

    def try_restart(self, unit: Unit) -> int:
        """Queue a restart job, unless the unit does not run, and return its id, as `start`."""
        return self._submit("TryRestartUnit", "restart", unit)

    def reload(self, unit: Unit) -> int:
        """Queue a reload job and return its id, as `start`."""
        return self._submit("ReloadUnit", "reload", unit)

    # What happens

    def watch(self, unit: Unit) -> None:
        """Have PID 1 send the changes of this unit from now on, for `changes`."""
        if unit.path in self._watched:
            return
        with translated(unit.id, "watch it"):
            self._call("Subscribe", b"")
            if self._direct:
                self._watched.add(unit.path)
                return
            pid1 = f"type='signal',sender='{_PID1.decode()}'"
            for rule in (
                f"{pid1},path='{_PID1_PATH.decode()}',member='JobRemoved'",
                f"{pid1},path='{unit.path}',interface='{_PROPERTIES.decode()}'",
            ):
                self._bus.call_method(*_BUS, b"AddMatch", _arguments(b"s", rule))
        self._watched.add(unit.path)

    def changes(self, unit: Unit, timeout: float | None = None) -> Iterator[Change]:
        """Yield what PID 1 says about this unit from `watch` on.

        Raises WaitTimeout after `timeout` seconds.
        """
        self.watch(unit)
        deadline = None
        if timeout is not None and timeout != math.inf:
            deadline = time.monotonic() + timeout
        while True:
            with translated(unit.id, "wait for it"):
                message = self._next(deadline)
                change = None if message is None else _change(unit, message)
            if message is None:
                raise WaitTimeout(unit.id, timeout or 0)
            if change is not None:
                yield change

    def wait_job(self, unit: Unit, job: int, timeout: float | None = None) -> str:
        """Wait for the end of a job that was queued after `watch`; returns PID 1's word for it.

        The words are done, failed, canceled, timeout, dependency, skipped, and more.
        """
        for change in self.changes(unit, timeout):
            if change.job_id == job:
                return change.job_result
        raise AssertionError("unreachable")

    # How it is asked

    def _submit(self, method: str, operation: str, unit: Unit, mode: str = "fail") -> int:
        self.watch(unit)
        with translated(unit.id, f"{operation} it"):
            path = as_text(self._call(method, b"ss", unit.id, mode))
        return int(path.rpartition("/")[2])

    def _call(self, method: str, signature: bytes, *values: object) -> Any:
        return self._bus.call_method(
            _PID1, _PID1_PATH, _PID1_INTERFACE, method.encode(), _arguments(signature, *values)
        ).body

    def _get(self, path: str, interface: bytes, name: str) -> Any:
        return self._bus.call_method(
            _PID1, path.encode(), _PROPERTIES, b"Get", _arguments(b"ss", interface, name)
        ).body

    def _read(self, name: str, path: str) -> Unit:
        with translated(name, "read this unit"):
            return Unit.from_properties(path, self._get_all(path))

    def _get_all(self, path: str) -> dict[str, Any]:
        # The empty interface stands for all of them.
        values = self._bus.call_method(
            _PID1, path.encode(), _PROPERTIES, b"GetAll", _arguments(b"s", "")
        ).body
        return {as_text(key): value for key, value in values.items()}

    def _next(self, deadline: float | None) -> "DbusMessage | None":
        poll = select.poll()
        poll.register(self._bus.get_fd(), select.POLLIN)
        while True:
            for _ in range(_EMPTY_READS):
                message = self._bus.process()
                if not message.is_empty() and message.get_type() == _SIGNAL:
                    return message
            left = _POLL_MS
            if deadline is not None:
                left = min(left, int((deadline - time.monotonic()) * 1000) + 1)
                if left <= 0:
                    return None
            poll.poll(left)


def _connected(user: bool) -> "tuple[DBus, bool]":
    """A connection over the bus, or, for root where there is none, to PID 1 itself; and whether."""
    try:
        from pystemd.dbuslib import DBus, DBusAddress
    except ImportError as error:
        raise MissingPackage("pystemd") from error
    bus = DBus(user_mode=user)
    try:
        with translated("", "connect"):
            bus.open()
    except BusUnreachable as error:
        if user:
            raise _no_session(error) from error
        if not os.path.isdir(_BOOTED):
            raise _no_systemd() from error
        if os.geteuid() != 0 or not os.path.exists(_PRIVATE):
            raise
        bus = DBusAddress(f"unix:path={_PRIVATE}".encode(), peer_to_peer=True)
        with translated("", "connect"):
            bus.open()
        return bus, True
    return bus, False


def _no_systemd() -> BusUnreachable:
    return BusUnreachable(
        "",
        "it does not run on this machine",
        remedy="to look around in one that is booted for it: upgrader demo --shell",
    )


def _no_session(error: BusUnreachable) -> BusUnreachable:
    """The same error of a user's own service manager: who tells the way to it is the session."""
    user = os.geteuid()
    if not {"DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR"}.isdisjoint(os.environ):
        remedy = f"see whether it runs: systemctl status user@{user}.service"
        return BusUnreachable("", error.reason, remedy=remedy)
    return BusUnreachable(
        "",
        "XDG_RUNTIME_DIR is not set: this is no session of a user",
        remedy="log in as that user; su and sudo open no session. With lingering, this is one:"
        f" export XDG_RUNTIME_DIR=/run/user/{user}",
    )


def _change(unit: Unit, message: "DbusMessage") -> Change | None:
    path, member = as_text(message.get_path()), message.get_member()
    if member == b"PropertiesChanged" and path == unit.path:
        message.process_reply(False)
        _, values, _ = message.body
        # An empty dictionary arrives as an empty list.
        return Change({as_text(key): value for key, value in dict(values).items()})
    if member == b"JobRemoved":
        message.process_reply(False)
        number, _, name, result = message.body
        if as_text(name) == unit.id:
            return Change({}, int(number), as_text(result))
    return None


def _arguments(signature: bytes, *values: object) -> list[Any]:
    from pystemd.dbuslib import apply_signature

    return list(apply_signature(signature, list(values))) if signature else []
