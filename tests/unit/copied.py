# SPDX-License-Identifier: LGPL-2.1-or-later
"""A state with tables that is copied in rounds, and what reads it."""

import dataclasses

import msgspec

import upgrader
from upgrader.instance.declarations import Declarations
from upgrader.instance.offer import Offer
from upgrader.instance.rounds import Rounds
from upgrader.instance.save import Readers
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.state_codec import load, save
from upgrader.protocol.table_reader import TableReader


class Item(msgspec.Struct, frozen=True):
    number: int
    text: str = ""


@upgrader.state("stock")
class Stock:
    count: int = 0
    items: upgrader.Table[str, Item] = dataclasses.field(default_factory=upgrader.Table)
    names: upgrader.Table[int, str] = dataclasses.field(default_factory=upgrader.Table)

    def __post_init__(self) -> None:
        self.begun_with = len(self.items)
        self.same_items = self.items


ALL = {"stock.items": 1, "stock.names": 1}


def offer(version: int = 1, tables: dict[str, int] = ALL) -> Offer:
    return Offer(Readers({"stock": version}), stream=3, tables=tables)


class Both:
    """A state that is copied, and what reads it."""

    def __init__(self, items: int = 1000) -> None:
        self.declarations = Declarations("x")
        self.declared = self.declarations.add_state(Stock)
        self.declared.fill(None)
        self.stock = self.declared.value
        self.stock.items.update({str(n): Item(n) for n in range(items)})
        rounds = Rounds.of(self.declarations, offer())
        assert rounds
        self.rounds = rounds
        self.reader = TableReader({"stock": self.declared.description})

    def round(self) -> None:
        while not self.rounds.at_end:
            if piece := self.rounds.work():
                self.reader.add(piece.memfd)

    def finish(self) -> SavedState:
        for piece in self.rounds.finish():
            self.reader.add(piece.memfd)
        return self.rounds.save("stock", self.declared) or save(self.stock)

    def loaded(self, saved: SavedState) -> Stock:
        return load(Stock, saved, lambda there: self.reader.fill(saved, there))[0]
