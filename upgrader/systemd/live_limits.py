# SPDX-License-Identifier: LGPL-2.1-or-later
"""Say what forbids a live upgrade of a unit as it is now, and why, from values alone.

Asked twice: by `upgrade` before it asks PID 1 for a reload, and by takeover, which PID 1 has
started with today's settings, before it starts anything.
"""

from __future__ import annotations

import pwd
from enum import StrEnum

from upgrader.protocol.values import Value
from upgrader.systemd.unit import UNSET, UNSET_ID, SocketUnit, Unit, show_socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

RESTART = "restart it instead, which keeps connections and state as well: upgrader restart {unit}"

_RUNNER = ("upgrader.run", "upgrader/run")
#: Users that DynamicUser= makes; https://systemd.io/UIDS-GIDS/
DYNAMIC_USERS = range(61184, 65520)
#: Prefixes of a command line with which it gets other privileges than one without.
_PRIVILEGES = {"privileged", "no-setuid", "ambient"}
_KINDS = {"Stream": "SOCK_STREAM", "Datagram": "SOCK_DGRAM", "SequentialPacket": "SOCK_SEQPACKET"}


class LimitKind(StrEnum):
    """What forbids a live upgrade, as one word for programs."""

    EXEC_RELOAD = "exec-reload"  #: no ExecReload= runs takeover
    RUNTIME_DIRECTORY = "runtime-directory"  #: there is no place for a socket
    NOTIFY_ACCESS = "notify-access"
    KILL_MODE = "kill-mode"
    OOM_POLICY = "oom-policy"
    PRIVATE_PIDS = "private-pids"
    PRIVATE_USERS = "private-users"
    PREFIXES = "prefixes"  #: ExecStart= and ExecReload= run with other privileges
    USER = "user"  #: the unit names another user or group than it runs as
    SOCKET_UNIT = "socket-unit"  #: a `.socket` unit has an address that was not passed
    CREDENTIALS = "credentials"
    MEMORY = "memory"  #: there is no room for two instances
    CGROUP = "cgroup"  #: with Delegate=, it cannot be where the running instance is
    BUS = "bus"  #: takeover could not ask systemd
    INSTANCE = "instance"  #: the running instance does not answer, or does not want to


class Limit(Value):
    """One reason why the unit cannot be upgraded live: its cause, and what to do about it.

    None of them is in the way of restart mode. `setting` is the line for [Service] that would do,
    if one would.
    """

    kind: LimitKind
    cause: str
    remedy: str
    setting: str = ""

    def __str__(self) -> str:
        return f"{self.cause} ({self.remedy})" if self.remedy else self.cause


class Running(Value):
    """What the running instance says of itself (`Describe`) that has a part in this.

    `activated`: the sockets that `.socket` units passed, as `show_socket` writes them, None if it
    does not say; `credentials`: names; `memory`: bytes that are its own; `cache`: bytes of files
    that the kernel keeps for its unit, and gives up if memory is needed.
    """

    activated: tuple[str, ...] | None = None
    credentials: tuple[str, ...] = ()
    memory: int = 0
    cache: int = 0

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Running:
        """From the answer to Describe; what it does not say is not looked at."""
        started = description.get("started", {})
        passed = started.get("activated")
        return cls(
            None if passed is None else tuple(passed),
            tuple(started.get("credentials", ())),
            int(started.get("memory", 0)),
            int(started.get("cache", 0)),
        )


def live_limits(
    unit: Unit, running: Running | None = None, sockets: Sequence[SocketUnit] = ()
) -> tuple[Limit, ...]:
    """All that forbids a live upgrade of `unit`; empty if nothing does.

    `unit` and `sockets` as read after the newest daemon-reload; without `running` only the
    settings are looked at. What is said first is what to mend first.
    """
    limits = _settings(unit)
    if unit.serves:
        limits += _user(unit)
    if running is not None:
        limits += [*_sockets(unit, running, sockets), *_credentials(unit, running)]
        limits += _memory(unit, running)
    return tuple(limits)


def is_runner(unit: Unit) -> bool:
    """Whether the main process of a unit is `python -m upgrader.run`."""
    return bool(runner_arguments(unit))


def runner_arguments(unit: Unit) -> tuple[str, ...]:
    """The arguments of `python -m upgrader.run` in ExecStart=; none if that runs something else."""
    for line in unit.exec_start[-1:]:
        for place, word in enumerate(line.arguments):
            if word == _RUNNER[0] or word.endswith(_RUNNER[1]):
                return line.arguments[place + 1 :]
    return ()


