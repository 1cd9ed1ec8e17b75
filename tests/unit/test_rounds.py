# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tables in rounds: all that is written crosses."""

import copy
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

import upgrader
from tests.unit.copied import ALL, Both, Item, Stock, offer
from upgrader.errors import ImageError, UnsavableState
from upgrader.instance.declarations import Declarations
from upgrader.instance.offer import Offer
from upgrader.instance.rounds import Rounds
from upgrader.protocol.state_codec import load, save
from upgrader.protocol.table import retire
from upgrader.protocol.table_pieces import Piece
from upgrader.protocol.table_reader import TableReader
from upgrader.protocol.varlink_types import Trial

WRITES: list[Callable[[Any], object]] = [
    lambda t: t.__setitem__("1", Item(-1)), lambda t: t.__setitem__("new", Item(-2)),
    lambda t: t.__delitem__("2"), lambda t: t.pop("3"), lambda t: t.pop("none", None),
    lambda t: t.popitem(), lambda t: t.setdefault("4", Item(-3)),
    lambda t: t.setdefault("newer", Item(-4)), lambda t: t.update({"5": Item(-5)}, six=Item(-6)),
    lambda t: t.update([("7", Item(-7))]), lambda t: t.__ior__({"8": Item(-8)}), lambda t: t.clear(),
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("when", ["in the first round", "after it", "in the freeze"])
def test_every_way_to_write_is_seen(write: Callable[[Any], object], when: str, both: Both) -> None:
    both.rounds.begin()
    if when == "in the first round":
        both.rounds.work()
        write(both.stock.items)
    both.round()
    if when == "after it":
        write(both.stock.items)
        both.rounds.again()
        both.round()
    if when == "in the freeze":
        write(both.stock.items)

    assert both.stock == both.loaded(both.finish())


def test_whatever_is_written_in_between(both: Both) -> None:
    """At random, in both tables, over many rounds."""
    choose = random.Random(3)
    both.rounds.begin()
    for number in range(20_000):
        key = choose.randrange(2000)
        if choose.random() < 0.2:
            both.stock.items.pop(str(key), None)
        else:
            both.stock.items[str(key)] = Item(number)
        both.stock.names[key] = str(number)
        if number % 50 == 0:
            if both.rounds.at_end:
                both.rounds.again()
            if piece := both.rounds.work():
                both.reader.add(piece.memfd)

    assert both.stock == both.loaded(both.finish())
    assert both.rounds.round > 3


def test_what_is_left_becomes_less(both: Both) -> None:
    """It is told in bytes, and is nothing at the end."""
    both.rounds.begin()
    both.round()
    assert both.rounds.left == 0
    both.stock.items["1"] = Item(5)
    assert 0 < both.rounds.left < both.rounds.bytes / 100
    both.rounds.again()
    both.round()
    assert (2, 0) == (both.rounds.round, both.rounds.left)


def test_another_table_in_its_place_goes_whole(both: Both) -> None:
    """What has crossed of the one before is forgotten."""
    both.rounds.begin()
    both.round()
    both.stock.items = upgrader.Table({"only": Item(1)})
    saved = both.finish()

    assert both.stock == both.loaded(saved)


def test_what_a_state_makes_of_its_tables(both: Both) -> None:
    """`__post_init__` sees them as they are then, in rounds or whole, and may keep them."""
    for saved in (save(both.stock), None):
        if saved is None:
            both.rounds.begin()
            both.round()
        there = both.loaded(saved or both.finish())

        assert len(both.stock.items) == there.begun_with
        assert there.items is there.same_items


def test_a_table_in_two_fields(both: Both) -> None:
    """What is written to it is seen in both."""
    both.stock.names = both.stock.items  # type: ignore[assignment]
    rounds = Rounds.of(both.declarations, offer())
    assert rounds
    both.rounds = rounds
    both.rounds.begin()
    both.round()
    both.stock.items["new"] = Item(-1)
    saved = both.finish()

    assert ["items"] == [*(saved.tables or ())]
    whole = msgspec.msgpack.decode(saved.data)
    assert both.stock.items.keys() == whole["names"].keys()


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_of_a_table_is_one_of_its_own(copied: Callable[[Any], Any], both: Both) -> None:
    """Also while changes are recorded, and of one that was given away."""
    both.rounds.begin()
    both.round()
    items = both.stock.items
    mine = copied(items)
    mine["mine"] = Item(1)

    assert upgrader.Table is type(mine)
    assert {**items, "mine": Item(1)} == mine
    assert both.rounds.left == 0
    given = upgrader.Table(items)
    retire(given)
    assert items == copied(given)


def test_a_value_that_cannot_be_saved(both: Both) -> None:
    both.rounds.begin()
    both.stock.items["1"] = object()  # type: ignore[assignment]
    with pytest.raises(UnsavableState, match="stock"):
        both.round()


def test_writing_goes_on_at_the_speed_of_a_dict_afterwards(both: Both) -> None:
    both.rounds.begin()
    both.rounds.end()
    both.stock.items["1"] = Item(9)
    assert both.rounds.left == 0


def made(declarations: Declarations, of: Offer) -> bool:
    return Rounds.of(declarations, of) is not None


def test_an_older_library_gets_the_whole_table() -> None:
    """It offers no tables, or an older stream; then the state is the dict that it knows."""
    both = Both(10)
    asked: dict[str, Any] = {
        "streams": [1, 2], "images": [1, 2], "states": {"stock": 1}, "backends": [],
    }  # fmt: skip

    assert not made(both.declarations, Offer.read(asked, both.declarations))
    assert not made(both.declarations, Offer.read({**asked, "tables": ALL}, both.declarations))
    newer = {**asked, "streams": [1, 2, 3], "images": [1, 2, 3]}
    assert not made(both.declarations, Offer.read(newer, both.declarations))
    assert made(both.declarations, Offer.read({**newer, "tables": ALL}, both.declarations))


def test_a_state_that_must_be_converted_goes_whole() -> None:
    both = Both(10)
    d = both.declared.description
    assert made(both.declarations, offer())
    assert not made(both.declarations, offer(tables=dict.fromkeys(ALL, 2)))
    d.backward[1] = lambda fields: fields
    assert not made(both.declarations, offer(1))
    assert made(both.declarations, offer(2))
    d.backward.clear()
    both.declared.trial = Trial("stock", 1, bytes=1000)
    assert not made(both.declarations, offer())


def orders(pieces: Sequence[Piece]) -> list[list[Piece]]:
    first, second = pieces
    return [[], [first], [second, first], [first, second, second]]


@pytest.mark.parametrize("case", range(4))
def test_the_image_says_which_pieces_there_must_be(case: int, both: Both) -> None:
    """All of them, in their order, and none twice."""
    both.rounds.begin()
    both.round()
    both.stock.items["1"] = Item(7)
    saved = both.finish()
    reader = TableReader({"stock": both.declared.description})
    for piece in orders(both.rounds.pieces)[case]:
        reader.add(piece.memfd)
    there, _ = load(Stock, saved)

    with pytest.raises(ImageError, match="not all pieces of table 'items'"):
        reader.fill(saved, there)


def test_an_empty_table_needs_no_round() -> None:
    both = Both(0)
    both.rounds.begin()
    assert both.rounds.at_end
    assert both.stock == both.loaded(both.finish())
    assert not both.rounds.pieces
    both.rounds.end()


def test_a_piece_that_is_full_is_sealed(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round has as many pieces as it needs."""
    monkeypatch.setattr("upgrader.instance.rounds.SIZE", 2000)
    monkeypatch.setattr("upgrader.instance.rounds._AT_ONCE", 50)
    both.rounds.begin()
    both.round()
    both.stock.items.update({str(n): Item(-n) for n in range(500)})
    saved = both.finish()

    assert both.stock == both.loaded(saved)
    assert len(both.rounds.pieces) > 5
    assert all(piece.bytes < 200_000 for piece in both.rounds.pieces)
