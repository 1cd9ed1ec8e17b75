# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies the tables of a source in rounds, while it serves: all of them, then what has changed since.

Nothing here waits or sends. `work` takes about half a millisecond, so that handlers hardly notice it;
what is left at the freeze are the last pieces.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import msgspec

from upgrader.errors import UnsavableState
from upgrader.instance.declarations import Declarations
from upgrader.instance.declared_state import DeclaredState
from upgrader.instance.offer import Offer
from upgrader.protocol import state_trial, table
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.state_codec import save
from upgrader.protocol.table_pieces import MOST, SIZE, Head, Piece, Writing

#: Bytes of a state up to which it is not worth a round: it is encoded within a millisecond.
_SMALL = 1 << 18
#: Seconds that one call of `work` may take, and most keys in one.
_SLICE, _MOST_KEYS = 0.0005, 4096
#: Pieces that are kept for the freeze.
_RESERVED = 50

#: Keys in one frame of the last pieces.
_AT_ONCE = 256

_GONE = object()


class _Copied:
    """A table that is copied. `due`: how many keys are still to come in this round."""

    def __init__(self, declared: DeclaredState[Any], field: str) -> None:
        self.field = field
        self.checksums: list[int] = []
        self.changed: set[Any] = set()
        self.due = 0
        self.writing: Writing | None = None
        self._value = declared.value
        self.table: table.Table[Any, Any] = getattr(self._value, field)
        d = declared.description
        self.item = d.item
        self.head = Head(d.name, field, d.version, d.shape.mark)
        self._rest: Iterator[Any] = iter(())  # the keys of the first round

    @property
    def in_place(self) -> bool:
        """Whether the state still has this very table."""
        return getattr(self._value, self.field) is self.table

    def begin(self) -> None:
        """Record what changes from here on; all keys are due."""
        table.record(self.table, self.changed)
        keys = list(self.table)
        self._rest, self.due = iter(keys), len(keys)

    def next(self, most: int) -> list[Any]:
        """The next keys that are due."""
        count = min(most, self.due)
        self.due -= count
        keys = list(islice(self._rest, count))
        while len(keys) < count and self.changed:
            keys.append(self.changed.pop())
        return keys

    def all(self) -> list[Any]:
        """All that is left."""
        keys = [*self._rest, *self.changed]
        self.changed.clear()
        self.due = 0
        return keys

    def copy(self, keys: Sequence[Any]) -> int:
        """Write these keys as they are now; returns how many bytes that is."""
        self.writing = self.writing or Writing(self.head)
        values, gone, get = {}, [], self.table.get
        for key in keys:
            value = get(key, _GONE)
            if value is _GONE:
                gone.append(key)
            else:
                values[key] = value
        try:
            return self.writing.add(values, gone)
        except OSError:
            raise
        except Exception as error:  # what msgspec raises, and the author's own classes
            raise UnsavableState(self.item, state_trial.blame(values) or str(error)) from error

    def seal(self) -> Piece:
        """The piece that is whole now."""
        assert self.writing
        piece, self.writing = self.writing.seal(), None
        self.checksums.append(piece.checksum)
        return piece


