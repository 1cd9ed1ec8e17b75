# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read the parameters of a migration, as the unit's environment sets them.

`Environment=UPGRADER_DRAIN_TIMEOUT=30s` in a drop-in is what PID 1 really applied, so that is where
they come from; `upgrader set` changes them while the service runs. `UPGRADER=off` is the kill
switch: a plain service.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from typing import Any, NoReturn, Self

from upgrader.errors import DeclarationError, ParameterError
from upgrader.protocol.rendezvous import BUS, PREFLIGHT, PREFLIGHT_1, RUNNER
from upgrader.protocol.systemd_syntax import LONGEST, boolean, show_span, time_span
from upgrader.protocol.values import Value


def _wait(text: str) -> float:
    return min(time_span(text), LONGEST)


def _bandwidth(text: str) -> int:
    found = re.fullmatch(r"([1-9][0-9]{0,6})([KMG])", text)
    if not found:
        raise ValueError(f"{text!r} is not a number of bytes a second, such as 64M")
    return int(found[1]) << {"K": 10, "M": 20, "G": 30}[found[2]]


def _attempts(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ValueError(f"{text!r} is not a number of attempts from 1 on")
    return int(text)


def _generation(text: str) -> str:
    if text != "all" and not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{text!r} is neither a generation nor 'all'")
    return text


class Mechanism(StrEnum):
    """How FDs cross: on the channel, or in the FD store of the unit, each under its own name."""

    SCM_RIGHTS = "scm-rights"
    FD_STORE = "fd-store"

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ValueError(f"{value!r} is not one of {', '.join(cls)}")


#: Why such an instance is not upgraded live: PID 1 gives the FD store to a start only.
FD_STORE_ONLY = "backend-transfer-mechanism=fd-store works by a restart"


class Mode(StrEnum):
    """How to upgrade: who holds the image on its way from the old instance to the new one."""

    AUTO = "auto"  #: live where the unit allows it, else by a restart
    LIVE = "live"  #: the new instance: both run side by side, and clients see milliseconds
    RESTART = "restart"  #: PID 1: the pause is as long as stop and start
    EXEC = "exec"  #: the process itself, which becomes the new version and keeps its PID

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ValueError(f"{value!r} is not one of {', '.join(cls)}")


class OpenTls(StrEnum):
    """What becomes of open TLS connections in a live upgrade."""

    DRAIN = "drain"
    MOVE = "move"

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ValueError(f"{value!r} is not one of {', '.join(cls)}")


class Transfer(Value):
    """Which connections move: all of them or none, and backends of which none do."""

    all: bool = True
    backends: tuple[tuple[str, bool], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `yes`, `no`, `NAME=no`, or several of them; raises ValueError."""
        every, backends = True, {}
        for word in text.split():
            name, equals, value = word.partition("=")
            if equals and name:
                backends[name] = boolean(value)
            else:
                every = boolean(word)
        return cls(every, tuple(backends.items()))

    def with_backend(self, name: str, text: str) -> Self:
        """With one backend set; raises ValueError."""
        return self.replace(backends=(*dict(self.backends, **{name: boolean(text)}).items(),))

    def __contains__(self, backend: str) -> bool:
        return self.all and dict(self.backends).get(backend, True)

    def __str__(self) -> str:
        own = [f"{name}={_yes_or_no(value)}" for name, value in self.backends]
        return " ".join([_yes_or_no(self.all), *own])


class Parameters(Value):
    """All times are in seconds. `live_drain_timeout`: for what is left to a source that has been
    replaced; `websocket_timeout`, `websocket_spread`: when connections without an end are closed
    there, and over how long; `replay_timeout`: for the handler of one that has moved; `downtime_limit`: seconds that a live migration may wait for safe
    points, and for progress of the destination; `max_bandwidth`: bytes a second of tables that are copied
    before that; `migration_timeout`: seconds for all of it;
    `insurance`: seconds after a live upgrade in which a crash goes back to the switchover;
    `load_attempts`: after so many the image is set aside.

    `load_attempts` lies above StartLimitBurst= (5 by default): one bad version meets systemd's
    start limit first, and the image waits for a good one. `tls`: whether open TLS connections move;
    that is decided when they are opened, so it cannot be set at run time. `discard` sets the image aside at once
    ("all", or a generation).
    """

    enabled: bool = True
    backend_transfer: Transfer = Transfer()
    mechanism: Mechanism = Mechanism.SCM_RIGHTS
    drain_timeout: float = 10.0
    live_drain_timeout: float = 600.0
    websocket_timeout: float = 10.0
    websocket_spread: float = 10.0
    replay_timeout: float = 5.0
    downtime_limit: float = 0.3
    max_bandwidth: int = 64 << 20
    migration_timeout: float = 30.0
    insurance: float = 5.0
    mode: Mode = Mode.AUTO
    load_attempts: int = 10
    tls: OpenTls = OpenTls.DRAIN
    discard: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read UPGRADER and UPGRADER_*; raises DeclarationError that names the variable."""
        values: dict[str, object] = {}
        for variable, (field, parse) in _VARIABLES.items():
            if text := environment.get(variable, ""):
                try:
                    values[field] = parse(text)
                except ValueError as error:
                    raise DeclarationError(variable, str(error)) from error
        return cls(**values)  # type: ignore[arg-type]

    @staticmethod
    def unknown(environment: Mapping[str, str]) -> list[str]:
        """Variables that look like ours and are not: a typing error worth a warning."""
        known = {*_VARIABLES, PREFLIGHT, PREFLIGHT_1, BUS, WEBSOCKETS}
        ours = (v for v in environment if v.startswith("UPGRADER_") and not v.startswith(RUNNER))
        return [v for v in ours if v not in known]

    def updated(self, values: Mapping[str, str], backends: Collection[str]) -> Self:
        """With some set by name; `backends` are those that there are. Raises ParameterError."""
        changed = self
        # What is said of all of them comes before what is said of one.
        for name, text in sorted(values.items()):
            general, _, backend = name.partition(".")
            parameter = SETTABLE.get(general)
            try:
                if parameter is None or (backend and general != TRANSFER):
                    raise ValueError(f"no such parameter; there are {', '.join(SETTABLE)}")
                if backend and backend not in backends:
                    known = ", ".join(sorted(backends)) or "none"
                    raise ValueError(f"no such backend; there are {known}")
                value: Any = (
                    changed.backend_transfer.with_backend(backend, text)
                    if backend
                    else parameter.parse(text)
                )
            except ValueError as error:
                raise ParameterError(name, str(error)) from error
            changed = changed.replace(**{parameter.field: value})
        return changed

    def transfers(self, backend: str) -> bool:
        """Whether connections of a backend may move: on for all of them, and for this one."""
        return backend in self.backend_transfer

    def shown(self) -> dict[str, str]:
        """All that can be set, as it would be written."""
        return {name: _show(getattr(self, each.field)) for name, each in SETTABLE.items()}


class Parameter(Value):
    """One that `upgrader set` knows: the field, how its text is read, and what it means."""

    field: str
    parse: Callable[[str], object]
    text: str


#: An option of `upgrader.asgi`, not a parameter of an instance.
WEBSOCKETS = "UPGRADER_WEBSOCKETS"
TRANSFER = "backend-transfer"
MECHANISM = "backend-transfer-mechanism"
SETTABLE = {
    TRANSFER: Parameter(
        "backend_transfer",
        Transfer.parse,
        "For a local upgrade over a UNIX socket: whether open connections move to the new instance,"
        " with their FDs, and backends that are no sockets (yes or no). For one backend only, write"
        " backend-transfer.NAME=no. It moves if both are on, in both instances; otherwise the old"
        " instance drains a connection, and the new one opens its own of anything else.",
    ),
    MECHANISM: Parameter(
        "mechanism",
        Mechanism,
        "How they move: scm-rights, on the migration channel; or fd-store, each FD under its own name"
        " in the FD store of the unit. fd-store is for few FDs, needs a restart, and lets programs"
        " that know only LISTEN_FDS take the listeners over (with backend-transfer=no).",
    ),
    "downtime-limit": Parameter(
        "downtime_limit",
        _wait,
        "How long new work may be held in a live upgrade until all is at a safe point, and then how"
        " long for each item that the new instance loads.",
    ),
    "max-bandwidth": Parameter(
        "max_bandwidth",
        _bandwidth,
        "How many bytes of tables a second are copied to the new instance while the old one serves, such as"
        " 64M (K, M or G, in powers of 1024).",
    ),
    "drain-timeout": Parameter(
        "drain_timeout",
        _wait,
        "How long all are served while work that has begun comes to an end, before anything is held.",
    ),
    "live-drain-timeout": Parameter(
        "live_drain_timeout",
        _wait,
        "How long after a live upgrade the old instance may go on with connections that did not move:"
        " downloads, event streams. Nobody waits for it. What is open then is cut.",
    ),
    "websocket-timeout": Parameter(
        "websocket_timeout",
        _wait,
        "How long after a live upgrade the old instance goes on with WebSockets, before it closes them"
        " with 1012 (service restart); 0 closes them as soon as the new instance serves.",
    ),
    "websocket-spread": Parameter(
        "websocket_spread",
        _wait,
        "Over how long those closes are spread, so that not all clients dial again at once.",
    ),
    "replay-timeout": Parameter(
        "replay_timeout",
        _wait,
        "How long after an upgrade the handler of a WebSocket that has moved may take to wait for its"
        " client again. All clients wait for that; then it is closed with 1012.",
    ),
    "migration-timeout": Parameter(
        "migration_timeout", _wait, "How long one migration may take as a whole."
    ),
    "insurance": Parameter(
        "insurance",
        _wait,
        "How long after a live upgrade a crash of the new instance is followed by a start with the"
        " listeners and the state of the switchover.",
    ),
    "mode": Parameter(
        "mode",
        Mode,
        "How to upgrade if the command does not say: live, restart, exec, or auto (live if the unit"
        " allows it, else restart).",
    ),
}


def _show(value: object) -> str:
    if type(value) is int:
        return _show_bandwidth(value)
    if isinstance(value, float):
        return show_span(value)
    return str(value)


def _show_bandwidth(value: int) -> str:
    power = next(power for power in (30, 20, 10) if value % (1 << power) == 0)
    return f"{value >> power}{'KMG'[power // 10 - 1]}"


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


_VARIABLES: dict[str, tuple[str, Callable[[str], object]]] = {
    "UPGRADER": ("enabled", boolean),
    **{
        f"UPGRADER_{name.upper().replace('-', '_')}": (each.field, each.parse)
        for name, each in SETTABLE.items()
    },
    "UPGRADER_LOAD_ATTEMPTS": ("load_attempts", _attempts),
    "UPGRADER_TLS": ("tls", OpenTls),
    "UPGRADER_DISCARD": ("discard", _generation),
}
