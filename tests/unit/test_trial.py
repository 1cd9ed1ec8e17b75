# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trials: whether a state can be saved now, what that takes, and who is told."""

import collections
import dataclasses
import functools
import logging
import threading
from typing import Any

import pytest

import upgrader
from tests.unit.units import Keeping
from upgrader.cli.overview_text import shown
from upgrader.cli.screen import Screen
from upgrader.instance.control_answers import Negotiation
from upgrader.instance.control_listener import Caller
from upgrader.instance.self_report import SelfReport
from upgrader.protocol.state_codec import save
from upgrader.protocol.state_trial import blame, measure
from upgrader.protocol.varlink import VarlinkError
from upgrader.protocol.varlink_types import Description, Trial
from upgrader.tool.overview import Overview


@dataclasses.dataclass
class Row:
    number: int = 0
    note: Any = None


@upgrader.state("table", version=3)
class Table:
    title: str = "t"
    rows: dict[str, Row] = dataclasses.field(default_factory=dict)
    order: list[int] = dataclasses.field(default_factory=list)
    seen: set[str] = dataclasses.field(default_factory=set)


@upgrader.state("old", version=2, readable_from=1)
class Old:
    value: int = 1


@upgrader.convert_back(Old, 1)
def to_1(fields: dict[str, Any]) -> dict[str, Any]:
    return {"number": 10 // fields["value"]}


def table(size: int) -> Table:
    names = [f"row {number}" for number in range(size)]
    return Table("t", {name: Row(7) for name in names}, list(range(size)), set(names))


def reporting(*values: object) -> SelfReport:
    report = SelfReport("x", "1", {})
    for value in values:
        report.declarations.add_state(type(value)).fill(value)
    return report


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 5000])
def test_p5_a_state_is_measured_in_pieces(size: int) -> None:
    """Their sum is what would be saved, but for names and the heads of containers."""
    value = table(size)
    measured = measure(value)

    assert 0 <= len(save(value).data) - measured.bytes + 16 < 64
    assert measured.seconds > 0


def test_p5_a_state_may_change_while_it_is_tried() -> None:
    """It belongs to another thread: no trial fails because of that."""
    value = table(20_000)
    declared = reporting(value).declarations.states["table"]
    over = threading.Event()

    def change() -> None:
        number = 0
        while not over.is_set():
            number += 1
            value.rows[f"new {number}"] = Row(number)
            value.seen.add(f"new {number}")
            value.order.append(number)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert [""] * 5 == [declared.try_saving().problem for _ in range(5)]
    finally:
        over.set()
        thread.join()


def test_p5_what_cannot_be_saved_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """With its path, at priority err; again only when something else cannot be."""
    value = table(3)
    instance = reporting(value, Old())
    assert [("table", 3, ""), ("old", 2, "")] == [
        (trial.name, trial.version, trial.problem) for trial in instance.try_states()
    ]
    assert "" == caplog.text

    value.rows["row 1"].note = len
    for _ in range(2):
        trial, _ = instance.try_states()
        assert trial.problem.startswith("rows['row 1'].note: ")
        assert trial.at > 0
    assert [logging.ERROR] == [record.levelno for record in caplog.records]
    assert "state 'table' cannot be saved: rows['row 1'].note: " in caplog.text

    value.rows["row 0"].note = len
    instance.try_states()
    assert 2 == len(caplog.records)
    value.rows.clear()
    assert "" == instance.try_states()[0].problem
    assert 2 == len(caplog.records)


def test_p5_converters_back_are_tried_as_well() -> None:
    """They run only when there is no way back."""
    old = Old(0)
    (trial,) = reporting(old).try_states()

    assert "cannot be converted back to version 1: ZeroDivisionError" in trial.problem
    old.value = 5
    assert "" == reporting(old).try_states()[0].problem


def test_p5_nothing_is_blamed_that_can_be_saved() -> None:
    """An empty text."""
    assert "" == blame(table(3))


