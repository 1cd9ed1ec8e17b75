# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service unit is: its name, the values PID 1 gives it, and the errors.

UpgradeError
└── UnitError            PID 1 could not be asked about a unit, or refused        .unit
    ├── InvalidUnitName  this cannot be the name of a service unit
    ├── NoSuchUnit       no unit file of that name                                .similar
    ├── AccessDenied     not allowed to this user                                 .operation
    ├── BusUnreachable   no bus, no PID 1 on it, or the connection was lost       .reason
    ├── JobConflict      another job is in the way                                .reason
    ├── JobRefused       PID 1 refused, in its own words                          .operation .reason
    ├── WaitTimeout      the time given for waiting is over                       .seconds
    └── MissingPackage   the command line needs a package that is not installed   .package
"""

from __future__ import annotations

import re

from upgrader.errors import UpgradeError
from upgrader.protocol.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any, Self

#: PID 1's word for a number or an ID that is not set.
UNSET = 2**64 - 1
UNSET_ID = 2**32 - 1
#: Type= of a unit that reports the end of a reload itself; from systemd 253 on.
NOTIFY_RELOAD = "notify-reload"

_TAKEOVER = ("upgrader.takeover", "upgrader-takeover")
_UNIT_NAME = r"[A-Za-z0-9:_.\\@-]{1,255}"
_OTHER_KINDS = frozenset(
    ("socket", "target", "timer", "mount", "automount", "path", "slice", "scope", "device", "swap")
)


class UnitError(UpgradeError):
    """PID 1 could not be asked about `unit`, or refused; the root of this module's errors."""

    def __init__(self, unit: str, message: str, *, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.unit = unit

    def __str__(self) -> str:
        return f"{self.unit}: {super().__str__()}" if self.unit else super().__str__()


class InvalidUnitName(UnitError):
    """`unit` cannot be the name of a service unit."""


class NoSuchUnit(UnitError):
    """PID 1 finds no unit file of that name; `similar` holds names that exist and look like it."""

    def __init__(self, unit: str, similar: tuple[str, ...] = ()) -> None:
        meant = f"did you mean {' or '.join(similar)}? " if similar else ""
        super().__init__(
            unit,
            "there is no such unit",
            remedy=f"{meant}after adding a unit file: systemctl daemon-reload",
        )
        self.similar = similar


class NoMatchingUnit(UnitError):
    """No service that runs matches the pattern `unit`."""

    def __init__(self, unit: str) -> None:
        super().__init__(
            unit,
            "no service that runs matches this pattern",
            remedy=f"see: systemctl list-units --all '{unit}'",
        )


class AccessDenied(UnitError):
    """PID 1 does not allow `operation` to this user."""

    def __init__(self, unit: str, operation: str) -> None:
        super().__init__(
            unit,
            f"systemd does not allow you to {operation}",
            remedy="run the command as root, with sudo for instance, or have polkit allow it: see"
            " /usr/share/upgrader/polkit/50-upgrader.rules",
        )
        self.operation = operation


class BusUnreachable(UnitError):
    """The system bus, or PID 1 on it, cannot be reached, or the connection was lost."""

    def __init__(self, unit: str, reason: str, *, remedy: str = "") -> None:
        usual = "see whether the bus runs: systemctl status dbus.socket dbus.service"
        super().__init__(
            unit, f"systemd cannot be reached over D-Bus: {reason}", remedy=remedy or usual
        )
        self.reason = reason


class JobConflict(UnitError):
    """Another job is in the way, and it is not replaced; try again when it is done."""

    def __init__(self, unit: str, reason: str) -> None:
        super().__init__(
            unit,
            f"busy: {reason}",
            remedy="wait for it, then try again; see: systemctl list-jobs",
        )
        self.reason = reason


class JobRefused(UnitError):
    """PID 1 refused to do `operation`; `reason` holds its own words."""

    def __init__(self, unit: str, operation: str, reason: str) -> None:
        super().__init__(
            unit,
            f"systemd refused to {operation}: {reason}",
            remedy=f"see: systemctl status {unit}",
        )
        self.operation = operation
        self.reason = reason


class WaitTimeout(UnitError):
    """The time given for waiting, `seconds`, is over; what was asked of PID 1 goes on."""

    def __init__(self, unit: str, seconds: float) -> None:
        super().__init__(
            unit,
            f"not settled after {seconds:g} s",
            remedy=f"the job goes on; see: systemctl status {unit}",
        )
        self.seconds = seconds


class MissingPackage(UnitError):
    """A package that the command line needs, and the library does not, is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(
            "",
            f"the Python package {package} is missing",
            remedy="install it: pip install 'upgrader[cli]'",
        )
        self.package = package


class Job(Value):
    """A job of PID 1: `kind` is start, stop, restart, ...; `state` is waiting or running."""

    id: int
    kind: str
    state: str


class ExecCommand(Value):
    """One command line of a unit, before its variables are expanded."""

    path: str
    arguments: tuple[str, ...]
    flags: tuple[str, ...]  # no-env-expand, ignore-failure, ...

    @property
    def runs_takeover(self) -> bool:
        """Whether it is the line of ExecReload= that does live upgrades."""
        return any(name in word for name in _TAKEOVER for word in (self.path, *self.arguments))


class SocketUnit(Value):
    """A `.socket` unit as PID 1 has it now: what it listens on, and under which name it passes it.

    `listens` holds (kind, address) as PID 1 shows them, such as `("Stream", "[::]:80")`; of one
    that is not `active`, nothing is passed.
    """

    id: str
    active: bool
    name: str
    listens: tuple[tuple[str, str], ...]

    @classmethod
    def from_properties(cls, values: Mapping[str, Any]) -> Self:
        """A `.socket` unit from all its D-Bus properties, as text or as bytes."""
        name = as_text(values["Id"])
        listens = tuple((as_text(k), as_text(a)) for k, a in values.get("Listen", ()))
        active = as_text(values["ActiveState"]) == "active"
        return cls(name, active, as_text(values.get("FileDescriptorName", b"")) or name, listens)


class Unit(Value):
    """One service unit as PID 1 saw it at one instant; words and numbers are PID 1's own."""

    id: str
    names: tuple[str, ...]
    path: str
    load_state: str
    load_error: str
    active_state: str
    sub_state: str
    result: str
    type: str
    main_pid: int
    exec_main_pid: int
    exec_main_code: int
    exec_main_status: int
    status_text: str
    job_id: int
    need_daemon_reload: bool
    stored_fds: int
    fd_store_max: int
    fd_store_preserve: str | None
    """FileDescriptorStorePreserve=; None before systemd 254, which has no such setting."""
    notify_access: str
    restart: str
    restart_usec: int
    restarts: int
    invocation_id: str
    fragment_path: str
    drop_in_paths: tuple[str, ...]
    environment: tuple[str, ...]
    timeout_start_usec: int
    timeout_stop_usec: int
    start_limit_usec: int
    active_enter_usec: int
    active_enter_time: int
    """The same instant in microseconds since the Unix epoch."""
    active_exit_usec: int
    state_change_usec: int
    control_pid: int
    reload_result: str
    watchdog_usec: int
    exec_start: tuple[ExecCommand, ...]
    exec_reload: tuple[ExecCommand, ...]
    user: str
    group: str
    dynamic_user: bool
    private_users: bool
    protect_proc: str
    uid: int
    """The user that PID 1 started it as, whatever User= says now; UNSET_ID where that was root."""
    gid: int
    private_pids: str
    """PrivatePIDs=; empty before systemd 257, which has no such setting."""
    kill_mode: str
    kill_signals: tuple[int, ...]
    """KillSignal= and RestartKillSignal=."""
    oom_policy: str
    runtime_directories: tuple[str, ...]
    credentials: tuple[str, ...]
    """The names in LoadCredential=, SetCredential= and their encrypted kin."""
    triggered_by: tuple[str, ...]
    unset_environment: tuple[str, ...]
    exec_search_path: tuple[str, ...]
    memory_max: int
    memory_current: int
    memory_available: int
    """What the limits of the unit and of its slices leave; UNSET where PID 1 does not say."""
    log_namespace: str

    @classmethod
    def from_properties(cls, path: str, values: Mapping[str, Any]) -> Self:
        """A unit from all its D-Bus properties, as text or as bytes."""

        def text(name: str) -> str:
            return as_text(values.get(name, b""))

        def number(name: str, default: int = 0) -> int:
            return int(values.get(name, default))

        def texts(name: str) -> tuple[str, ...]:
            return tuple(as_text(item) for item in values.get(name, ()))

        error_name, error_text = values.get("LoadError", (b"", b""))
        return cls(
            id=text("Id"),
            names=texts("Names"),
            path=path,
            load_state=text("LoadState"),
            load_error=as_text(error_text) or as_text(error_name),
            active_state=text("ActiveState"),
            sub_state=text("SubState"),
            result=text("Result"),
            type=text("Type"),
            main_pid=number("MainPID"),
            exec_main_pid=number("ExecMainPID"),
            exec_main_code=number("ExecMainCode"),
            exec_main_status=number("ExecMainStatus"),
            status_text=text("StatusText"),
            job_id=int(values.get("Job", (0, b""))[0]),
            need_daemon_reload=bool(values.get("NeedDaemonReload", False)),
            stored_fds=number("NFileDescriptorStore"),
            fd_store_max=number("FileDescriptorStoreMax"),
            fd_store_preserve=text("FileDescriptorStorePreserve") or None,
            notify_access=text("NotifyAccess"),
            restart=text("Restart"),
            restart_usec=number("RestartUSec"),
            restarts=number("NRestarts"),
            invocation_id=bytes(values.get("InvocationID", ())).hex(),
            fragment_path=text("FragmentPath"),
            drop_in_paths=texts("DropInPaths"),
            environment=texts("Environment"),
            timeout_start_usec=number("TimeoutStartUSec"),
            timeout_stop_usec=number("TimeoutStopUSec"),
            start_limit_usec=number("StartLimitIntervalUSec"),
            active_enter_usec=number("ActiveEnterTimestampMonotonic"),
            active_enter_time=number("ActiveEnterTimestamp"),
            active_exit_usec=number("ActiveExitTimestampMonotonic"),
            state_change_usec=number("StateChangeTimestampMonotonic"),
            control_pid=number("ControlPID"),
            reload_result=text("ReloadResult"),
            watchdog_usec=number("WatchdogUSec"),
            exec_start=commands(values.get("ExecStartEx", ())),
            exec_reload=commands(values.get("ExecReloadEx", ())),
            user=text("User"),
            group=text("Group"),
            dynamic_user=bool(values.get("DynamicUser", False)),
            private_users=bool(values.get("PrivateUsers", False)),
            protect_proc=text("ProtectProc"),
            uid=number("UID", UNSET_ID),
            gid=number("GID", UNSET_ID),
            private_pids=text("PrivatePIDs"),
            kill_mode=text("KillMode"),
            kill_signals=(number("KillSignal", 15), number("RestartKillSignal", 15)),
            oom_policy=text("OOMPolicy"),
            runtime_directories=texts("RuntimeDirectory"),
            credentials=credential_names(values),
            triggered_by=texts("TriggeredBy"),
            unset_environment=texts("UnsetEnvironment"),
            exec_search_path=texts("ExecSearchPath"),
            memory_max=number("MemoryMax", UNSET),
            memory_current=number("MemoryCurrent", UNSET),
            memory_available=number("MemoryAvailable", UNSET),
            log_namespace=text("LogNamespace"),
        )

    @property
    def further_reloads(self) -> tuple[str, ...]:
        """What a reload runs besides takeover, as command lines."""
        others = [line for line in self.exec_reload if not line.runs_takeover]
        return tuple(" ".join((line.path, *line.arguments[1:])) for line in others)

    @property
    def serves(self) -> bool:
        """PID 1 holds it for started: READY=1 was seen, and it is not on its way out."""
        return self.active_state in ("active", "reloading", "refreshing")

    @property
    def retries(self) -> bool:
        """PID 1 is between two attempts of its own to start it."""
        return self.sub_state.startswith("auto-restart")

    @property
    def settled(self) -> bool:
        """Nothing more happens soon: started, failed, stopped, or between two attempts."""
        return self.serves or self.retries or self.active_state in ("inactive", "failed")


class FdStoreContents(Value):
    """The FD store of a unit: how many FDs, and their names (None before 254)."""

    count: int
    names: tuple[str, ...] | None


class Change(Value):
    """What PID 1 said by itself about one unit: new values, or the end of a job."""

    values: Mapping[str, Any]
    job_id: int = 0
    job_result: str = ""


def show_socket(name: str, kind: str, address: str) -> str:
    """A socket of a `.socket` unit, for comparing what there is with what would be passed now."""
    return f"{name}={kind} {address}"


def unit_name(text: str) -> str:
    """The full name of a service unit; `.service` may be left out, as with systemctl."""
    if not re.fullmatch(_UNIT_NAME, text):
        raise InvalidUnitName(
            text, "this is not the name of a unit", remedy="give a name such as web.service"
        )
    kind = text.rpartition(".")[2] if "." in text else ""
    if kind == "service":
        return text
    if kind in _OTHER_KINDS:
        raise InvalidUnitName(
            text,
            f"this is a {kind} unit, and only services are upgraded",
            remedy=f"name the service: {text.removesuffix(kind)}service",
        )
    return text + ".service"


def as_text(value: bytes | str) -> str:
    """Text from D-Bus, which some libraries give as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def credential_names(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The credentials that a unit wants, of all its D-Bus properties."""
    return tuple(
        as_text(item[0])
        for setting in ("LoadCredential", "SetCredential")
        for kind in ("", "Encrypted")
        for item in values.get(setting + kind, ())
    )


def commands(rows: Iterable[Any]) -> tuple[ExecCommand, ...]:
    """The lines of ExecStartEx or ExecReloadEx."""
    return tuple(
        ExecCommand(as_text(path), tuple(map(as_text, words)), tuple(map(as_text, flags)))
        for path, words, flags, *_ in rows
    )
