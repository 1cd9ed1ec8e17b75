# SPDX-License-Identifier: LGPL-2.1-or-later
"""How things look where they are shown: colours, columns that fit, and no character that could control a
terminal.

Every text that a service may have written comes through here.
"""

import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self, TextIO

from upgrader.protocol.systemd_syntax import boolean
from upgrader.tool.plain_text import CELL, plain

_COLUMNS = 80
#: Characters that are little room for the first column, which has names, and for the others; and to
#: which no column shrinks.
_LITTLE = (24, 12)
_LEAST = 6
_NARROW = 24  # a text that has less room than that is not wrapped
_HANG = 4  # by how much further lines of a text are indented, at least


class Tone(StrEnum):
    """What a word means, as the colour that systemd gives to such words."""

    GOOD = "\x1b[0;1;32m"
    BAD = "\x1b[0;1;31m"
    NOTE = "\x1b[0;1;33m"
    HEAD = "\x1b[0;4m"
    NONE = ""


_PLAIN = "\x1b[0m"


class Cell(NamedTuple):
    """A text and what it means."""

    text: str
    tone: Tone = Tone.NONE


@dataclass(frozen=True, slots=True)
class Screen:
    """Where something is shown. `width`: its columns, None where all fits, as in a file or a pipe."""

    width: int | None = None
    colours: bool = False
    ellipsis: str = "..."
    arrow: str = "->"

    @classmethod
    def of(cls, stream: TextIO | None, environment: Mapping[str, str] = os.environ) -> Self:
        """What there is behind a stream, by the rules of systemctl(1)."""
        terminal = stream is not None and stream.isatty()
        unicode = (getattr(stream, "encoding", "") or "").lower().startswith("utf")
        return cls(
            width=_columns(stream, environment) if stream is not None and terminal else None,
            colours=_colours(terminal, environment),
            ellipsis="\N{HORIZONTAL ELLIPSIS}" if unicode else "...",
            arrow="\N{RIGHTWARDS ARROW}" if unicode else "->",
        )

    def paint(self, text: str, tone: Tone) -> str:
        """Make a text harmless, and give it the colour of what it means."""
        return f"{tone}{plain(text)}{_PLAIN}" if self.colours and tone else plain(text)

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str | Cell]],
        *,
        spare: Sequence[str] = (),
    ) -> str:
        """Align rows in columns, as systemctl does. Where they do not fit, columns in `spare` are left
        out, in that order, as long as the others have little room; then the longest texts are cut.
        """
        cells = [[_cell(each) for each in row] for row in rows]
        columns = {
            name: [Cell(name, Tone.HEAD), *(row[number] for row in cells)]
            for number, name in enumerate(head)
        }
        for name in spare:
            if self._missing(columns, _LITTLE) > 0:
                del columns[name]
        widths = self._widths(columns)
        shown = [
            [self._cut(cell, widths[name], middle=name == head[0]) for cell in column]
            for name, column in columns.items()
        ]
        return "\n".join("  ".join(row).rstrip() for row in zip(*shown, strict=True))

    def wrapped(self, name: str, text: str, tone: Tone = Tone.NONE) -> str:
        """Write a text behind its name, with further lines below the text."""
        text = plain(text)
        hang = " " * max(len(name), _HANG)
        lines = [text]
        if self.width and self.width - len(hang) >= _NARROW:
            lines = textwrap.wrap(
                text, self.width, initial_indent=" " * len(name), subsequent_indent=hang,
                break_on_hyphens=False,
            ) or [text]  # fmt: skip
            lines[0] = lines[0][len(name) :]
        first, *others = (self.paint(line.lstrip(), tone) for line in lines)
        return "\n".join([plain(name) + first, *(hang + line for line in others)])

    def _missing(self, columns: Mapping[str, Sequence[Cell]], most: tuple[int, int]) -> int:
        """How many characters are missing if no column has more than that: the first one, and others."""
        if self.width is None:
            return 0
        wanted = [
            min(_longest(column), most[number > 0])
            for number, column in enumerate(columns.values())
        ]
        return sum(wanted) + 2 * (len(wanted) - 1) - self.width

    def _widths(self, columns: Mapping[str, Sequence[Cell]]) -> dict[str, int]:
        widths = {name: _longest(column) for name, column in columns.items()}
        first, *others = widths
        excess = self._missing(columns, (sys.maxsize, sys.maxsize))
        for names, least in (
            (others, _LITTLE[1]),
            ([first], _LITTLE[0]),
            ([*others, first], _LEAST),
        ):
            while names and excess > 0:
                widest = max(names, key=lambda name: widths[name])
                if widths[widest] <= least:
                    break
                widths[widest] -= 1
                excess -= 1
        return widths

    def _cut(self, cell: Cell, width: int, *, middle: bool) -> str:
        """Make a text as wide as its column; `middle`: keep its end as well, as of names."""
        text = cell.text
        if len(text) > width:
            room = width - len(self.ellipsis)
            end = room // 3 if middle else 0
            text = text[: room - end] + self.ellipsis + text[len(text) - end :]
        return self.paint(text, cell.tone) + " " * (width - len(text))


def _cell(given: str | Cell) -> Cell:
    text, tone = (given, Tone.NONE) if isinstance(given, str) else given
    return Cell(plain(text, CELL), tone)


def _longest(column: Sequence[Cell]) -> int:
    return max(len(cell.text) for cell in column)


def _columns(stream: TextIO, environment: Mapping[str, str]) -> int:
    asked = environment.get("COLUMNS", "")
    if asked.isascii() and asked.isdecimal() and int(asked):
        return int(asked)
    try:
        return os.get_terminal_size(stream.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


def _colours(terminal: bool, environment: Mapping[str, str]) -> bool:
    """Whether to use colours: https://systemd.io/ENVIRONMENT/ and https://no-color.org/."""
    asked = environment.get("SYSTEMD_COLORS", "")
    if asked in ("16", "256", "24bit"):
        return True
    try:
        return boolean(asked)
    except ValueError:  # unset, or "auto-16" and the like
        dumb = environment.get("TERM", "dumb") == "dumb"
        return terminal and not dumb and "NO_COLOR" not in environment
