# SPDX-License-Identifier: LGPL-2.1-or-later
"""What has come of the tables of an instance, piece by piece, until its image says what had to come.

Nothing of it is trusted: order, keys and values of the declared types, fields at every depth.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_type_hints

import msgspec

from upgrader.errors import ImageError, UnreadableState
from upgrader.protocol import table_pieces
from upgrader.protocol.fd import Fd
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.state import StateVersions
from upgrader.protocol.state_codec import require_explained
from upgrader.protocol.table import Table


def oldest_version(d: StateVersions) -> int:
    """From which version on the pieces of a state can be taken: a converter wants all of it at once."""
    return max(d.converters, default=0) + 1


class _Reading:
    """One table: its keys and values so far, and the checksums of its pieces."""

    def __init__(self, d: StateVersions, field: str) -> None:
        self.table: Table[Any, Any] = Table()
        self.checksums: list[int] = []
        self.unknown: set[str] = set()
        self._d = d
        self._field = field
        kind: Any = get_type_hints(d.cls)[field]
        key: Any
        key, _ = get_args(kind)
        self._decoder = msgspec.msgpack.Decoder(tuple[kind, list[key]])

    def add(self, head: table_pieces.Head, frames: Iterable[memoryview]) -> None:
        """Take the frames of one piece; raises UnreadableState."""
        d, other = self._d, head.shape != self._d.shape.mark or head.version != self._d.version
        try:
            for frame in frames:
                values, gone = self._decoder.decode(frame)
                if other:
                    found = d.shape.compare_table(self._field, frame, values)
                    require_explained(d, head.version, found.missing)
                    self.unknown.update(found.unknown)
                self.table.update(values)
                for key in gone:
                    self.table.pop(key, None)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            why = f"table {self._field!r} of version {head.version} does not decode: {error}"
            raise UnreadableState(d.item, why) from error


class TableReader:
    """The tables of all states of one instance."""

    def __init__(self, states: Mapping[str, StateVersions]) -> None:
        self._states = states
        self._tables: dict[tuple[str, str], _Reading] = {}
        self._count = 0
        self.bytes = 0  #: of all pieces

    def add(self, memfd: Fd) -> None:
        """Load the next piece; raises ImageError or UnreadableState."""
        item = f"piece {self._count} of the tables"
        if self._count >= table_pieces.MOST:
            raise ImageError(item, f"is one too many (limit {table_pieces.MOST})")
        with table_pieces.opened(memfd, item) as (head, checksum, frames):
            d = self._states.get(head.state)
            if d is None or head.field not in d.tables:
                raise ImageError(item, f"is of {head.state!r}.{head.field}, which is no table here")
            if head.version < oldest_version(d):
                raise ImageError(item, f"is of version {head.version}, which must be converted")
            place = head.state, head.field
            if place not in self._tables:
                self._tables[place] = _Reading(d, head.field)
            reading = self._tables[place]
            reading.add(head, frames)
            reading.checksums.append(checksum)
        self._count += 1
        self.bytes += os.fstat(memfd.fileno()).st_size

    def fill(self, saved: SavedState, value: object) -> tuple[str, ...]:
        """Put the tables of a state that was loaded into it; returns fields that are not known here.

        What the state has instead of a table counts, if it does not name its pieces. Raises ImageError
        unless exactly those have come, in their order."""
        unknown: set[str] = set()
        for field, checksums in (saved.tables or {}).items():
            reading = self._tables.get((saved.name, field))
            if reading is None or reading.checksums != checksums:
                why = f"not all pieces of table {field!r} have come"
                raise ImageError(f"state {saved.name!r}", why)
            object.__setattr__(value, field, reading.table)
            unknown |= reading.unknown
        return tuple(sorted(unknown))