class Rounds:
    """The rounds of one migration. `clock`: seconds of this thread on a CPU: on a busy machine nothing
    here takes longer."""

    def __init__(
        self, copied: Sequence[_Copied], clock: Callable[[], float] = time.thread_time
    ) -> None:
        self.round = 0  #: the one under way, from 1 on
        self.bytes = 0  #: of all that was copied
        self.pieces: list[Piece] = []  #: all of them, in their order
        self._copied = copied
        self._clock = clock
        self._keys = 0  # that were copied
        self.seconds = 0.0  #: that it has taken
        self._batch = 16  # keys

    @classmethod
    def of(cls, declarations: Declarations, offer: Offer) -> Rounds | None:
        """Those of the tables that a destination takes in rounds, if that is worth it."""
        copied: list[_Copied] = []
        for name, declared in declarations.states.items():
            small = declared.trial is not None and declared.trial.bytes <= _SMALL
            d, reader = declared.description, offer.readers.states.get(name, 0)
            if not d.tables or small or any(version >= reader for version in d.backward):
                continue
            for field, found in table.tables_of(declared.value, d.tables).items():
                oldest = offer.tables.get(f"{name}.{field}")
                # One that is in two fields records what changes for one of them.
                twice = any(each.table is found for each in copied)
                if oldest is not None and oldest <= d.version and not twice:
                    copied.append(_Copied(declared, field))
        return cls(copied) if copied else None

    def begin(self) -> None:
        """Record what changes from here on; all that there is belongs to the first round."""
        for each in self._copied:
            each.begin()
        self.round = 1

    def end(self) -> None:
        """Record nothing any more, and forget what was copied."""
        for each in self._copied:
            table.forget(each.table)
            each.writing = None
        self.close()

    def close(self) -> None:
        """Forget what was copied."""
        for piece in self.pieces:
            piece.memfd.close()

    @property
    def at_end(self) -> bool:
        """Whether the round under way has come to its end."""
        return not any(each.due or each.writing for each in self._copied)

    @property
    def left(self) -> int:
        """About how many bytes have changed, or are still to come."""
        keys = sum(each.due if self.round == 1 else 0 for each in self._copied)
        keys += sum(len(each.changed) for each in self._copied)
        return keys * self.bytes // max(self._keys, 1)

    @property
    def seconds_left(self) -> float:
        """About how long it would take to copy those."""
        return self.left * self.seconds / max(self.bytes, 1)

    @property
    def full(self) -> bool:
        """Whether there may be no more pieces before the freeze."""
        return len(self.pieces) >= MOST - _RESERVED

    def again(self) -> None:
        """Begin the next round, of what has changed by now."""
        self.round += 1
        for each in self._copied:
            each.due = len(each.changed)

    def work(self) -> Piece | None:
        """Copy some more of the round under way; returns a piece once one is whole. Raises
        UnsavableState or OSError."""
        now = next((each for each in self._copied if each.due or each.writing), None)
        if now is None:
            return None
        began = self._clock()
        self._copy(now, now.next(self._batch))
        took = self._clock() - began
        self.seconds += took
        if took > _SLICE:
            self._batch = max(self._batch // 2, 1)
        elif took < _SLICE / 2:
            self._batch = min(self._batch * 2, _MOST_KEYS)
        assert now.writing
        return self._seal(now) if not now.due or now.writing.bytes >= SIZE else None

    def finish(self) -> list[Piece]:
        """At the freeze: copy all that is left at once; returns the pieces of that, which are small, as the
        destination has `downtime-limit` for each. Raises as `work`."""
        made: list[Piece] = []
        size = max(SIZE // 8, self.left // (_RESERVED // 2))
        for each in self._copied:
            keys = each.all()
            for first in range(0, len(keys), _AT_ONCE):
                self._copy(each, keys[first : first + _AT_ONCE])
                if each.writing and each.writing.bytes >= size:
                    made.append(self._seal(each))
            if each.writing:
                made.append(self._seal(each))
        return made

    def save(self, name: str, declared: DeclaredState[Any]) -> SavedState | None:
        """A state without the tables that were copied; None if there are none in it."""
        tables = {
            each.field: each.checksums
            for each in self._copied
            if each.head.state == name and each.in_place and each.checksums
        }
        if not tables:
            return None
        lean = copy.copy(declared.value)
        for field in tables:
            object.__setattr__(lean, field, {})
        return msgspec.structs.replace(save(lean), tables=tables)

    def _copy(self, each: _Copied, keys: list[Any]) -> None:
        self._keys += len(keys)
        self.bytes += each.copy(keys)

    def _seal(self, each: _Copied) -> Piece:
        piece = each.seal()
        self.pieces.append(piece)
        return piece