def test_p5_whoever_asks_is_told() -> None:
    """The last trial comes with what an instance says of itself, and a new one can be asked for."""
    value = table(1)
    instance = reporting(value)
    negotiation = Negotiation(instance, "1", lambda request: None, lambda: None, Keeping())
    value.rows["row 0"].note = object()
    tried = negotiation.try_states(Caller(1, 0))["trials"]

    assert tried == negotiation.describe()["trials"]
    assert tried[0]["problem"].startswith("rows['row 0'].note: ")


def test_p5_only_who_may_steer_may_try() -> None:
    """It takes time of the service."""
    negotiation = Negotiation(reporting(), "1", lambda request: None, lambda: None, Keeping())

    with pytest.raises(VarlinkError, match="PermissionDenied"):
        negotiation.try_states(Caller(1, 12345))


def test_p5_status_shows_trials() -> None:
    """Size and time of each state, and what cannot be saved in a line of its own."""
    instance = Description(
        "x",
        states={"table": 3, "old": 2, "new": 1},
        trials=[
            Trial("table", 3, 7_500_000, 0.0361, 1.0),
            Trial("old", 2, 0, 0.0, 1.0, "value: is a Task"),
        ],
    )
    found = Overview("x.service", "active", True, 1, None, instance, uses_upgrader=True)
    text = "\n".join(shown(Screen(), found, 0.0))

    assert "table (version 3, 7.2M saved in 36.1ms), old (version 2), new" in text
    assert "state old CANNOT BE SAVED: value: is a Task" in text


@dataclasses.dataclass
class Colored(Row):
    color: str = "red"


@upgrader.state("loose")
class Loose:
    number: int = 0
    rows: list[Row] = dataclasses.field(default_factory=list)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    anything: dict[str, Any] = dataclasses.field(default_factory=dict)
    share: float = 0.0
    users: upgrader.Table[str, int] = dataclasses.field(default_factory=upgrader.Table)

    def __post_init__(self) -> None:
        self.made_anew = [self.number]

    @functools.cached_property
    def computed(self) -> int:
        return self.number


def altered(**fields: Any) -> list[str]:
    loose = Loose(**{name: value for name, value in fields.items() if hasattr(Loose(), name)})
    assert loose.computed == loose.number
    vars(loose).update(fields)
    trial = reporting(loose).declarations.states["loose"].try_saving()
    assert not trial.problem
    return [trial.unreadable] if trial.unreadable else trial.altered


def test_p5_what_would_not_be_loaded_as_it_is() -> None:
    """It is found by the trial, at every depth: nothing in an upgrade would say it."""
    assert [] == altered(
        number=1, share=1, counts={"a": 1}, rows=[Row()], users=upgrader.Table(a=1)
    )
    assert ["Expected `int`, got `float` - at `$.number`"] == altered(number=1.5)
    assert ["rows[...].color is in no type that is annotated there, and is dropped",
            "rows[0] is a Colored, and is loaded as a Row"] == altered(rows=[Colored()])  # fmt: skip
    assert ["counts is a defaultdict, and is loaded as a dict"] == altered(
        counts=collections.defaultdict(int, a=1)
    )
    assert ["anything['a'] is a tuple, and is loaded as a list",
            "anything['b']['c'] is a set, and is loaded as a list"] == altered(
        anything={"a": (1, 2), "b": {"c": {1}}}
    )  # fmt: skip
    assert ["extra is no field, and is dropped"] == altered(extra=1, _private=2)


def test_p5_no_version_is_blamed_for_what_its_own_could_not_load(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The journal says it once, and the source knows it when the new version says that it cannot."""
    loose = Loose()
    report = reporting(loose)
    with caplog.at_level(logging.WARNING):
        assert "" == report.unreadable
        loose.number = 0.5  # type: ignore[assignment]
        said = (
            "state 'loose' could not be loaded again by the version that runs: Expected `int`, got `float`"
            " - at `$.number`"
        )
        assert said == report.unreadable == report.unreadable

    assert [said] == caplog.messages
