# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a destination says that it can take, before anything is disturbed: whether that is enough."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec

from upgrader.codes import Code
from upgrader.errors import IncompatibleState
from upgrader.instance.declarations import Declarations
from upgrader.instance.save import Readers
from upgrader.protocol import image, records
from upgrader.protocol.kinds import Kind
from upgrader.protocol.state import check_readable
from upgrader.protocol.varlink import VarlinkError, invalid, refused


@dataclass(frozen=True, slots=True)
class Offer:
    """`readers`: the states that it can read; `takes_passed`: it takes what PID 1 would pass to a start
    besides; `withheld`: backends that it does not take; `stream`: the newest version of the stream that
    both sides speak."""

    readers: Readers = field(default_factory=Readers)
    takes_passed: bool = False
    withheld: frozenset[str] = frozenset()
    stream: int = records.VERSIONS[0]

    @classmethod
    def read(cls, parameters: Mapping[str, Any], here: Declarations) -> Self:
        """That of a destination, for an instance that has declared what is `here`. Raises VarlinkError
        if it is none, or not enough."""
        stream = common_stream(parameters)
        offered = parameters.get("image")
        if offered != image.FORMAT:
            raise refused(f"image version {offered}, the running one has {image.FORMAT}")
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
        return cls(readers, takes_passed, frozenset(str(name) for name in withheld), stream)


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
