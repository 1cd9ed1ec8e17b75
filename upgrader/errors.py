# SPDX-License-Identifier: LGPL-2.1-or-later
"""Everything that can go wrong, as one tree of exceptions.

UpgradeError
├── DeclarationError        the program declares something impossible         .item
├── ParameterError          a parameter is unknown, or its value makes no sense   .name .reason
├── BackendError            a kind cannot open or describe a backend          .item
├── BindError               a socket cannot be bound where the program wants it   .item
├── Retired                 this instance no longer owns its backends
├── UnsavableState          a state that cannot be saved as it stands             .item .reason
├── BusyWork                work would be cut in two by a migration           .who
├── QuiesceFailed           what was to be done before a freeze has raised       .name .error
├── RefusedError            something offered by the other side is refused    .item
│   ├── ImageError          the image is damaged or of an unknown format
│   ├── ProtocolError       a record breaks the rules of the stream
│   │   └── ForeignError    it is no channel of ours at all
│   ├── MismatchError       an FD is not what the manifest says               .expected .found
│   ├── IncompatibleState   a state version this program cannot read          .offered .readable_from .own
│   ├── UnreadableState     a state whose fields do not decode
│   └── UnclaimedError      items that this program does not declare          .names
├── PreflightPassed         all was loaded and checked, and goes back to the source
├── VerifyError             the author's own check said no
├── ChannelError            the migration channel cannot be used
│   └── ChannelBusy         another process is reading it
├── NotifyError             PID 1 could not be told
└── BusError                the D-Bus question to PID 1 was not answered
"""

from __future__ import annotations

from collections.abc import Sequence

from upgrader.codes import Code

#: A source and a takeover of version 0.1.0 tell by this text that a preflight has passed.
PASSED = "rehearsed: all was loaded and checked"


class UpgradeError(Exception):
    """Root of the tree: `message` says what is wrong, `remedy` what to do next (may be empty).

    `code` is what it means for an upgrade if a new version meets it.
    """

    code = Code.LOAD_FAILED

    def __init__(self, message: str, *, remedy: str = "", code: Code | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.code = code or self.code

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class DeclarationError(UpgradeError):
    """The program declares `item` in a way that cannot work; raised before anything is touched."""

    def __init__(self, item: str, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{item}: {message}", remedy=remedy)
        self.item = item


class ParameterError(UpgradeError):
    """There is no parameter `name`, or its value makes no sense for the `reason` given."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class BackendError(UpgradeError):
    """The kind of a backend cannot open, describe or adopt it; `item` names the backend."""

    def __init__(self, item: str, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{item}: {message}", remedy=remedy)
        self.item = item


class BindError(UpgradeError):
    """The socket of `item` cannot be bound where the program wants it."""

    def __init__(self, item: str, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{item}: {message}", remedy=remedy)
        self.item = item


class Retired(UpgradeError):
    """This instance has given up its backends; what it holds is read-only from now on."""

    def __init__(self, item: str) -> None:
        super().__init__(f"{item}: this instance has been replaced and no longer owns it")
        self.item = item


class UnsavableState(UpgradeError):
    """The state of `item` cannot be saved as it stands; `reason` begins with the path of the field.

    The fault of the program that runs, never of the version that would load it.
    """

    def __init__(self, item: str, reason: str) -> None:
        super().__init__(
            f"{item} cannot be saved: {reason}",
            remedy="keep what cannot be saved out of the state",
        )
        self.item = item
        self.reason = reason


class BusyWork(UpgradeError):
    """Work is between two safe points: moving now would cut it in two. `who` names it."""

    code = Code.BUSY_WORK

    def __init__(self, who: Sequence[str]) -> None:
        named = ", ".join(who[:5]) + (f" and {len(who) - 5} more" if len(who) > 5 else "")
        super().__init__(
            f"busy all the time that there was: {named}",
            remedy="try again when that is done, or raise drain-timeout and downtime-limit",
        )
        self.who = tuple(who)


class QuiesceFailed(UpgradeError):
    """What an author has declared to be done before a freeze has raised `error`; `name` is the
    function's."""

    code = Code.SOURCE_FAILED

    def __init__(self, name: str, error: BaseException) -> None:
        super().__init__(
            f"quiesce: {name} has raised {type(error).__name__}: {error}",
            remedy="see the journal; nothing was frozen",
        )
        self.name = name
        self.error = error


class RefusedError(UpgradeError):
    """Something offered by the other side was refused; `item` names it, and nothing was consumed."""

    def __init__(self, item: str, message: str, *, remedy: str = "") -> None:
        super().__init__(f"{item}: {message}", remedy=remedy)
        self.item = item


class ImageError(RefusedError):
    """The image is truncated, damaged, unsealed, or of a format this library does not know."""


class ProtocolError(RefusedError):
    """A record breaks the rules of the stream: kind, order, size, count or version."""


class ForeignError(ProtocolError):
    """What was to be read as a channel of upgrader is something else."""


class MismatchError(RefusedError):
    """An FD is not what the manifest says it is."""

    def __init__(self, item: str, expected: object, found: object) -> None:
        super().__init__(item, f"the manifest says {expected}, the FD is {found}")
        self.expected = expected
        self.found = found


class IncompatibleState(RefusedError):
    """A state, or what describes a backend, was saved by a version that this program cannot read."""

    code = Code.STATE_INCOMPATIBLE

    def __init__(
        self, name: str, *, offered: int, readable_from: int, own: int, what: str = "state"
    ) -> None:
        super().__init__(
            f"{what} {name!r}",
            f"saved as version {offered}, readable from version {readable_from} on;"
            f" this program has version {own}",
            remedy="start a version that can read it; the image is kept",
        )
        self.name = name
        self.offered = offered
        self.readable_from = readable_from
        self.own = own


class UnreadableState(RefusedError):
    """The fields of a state do not decode into the class that declares it."""

    code = Code.STATE_UNREADABLE


class UnclaimedError(RefusedError):
    """The image carries items that this program does not declare."""

    code = Code.BACKEND_UNDECLARED

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            ", ".join(names),
            "in the image, but not declared by this program",
            remedy="declare it, or let it go with instance.drop(NAME)",
        )
        self.names = tuple(names)


class PreflightPassed(UpgradeError):
    """A preflight has come as far as it may: this version would take over. No failure."""

    code = Code.PREFLIGHT_PASSED

    def __init__(self) -> None:
        super().__init__(PASSED)


class VerifyError(UpgradeError):
    """The author's own check refused the loaded instance."""

    code = Code.VERIFY_FAILED


class ChannelError(UpgradeError):
    """The migration channel cannot be used."""


class ChannelBusy(ChannelError):
    """Another process is reading the parked channel."""


class NotifyError(UpgradeError):
    """PID 1 could not be told something that must not go untold."""


class BusError(UpgradeError):
    """PID 1 did not answer a question over D-Bus in time."""