def _settings(unit: Unit) -> list[Limit]:
    """Settings without which live mode cannot work at all."""
    found = []

    def unless(good: bool, kind: LimitKind, cause: str, wanted: str) -> None:
        if not good:
            remedy = f"systemctl edit {unit.id}, and below [Service] write {wanted}"
            found.append(Limit(kind, cause, remedy, wanted))

    takeover = "ExecReload=/usr/bin/python3 -m upgrader.takeover"
    reloads = [line for line in unit.exec_reload if line.runs_takeover]
    unless(
        bool(reloads),
        LimitKind.EXEC_RELOAD,
        "no ExecReload= of the unit runs upgrader.takeover",
        takeover,
    )
    unless(
        bool(unit.runtime_directories),
        LimitKind.RUNTIME_DIRECTORY,
        "the unit has no RuntimeDirectory=, so its instance has no socket",
        f"RuntimeDirectory={unit.id.removesuffix('.service').partition('@')[0]}",
    )
    unless(
        unit.notify_access in ("exec", "all"),
        LimitKind.NOTIFY_ACCESS,
        f"NotifyAccess={unit.notify_access}: what ExecReload= starts could not notify systemd",
        "NotifyAccess=exec",
    )
    if is_runner(unit):
        unless(
            unit.kill_mode == "process",
            LimitKind.KILL_MODE,
            f"KillMode={unit.kill_mode}: systemd would end the program that a runner leaves serving",
            "KillMode=process",
        )
    else:
        unless(
            unit.kill_mode == "control-group",
            LimitKind.KILL_MODE,
            f"KillMode={unit.kill_mode}: systemd would not tell both instances to stop",
            "KillMode=control-group",
        )
    unless(
        unit.oom_policy != "kill",
        LimitKind.OOM_POLICY,
        "OOMPolicy=kill: out of memory, the running instance would be killed with the new one",
        "OOMPolicy=continue",
    )
    if unit.private_pids not in ("", "no"):
        found.append(
            _by_restart(
                unit,
                LimitKind.PRIVATE_PIDS,
                "PrivatePIDs= hides the running instance from its successor",
            )
        )
    if unit.private_users and unit.protect_proc not in ("", "default"):
        # Each of the two instances is in a user namespace of its own, as a stranger to the other.
        hidden = f"PrivateUsers= together with ProtectProc={unit.protect_proc}"
        cause = f"{hidden} hides the two instances from each other"
        found.append(_by_restart(unit, LimitKind.PRIVATE_USERS, cause))
    for reload in reloads:
        start = unit.exec_start[-1].flags if unit.exec_start else ()
        if _PRIVILEGES & set(start) != _PRIVILEGES & set(reload.flags):
            found.append(
                _by_restart(
                    unit,
                    LimitKind.PREFIXES,
                    "ExecStart= and ExecReload= have prefixes of other privileges",
                )
            )
    return found


def _user(unit: Unit) -> list[Limit]:
    """A new user gets the directories of the service before any code of ours runs."""
    started = 0 if unit.uid == UNSET_ID else unit.uid
    if unit.dynamic_user and started in DYNAMIC_USERS:
        return []
    try:
        wanted = _uid(unit.user)
    except KeyError:
        # Nobody knows the name of a dynamic user until the service has started.
        cause = "DynamicUser= has changed" if unit.dynamic_user else f"no user {unit.user!r}"
        return [_by_restart(unit, LimitKind.USER, f"{cause}: it runs as uid {started}")]
    if wanted != started:
        changed = f"User= has changed: it runs as uid {started}, and would as uid {wanted}"
        return [_by_restart(unit, LimitKind.USER, changed)]
    group = 0 if unit.gid == UNSET_ID else unit.gid
    try:
        if (wanted := _gid(unit.group, wanted)) == group:
            return []
    except KeyError:
        return [
            _by_restart(unit, LimitKind.USER, f"no group {unit.group!r}: it runs as gid {group}")
        ]
    changed = f"Group= has changed: it runs as gid {group}, and would as gid {wanted}"
    return [_by_restart(unit, LimitKind.USER, changed)]


def _uid(user: str) -> int:
    """The number of a user; raises KeyError."""
    if not user or user.isdecimal():
        return int(user or 0)
    return pwd.getpwnam(user).pw_uid


def _gid(group: str, uid: int) -> int:
    """The number of a group, or else of the first group of a user; raises KeyError."""
    if group.isdecimal():
        return int(group)
    if group:
        import grp

        return grp.getgrnam(group).gr_gid
    return pwd.getpwuid(uid).pw_gid if uid else 0


def changed_sockets(running: Running, sockets: Sequence[SocketUnit]) -> dict[str, list[str]]:
    """The `.socket` units with addresses that the running instance has not been passed.

    A restart of the service alone does not open them. `systemctl restart X.socket` does, if the
    service requires it and so is restarted with it; connections and state are kept.
    """
    changed: dict[str, list[str]] = {}
    if running.activated is None:
        return changed
    for each in sockets:
        new = [
            address
            for kind, address in each.listens
            if each.active
            and kind in _KINDS
            and show_socket(each.name, _KINDS[kind], address) not in running.activated
        ]
        if new:
            changed[each.id] = new
    return changed


def _sockets(unit: Unit, running: Running, sockets: Sequence[SocketUnit]) -> list[Limit]:
    """What PID 1 would pass to a start, and cannot pass to what ExecReload= starts."""
    return [
        Limit(
            LimitKind.SOCKET_UNIT,
            f"{name} has changed: the running instance has not got {', '.join(addresses)} of it",
            f"with Requires={name} in {unit.id}, restart both, which keeps connections and state as"
            f" well: systemctl restart {name}",
        )
        for name, addresses in changed_sockets(running, sockets).items()
    ]


def _credentials(unit: Unit, running: Running) -> list[Limit]:
    """The new instance gets the credentials of the running one."""
    missing = [name for name in unit.credentials if name not in running.credentials]
    if not missing:
        return []
    return [_by_restart(unit, LimitKind.CREDENTIALS, f"new credentials: {', '.join(missing)}")]


def _memory(unit: Unit, running: Running) -> list[Limit]:
    """Both instances run under the same limits for a while."""
    left = unit.memory_available
    whose = "MemoryMax= of its slice, MemoryHigh= or the machine leaves"
    if UNSET not in (unit.memory_max, unit.memory_current):
        own = unit.memory_max - unit.memory_current
        if own <= left:
            left, whose = own, "MemoryMax= leaves"
    left += running.cache
    if left >= running.memory:
        return []
    return [
        _by_restart(
            unit,
            LimitKind.MEMORY,
            f"{whose} {_mib(left)} MiB, and a second instance needs about"
            f" {_mib(running.memory)} MiB",
        )
    ]


def _mib(size: int) -> int:
    return max(size, 0) >> 20


def _by_restart(unit: Unit, kind: LimitKind, cause: str) -> Limit:
    return Limit(kind, cause, RESTART.format(unit=unit.id))
