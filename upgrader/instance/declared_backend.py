# SPDX-License-Identifier: LGPL-2.1-or-later
"""One declared backend that is no socket: what its kind does for it, with errors that name it."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from upgrader.backends.kind import BackendKind
from upgrader.errors import (
    BackendError,
    ImageError,
    MismatchError,
    UpgradeError,
)
from upgrader.protocol.fd import Fd
from upgrader.protocol.later import later
from upgrader.protocol.state import check_readable
from upgrader.systemd.fdstore import StoreName

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import msgspec

    from upgrader.instance import children
    from upgrader.protocol import identity, image
else:
    children = later("upgrader.instance.children")
    msgspec = later("msgspec")
    identity = later("upgrader.protocol.identity")
    image = later("upgrader.protocol.image")

_log = logging.getLogger("upgrader")


class DeclaredBackend:
    """A backend by its name, as the program has declared it: `kind` is an object of its kind."""

    def __init__(self, name: str, kind: BackendKind) -> None:
        self.name = name
        self.kind = kind
        self.item = f"{kind.kind} {name!r}"
        self.verified: list[str] = []  #: the facts that were compared with what the source said
        self.opened = False  #: anew, by this instance
        self._said: Sequence[Mapping[str, Any]] = ()  # by the source, of each FD
        kind._item = self.item

    @property
    def fds(self) -> Sequence[Fd]:
        """All live FDs; none before it is open."""
        return self.kind._fds

    def stored_name(self, number: int) -> StoreName:
        """The name of one of its FDs in the FD store."""
        return StoreName.of_kind(self.kind.kind, self.name, number)

    @property
    def stored_names(self) -> list[StoreName]:
        """The names of all that PID 1 keeps of it."""
        count = len(self.fds) if self.kind.persistent else 0
        return [self.stored_name(number) for number in range(count)]

    # Of a program that begins

    def open(self) -> list[Fd]:
        """Open it anew; raises BackendError, and nothing is left open."""
        with self._named("cannot be opened"):
            fds = [Fd(number) for number in self.kind.open_all()]
            self.opened = True
            try:
                self.require(fds)
            except UpgradeError:
                for fd in fds:
                    fd.close()
                raise
            return fds

    def require(self, fds: Sequence[Fd]) -> None:
        """Raise BackendError unless these can be what the program has declared."""
        with self._named("cannot be looked at"):
            why = next((why for fd in fds if (why := self.kind.refuse(fd.fileno()))), "")
            if not why and len(fds) != self.kind.count:
                why = f"it has {len(fds)} FDs, and {self.kind.count} are declared"
        if why:
            remedy = f"declare it as it is, or let it go with instance.drop({self.name!r})"
            raise BackendError(self.item, why, remedy=remedy)

    def foreign(self, fd: Fd) -> str:
        """Why an FD is not even of this kind, or nothing: it may still be another one than declared."""
        with contextlib.suppress(UpgradeError), self._named("cannot be looked at"):
            if not self.kind.stale(fd.fileno()) and (why := self.kind.refuse(fd.fileno())):
                try:
                    self.kind.describe(fd.fileno())
                except Exception:
                    return why
        return ""

    def stale(self, fds: Sequence[Fd]) -> str:
        """Why these are of no use any more, or nothing; raises BackendError."""
        with self._named("cannot be looked at"):
            return next((why for fd in fds if (why := self.kind.stale(fd.fileno()))), "")

    def use(self, fds: Sequence[Fd]) -> None:
        """From here on these are live."""
        self.kind._fds = tuple(fds)

    def verify(
        self,
        entries: Sequence[image.ManifestEntry],
        fds: Sequence[Fd],
        described: image.BackendFacts,
    ) -> None:
        """Raise a RefusedError unless these FDs are the ones that the source has described, and fit
        what is declared here; nothing about them changes."""
        if len(described.facts) != len(entries):
            count = len(described.facts)
            raise ImageError(self.item, f"{count} of {len(entries)} FDs are described")
        check_readable(
            self.name, described.version, described.readable_from, own=self.kind.version,
            what=self.kind.kind,
        )  # fmt: skip
        said = [self._decode(data) for data in described.facts]
        for entry, fd, facts in zip(entries, fds, said, strict=True):
            found = identity.identify(fd)
            if (found.inode, found.file_type) != (entry.identity.inode, entry.identity.file_type):
                raise MismatchError(self.item, entry.identity, found)
            with self._named("cannot be verified"):
                self.kind.verify(fd.fileno(), facts)
        self.require(fds)
        self._said = said

    def adopt(self) -> None:
        """Take what the source has said, once it is verified."""
        with self._named("cannot take what has moved"):
            for facts in self._said:
                self.kind.adopt(facts)
        said = self._said
        self.verified = sorted({name for each in said for name in each} - self.kind.changing)

    def guard(self) -> None:
        """This instance owns it now: set what the source has said again."""
        self._guard(self._said)

    def _decode(self, data: bytes) -> Mapping[str, Any]:
        try:
            facts: Mapping[str, Any] = msgspec.msgpack.decode(data, type=self.kind.facts)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ImageError(self.item, f"its facts do not decode: {error}") from error
        return facts

    # Of a program that gives it away

    def describe(self) -> image.BackendFacts:
        """What the next instance must know of it; raises BackendError."""
        with self._named("cannot be described"):
            said = [dict(self.kind.describe(fd.fileno())) for fd in self.fds]
            facts = [msgspec.msgpack.encode(each) for each in said]
        for each, data in zip(said, facts, strict=True):
            if self._decode(data) != each:
                raise BackendError(self.item, f"facts are no plain values: {each}")
        return image.BackendFacts(self.kind.version, self.kind.readable_from, facts)

    @property
    def guarded(self) -> bool:
        """Whether its kind has something to set again."""
        return type(self.kind).guard is not BackendKind.guard

    def serve_on(self, described: image.BackendFacts) -> bool:
        """It was not given away after all: set again what the other process may have changed. False, and
        said so, if that cannot be done."""
        try:
            return self._guard([self._decode(data) for data in described.facts])
        except UpgradeError:
            return False

    def retire(self) -> None:
        """Another instance owns it: the program gets no number of it any more."""
        self.kind._moved = True

    @property
    def moved(self) -> bool:
        """Whether another instance owns it."""
        return self.kind._moved

    def undo(self) -> None:
        """This instance does not take over: take back what opening it has begun."""
        if self.opened:
            with contextlib.suppress(UpgradeError), self._named("cannot be undone"):
                self.kind.undo()

    def processes(self) -> list[Fd]:
        """Duplicates of those of its FDs that are pidfds."""
        return [fd.duplicate() for fd in self.fds if children.is_pidfd(fd)]

    def close(self) -> None:
        """Close its FDs here."""
        for fd in self.fds:
            fd.close()

    # What it says of itself

    def size(self) -> int:
        """How many bytes are behind its FDs; 0 if it is closed."""
        with contextlib.suppress(OSError, UpgradeError), self._named("has no size"):
            return sum(self.kind.size(fd.fileno()) for fd in self.fds)
        return 0

    def show(self) -> str:
        """What it is, for people; nothing if it is closed."""
        with contextlib.suppress(OSError, UpgradeError), self._named("cannot be described"):
            return self.kind.show(self.fds[0].fileno()) if self.fds else ""
        return ""

    def _guard(self, said: Sequence[Mapping[str, Any]]) -> bool:
        for fd, facts in zip(self.fds, said, strict=False):
            try:
                self.kind.guard(fd.fileno(), facts)
            except Exception:
                _log.exception("%s cannot be set as it was", self.item)
                return False
        return True

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Whatever a kind raises is told with the name of the backend."""
        try:
            yield
        except UpgradeError:
            raise
        except Exception as error:
            raise BackendError(self.item, f"{what}: {type(error).__name__}: {error}") from error
