# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a person sees: screens as they were looked at, colours by systemd's habits, numbers in words."""

import io
import re
import time
from collections.abc import Iterator, Mapping

import pytest

from tests.unit import screens
from upgrader.cli.screen import Cell, Screen, Tone
from upgrader.protocol.wording import counted, show_age, show_bytes, show_duration

OF_A_FILE = re.compile(r"    (#|[A-Z]\w+=|    --)")


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Points in time are those of one time zone."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize("name", screens.ALL)
def test_n7_screens_are_as_they_were_looked_at(name: str) -> None:
    """At 60, 80 and 120 columns, in every situation; each table fits."""
    file = screens.SCREENS / f"{name}.txt"

    assert file.read_text() == screens.text(name), "look at it: python -m tests.unit.screens"
    for _, there, seen in screens.ALL[name]():
        words = max(len(word) for word in seen.split())
        # A file that is shown has the lines that it has.
        widest = max(len(line) for line in seen.splitlines() if not OF_A_FILE.match(line))
        assert widest <= max(there.width or 0, words) or "serving since" in seen


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        """It is none."""
        return True


XTERM = {"TERM": "xterm"}


@pytest.mark.parametrize(
    ("terminal", "environment", "colours"),
    [
        (True, XTERM, True),
        (False, XTERM, False),
        (True, {}, False),
        (True, {"TERM": "dumb"}, False),
        (True, XTERM | {"NO_COLOR": ""}, False),
        (True, XTERM | {"SYSTEMD_COLORS": "0"}, False),
        (True, XTERM | {"SYSTEMD_COLORS": "auto-16"}, True),
        (False, XTERM | {"SYSTEMD_COLORS": "auto-16"}, False),
        (False, {"SYSTEMD_COLORS": "1", "NO_COLOR": "1"}, True),
        (False, {"SYSTEMD_COLORS": "256"}, True),
        (True, XTERM | {"SYSTEMD_COLORS": "purple"}, True),
    ],
)
def test_n7_colours_are_for_terminals(
    terminal: bool, environment: Mapping[str, str], colours: bool
) -> None:
    """As with systemctl."""
    there = Screen.of(Terminal() if terminal else io.StringIO(), environment)

    assert colours == there.colours
    assert ("\x1b[0;1;31mfailed\x1b[0m" if colours else "failed") == there.paint("failed", Tone.BAD)


def test_n7_all_fits_where_there_is_no_terminal() -> None:
    """A file or a pipe gets every word; a terminal says how wide it is, or COLUMNS does."""
    assert Screen.of(io.StringIO(), {"COLUMNS": "60"}).width is None
    assert Screen.of(None, {}).width is None
    assert 60 == Screen.of(Terminal(), {"COLUMNS": "60"}).width
    assert 80 == Screen.of(Terminal(), {"COLUMNS": "wide"}).width


def test_n7_no_character_controls_a_terminal() -> None:
    """Whatever a service has written, in tables and in texts; columns stay where they are."""
    there = Screen(40, colours=True)
    evil = "a\x1b[2J\x9b1mb\u202ec\td\r\n"

    for seen in (
        there.table(("A", "B"), [(evil, Cell(evil, Tone.BAD)), ("x", "y")]),
        there.wrapped("name: ", evil, Tone.NOTE),
    ):
        for colour in (*Tone, "\x1b[0m"):
            seen = seen.replace(colour, "") if colour else seen
        assert seen.replace("\n", "").isprintable()


def test_n7_a_name_is_cut_in_its_middle() -> None:
    """Instances of a template differ at the end; of a text, the beginning says most."""
    table = Screen(40, ellipsis="…").table(
        ("UNIT", "WHY"), [("tickets-of-the-fair@north.service", "because " * 9)]
    )

    name, text = table.splitlines()[1].split("  ")
    assert name.startswith("tickets-")
    assert name.endswith("th.service"[-6:])
    assert text.startswith("because")
    assert text.endswith("…")
    assert 40 == len(table.splitlines()[1])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0"), (5e-6, "5us"), (0.0043, "4.3ms"), (0.048, "48ms"), (0.484, "484ms"),
        (0.99996, "1s"), (2.345, "2.345s"), (11.9147, "11.9s"), (59.97, "1min"), (125, "2min 5s"),
        (3700, "1h 1min"), (2 * 86400 + 3 * 3600, "2d 3h"),
    ],
)  # fmt: skip
def test_n7_a_duration(seconds: float, text: str) -> None:
    """In systemd's units, with the digits that tell something."""
    assert text == show_duration(seconds)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "just now"), (1, "1s ago"), (62, "1min 2s ago"), (305, "5min ago"),
        (3700, "1h 1min ago"), (90000, "1 day 1h ago"), (8 * 86400, "1 week 1 day ago"),
        (40 * 86400, "1 month 1 week ago"), (4e7, "1 year 3 months ago"),
    ],
)  # fmt: skip
def test_n7_an_age(seconds: float, text: str) -> None:
    """As systemctl says it."""
    assert text == show_age(seconds)


def test_n7_plurals_and_sizes() -> None:
    """One FD is one FD."""
    assert ["0 FDs", "1 FD", "2 FDs"] == [counted(number, "FD") for number in range(3)]
    assert ["0B", "1023B", "1.0K", "7.2M"] == [
        show_bytes(number) for number in (0, 1023, 1024, 7_500_000)
    ]
    assert "1h ago" == show_age(3700, brief=True)


def test_n7_a_terminal_may_lack_a_character() -> None:
    """Then three dots are an ellipsis."""
    latin = Terminal()
    latin.encoding = "iso-8859-1"  # type: ignore[misc]

    assert ("...", "->") == (Screen.of(latin, {}).ellipsis, Screen.of(latin, {}).arrow)
    assert ("…", "→") == (Screen.of(Terminal(), {}).ellipsis, Screen.of(Terminal(), {}).arrow)
