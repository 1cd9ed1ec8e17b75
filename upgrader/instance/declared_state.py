# SPDX-License-Identifier: LGPL-2.1-or-later
"""A state that a program declares: its class, and the live object once this instance is loaded."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Generic, TypeVar

from upgrader.errors import DeclarationError, UnsavableState
from upgrader.protocol.later import later
from upgrader.protocol.state import describe, retire

if TYPE_CHECKING:
    from upgrader.protocol import state_codec, state_reread, state_trial, table, varlink_types
    from upgrader.protocol.saved_state import SavedState
    from upgrader.protocol.varlink_types import Trial
else:
    state_codec = later("upgrader.protocol.state_codec")
    state_reread = later("upgrader.protocol.state_reread")
    state_trial = later("upgrader.protocol.state_trial")
    table = later("upgrader.protocol.table")
    varlink_types = later("upgrader.protocol.varlink_types")

T = TypeVar("T")

#: Bytes of a state up to which it is loaded again, and its converters are tried: they copy all of it.
_CONVERTED = 1 << 20
#: Bytes of a state up to which it is compared, at the end, with what was given away: clients may wait.
_COMPARED = 4 << 20


class DeclaredState(Generic[T]):
    """A declared state; `value` is the live object, once this instance is loaded."""

    def __init__(self, cls: type[T]) -> None:
        self.cls = cls
        self.description = describe(cls)
        try:
            self._tables = self.description.tables
        except NameError as error:
            raise unreadable_annotation(self.description.item, error) from error
        self.trial: Trial | None = None  #: the last one
        self._value: T | None = None
        self._given: bytes | None = None  # what another instance has got

    @property
    def value(self) -> T:
        """The live state; raises DeclarationError before `serve` has loaded it."""
        if self._value is None:
            raise DeclarationError(self.description.item, "is not loaded before serve() has begun")
        return self._value

    @property
    def filled(self) -> bool:
        """Whether the live object is there."""
        return self._value is not None

    def fill(self, value: T | None) -> None:
        """Set the live object; None makes the one of a cold start."""
        if value is None:
            try:
                value = self.cls()
            except TypeError as error:
                why = f"every field needs a default: {error}"
                raise DeclarationError(self.description.item, why) from error
        if self._tables:
            table.make(value, self._tables)
        self._value = value

    def try_saving(self) -> Trial:
        """Find out whether the live state can be saved as it is now, from any thread."""
        d = self.description
        problem, measured, found = "", state_trial.Measured(0, 0.0), state_reread.Reread()
        try:
            measured = state_trial.measure(self.value)
            if measured.bytes <= _CONVERTED:
                found = state_reread.reread(self.value, d)
                if d.backward:
                    state_codec.convert_for(self.cls, state_codec.save(self.value), None)
        except UnsavableState as error:
            problem = error.reason
        except Exception:
            problem = state_trial.blame(self.value)  # nothing, if it has changed in the meantime
        self.trial = varlink_types.Trial(
            d.name, d.version, measured.bytes, round(measured.seconds, 6), round(time.time(), 3),
            problem, found.refusal, list(found.altered),
        )  # fmt: skip
        return self.trial

    def retire(self, given: SavedState | None = None) -> None:
        """Make the live object read-only: another instance owns it, as it was `given` away."""
        same = given and given.version == self.description.version and not given.tables
        if given and same and len(given.data) <= _COMPARED:
            self._given = given.data
        if self._value is not None:
            retire(self._value)

    @property
    def was_written(self) -> bool:
        """Whether it is another one than was given away, if that is known: a dict or a list in it can
        be written to although the state is read-only, and what was written is lost."""
        if self._given is None:
            return False
        try:
            return state_codec.save(self.value).data != self._given
        except (UnsavableState, RuntimeError):  # it could be saved then
            return True


def unreadable_annotation(item: str, error: NameError) -> DeclarationError:
    """The error for an annotation with a name that is not to be found."""
    return DeclarationError(
        item,
        f"annotation cannot be read: {error}",
        remedy="define what it names at the top level of the module, and import it there",
    )
