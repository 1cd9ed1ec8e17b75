# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a destination says that it can take, before anything is disturbed: whether that is enough."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import msgspec

from upgrader.codes import Code
from upgrader.errors import IncompatibleState
from upgrader.instance.declarations import Declarations
from upgrader.instance.declared_backend import DeclaredBackend
from upgrader.instance.save import Readers
from upgrader.protocol import image, records
from upgrader.protocol.kinds import Kind
from upgrader.protocol.state import check_readable
from upgrader.protocol.state_shape import name_some
from upgrader.protocol.varlink import VarlinkError, invalid, refused


@dataclass(frozen=True, slots=True)
class Offer:
    """`made`: there is a destination; `readers`: the states that it can read; `takes_passed`: it takes what PID 1 would pass to a start
    besides; `withheld`: backends that it does not take; `stream`: the newest version of the stream that
    both sides speak; `tls`: the listeners whose TLS connections it takes, and what decides there which
    certificates of clients are trusted; `speak_tls`: those where a library speaks TLS, and nothing else;
    `tables`: for each table that it takes in rounds, as
    "STATE.FIELD", the oldest version of the state of which it does."""

    readers: Readers = field(default_factory=Readers)
    takes_passed: bool = False
    withheld: frozenset[str] = frozenset()
    stream: int = records.VERSIONS[0]
    tls: Mapping[str, str] = field(default_factory=dict)
    speak_tls: frozenset[str] = frozenset()
    tables: Mapping[str, int] = field(default_factory=dict)
    made: bool = False

    @classmethod
    def read(
        cls,
        parameters: Mapping[str, Any],
        here: Declarations,
        transfers: Callable[[str], bool] = lambda name: True,
    ) -> Self:
        """That of a destination, for an instance that has declared what is `here`; `transfers`: whether
        it gives a backend away. Raises VarlinkError if it is none, or not enough."""
        stream = common_stream(parameters)
        kinds = parameters.get("kinds") or []  # version 0.1.0 does not say
        if not isinstance(kinds, list):
            raise invalid("kinds")
        takes_passed = Kind.PASSED in kinds
        states, backends = parameters.get("states"), parameters.get("backends")
        if not isinstance(states, dict) or not isinstance(backends, list):
            raise refused("states and backends are missing")
        sessions = parameters.get("sessions") or {}  # version 0.1.0 does not say
        readers = Readers(_versions("states", states), _versions("sessions", sessions))
        for name, declared in here.states.items():
            mine = declared.description
            theirs = readers.states.get(name)
            if theirs is None and name not in backends:
                raise _undeclared(mine.item)
            if theirs is not None:
                try:
                    check_readable(name, mine.version, mine.readable_from, own=theirs)
                except IncompatibleState as error:
                    raise refused(error.message, error.code) from error
        for name, bound in here.sockets.items():
            if name not in backends:
                raise _undeclared(f"{bound.kind} {name!r}")
            if len(bound.sockets) > 1 and not takes_passed:
                raise refused(
                    f"{bound.kind} {name!r} has {len(bound.sockets)} sockets, and the library of the"
                    " new version takes only one",
                    Code.LIMIT,
                )
        withheld = parameters.get("withheld") or []
        if not isinstance(withheld, list):
            raise invalid("withheld")
        moving = {
            name: backend
            for name, backend in here.backends.items()
            if transfers(name) and name not in withheld
        }
        formats = _check_format(parameters, moving)
        readers = replace(readers, crowds=image.CROWDS in formats)
        _check_kinds(parameters, moving, backends)
        try:
            tls = msgspec.convert(parameters.get("tls") or {}, dict[str, str])
        except msgspec.ValidationError as error:
            raise invalid("tls") from error
        try:
            speak = msgspec.convert(parameters.get("speak_tls") or [], frozenset[str])
        except msgspec.ValidationError as error:
            raise invalid("speak_tls") from error
        taken = frozenset(str(name) for name in withheld)
        tables = _versions("tables", parameters.get("tables") or {})
        if stream < records.TABLES:
            tables = {}
        return cls(readers, takes_passed, taken, stream, tls, speak, tables, made=True)

    def reader(self, listener: str) -> int | None:
        """The version of what goes with connections of a listener that it can read, 0 if it does not
        say; None if there is no destination yet."""
        return self.readers.sessions.get(listener, 0) if self.made else None


def _check_format(
    parameters: Mapping[str, Any], moving: Mapping[str, DeclaredBackend]
) -> list[object]:
    """The formats that a destination reads; raises VarlinkError unless that of the image which these
    backends need is among them."""
    offered = parameters.get("images") or [parameters.get("image")]  # version 0.1.0 says only one
    if not isinstance(offered, list):
        raise invalid("images")
    wanted = image.FORMATS[1 if moving else 0]
    if wanted not in offered:
        what = name_some([each.item for each in moving.values()]) or "the image"
        raise refused(
            f"{what}: the library of the new version reads image format {offered}, and this needs"
            f" format {wanted}", Code.LIMIT,
        )  # fmt: skip
    return offered


def _check_kinds(
    parameters: Mapping[str, Any],
    moving: Mapping[str, DeclaredBackend],
    backends: Container[str],
) -> None:
    """Raise VarlinkError unless a destination declares these backends, or lets them go."""
    try:
        kinds = msgspec.convert(parameters.get("backend_kinds") or {}, dict[str, str])
    except msgspec.ValidationError as error:
        raise invalid("backend_kinds") from error
    versions = _versions("kind_versions", parameters.get("kind_versions") or {})
    for name, backend in moving.items():
        kind, theirs = backend.kind, kinds.get(name)
        if name not in backends:
            raise _undeclared(backend.item)
        if theirs is None:  # it is dropped
            continue
        if theirs != kind.kind:
            why = f"{backend.item} is declared as {theirs} by the new version"
            raise refused(why, Code.BACKEND_UNDECLARED)
        try:
            check_readable(
                name, kind.version, kind.readable_from, own=versions.get(theirs, 1), what=theirs
            )
        except IncompatibleState as error:
            raise refused(error.message, error.code) from error


def common_stream(parameters: Mapping[str, Any]) -> int:
    """The newest version of the stream that both sides speak; raises VarlinkError for none."""
    offered = parameters.get("streams") or [parameters.get("stream")]
    if not isinstance(offered, list):
        raise invalid("streams")
    common = [version for version in records.VERSIONS if version in offered]
    if not common:
        raise refused(f"stream version {offered}, the running one has {list(records.VERSIONS)}")
    return common[-1]


def _versions(name: str, said: object) -> dict[str, int]:
    """Versions of states, as a destination says them; raises VarlinkError for anything else."""
    try:
        return msgspec.convert(said, dict[str, int])
    except msgspec.ValidationError as error:
        raise invalid(name) from error


def _undeclared(what: str) -> VarlinkError:
    return refused(f"{what} is not declared by the new version", Code.BACKEND_UNDECLARED)
