# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a kind of backend is: how one is opened, described, and recognised by another process.

The number of an FD says nothing, and dev and inode say nothing for anonymous inodes: all eventfds of
a machine have the same. So each kind knows by which facts its FDs are told apart.
"""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from upgrader.errors import DeclarationError, MismatchError, Retired
from upgrader.protocol.kinds import KIND_NAME, Kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from upgrader.protocol.fd import Fd

_TAKEN = {*Kind, "kept"}  # words of the library's own in a manifest and in the FD store
_OURS = __name__.rpartition(".")[0]

_KINDS: dict[str, type[BackendKind]] = {}


class BackendKind(ABC):
    """A kind of backend, as a class; an object of it is one backend as a program declares it, for
    `instance.backend(NAME, object)`. Defining a class with `name=` registers the kind:

        class Counter(BackendKind, name="acme.counter"): ...

    Functions here get the number of an FD, and never change its flags: those belong to every process
    that holds it. An OSError or any other exception of theirs refuses the upgrade, and says so.
    """

    kind: ClassVar[str] = ""  #: the registered name
    version: ClassVar[int] = 1  #: of what `describe` gives
    readable_from: ClassVar[int] = 1  #: the oldest version of the kind that can read that
    #: Facts that others may change at any time: they move, and nobody compares them.
    changing: ClassVar[frozenset[str]] = frozenset()
    #: What the facts decode as: a TypedDict, if they shall be checked.
    facts: ClassVar[Any] = dict
    #: PID 1 keeps the FDs from the start on, so that they are there after a crash as well.
    persistent: ClassVar[bool] = True
    #: What was described may be used again for an instance that comes after a crash of the new one.
    replayable: ClassVar[bool] = True

    _item = ""  # set when it is declared
    _fds: Sequence[Fd] = ()
    _moved = False

    def __init_subclass__(cls, *, name: str = "", **rest: Any) -> None:
        """Register a kind; raises DeclarationError for a bad name, or one that there is already."""
        super().__init_subclass__(**rest)
        if not name:  # what several kinds have in common
            return
        ours = cls.__module__.startswith(_OURS + ".")
        if not re.fullmatch(KIND_NAME, name) or name in _TAKEN or ours == ("." in name):
            raise DeclarationError(
                f"kind {name!r}",
                "a kind has a name of small letters, digits and dashes",
                remedy='with a dot after that of its maker: "acme.counter"',
            )
        if name in _KINDS:
            raise DeclarationError(
                f"kind {name!r}", f"is defined twice, in {_KINDS[name].__module__}"
            )
        cls.kind = name
        _KINDS[name] = cls

    # What a kind says

    @abstractmethod
    def open(self) -> int:
        """Open one: on a cold start, and where none has moved here. The FD is the library's then."""

    @abstractmethod
    def describe(self, fd: int) -> Mapping[str, Any]:
        """Give the facts by which this FD is told from any other one, and what must move with it:
        names with plain values, as msgpack has them. Nobody serves while this is asked for."""

    @property
    def count(self) -> int:
        """How many FDs one has; what moves or was kept has as many, or is refused."""
        return 1

    def open_all(self) -> Sequence[int]:
        """Open all FDs, of a backend that has several."""
        return [self.open()]

    def refuse(self, fd: int) -> str:
        """Say why an FD cannot be this backend as it is declared here, or nothing. Asked about whatever it
        may become: what PID 1 has kept over a crash, nobody has described."""
        return ""

    def stale(self, fd: int) -> str:
        """Say why an FD is of no use any more, so that one is opened anew, or nothing: its device was
        removed, perhaps. Asked about what has moved or was kept."""
        return ""

    def undo(self) -> None:  # noqa: B027 (most kinds need none)
        """Take back what `open` has begun besides: this instance does not take over, or ends at a desk."""

    def verify(self, fd: int, said: Mapping[str, Any]) -> None:
        """Raise MismatchError unless an FD is what the instance before has described."""
        found = self.describe(fd)
        wrong = [
            name
            for name in said
            if name in found and name not in self.changing and said[name] != found[name]
        ]
        if wrong:
            raise MismatchError(self._item, _show(said, wrong), _show(found, wrong))

    def adopt(self, said: Mapping[str, Any]) -> None:  # noqa: B027 (likewise)
        """Take what has moved besides the FD into this object; once all is verified."""

    def guard(self, fd: int, said: Mapping[str, Any]) -> None:  # noqa: B027 (likewise)
        """Set again what another process may have changed while both held an FD: called for the
        source if it serves on, and for the destination once it owns everything."""

    def size(self, fd: int) -> int:
        """Count the bytes behind an FD, 0 where that makes no sense."""
        found = os.fstat(fd)
        return found.st_size if stat.S_ISREG(found.st_mode) else 0

    def show(self, fd: int) -> str:
        """Say what it is, in a few words for people; here, the facts that are compared."""
        facts = {n: v for n, v in self.describe(fd).items() if n not in self.changing}
        return _show(facts, list(facts))

    # What a program asks

    @property
    def fds(self) -> tuple[int, ...]:
        """The numbers of all live FDs; raises as `fileno`."""
        if self._moved:
            raise Retired(self._item)
        if not self._fds:
            item = self._item or type(self).__name__
            raise DeclarationError(item, "is not open before serve() has begun")
        return tuple(fd.fileno() for fd in self._fds)

    def fileno(self) -> int:
        """The number of the live FD, of the first one if there are several. Raises DeclarationError
        before `serve` has loaded it, Retired once another instance has it."""
        return self.fds[0]


def _show(facts: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name}={facts[name]!r}" for name in names)
