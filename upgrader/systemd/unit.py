# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service unit is: the values that PID 1 gives it."""

from __future__ import annotations

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
    def may_serve_soon(self) -> bool:
        """PID 1 starts it, or will by itself."""
        return self.retries or self.active_state == "activating"

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
