# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upgrades as an SVG picture, after the manner of `systemd-analyze plot`; reads nothing.

One row for each: its phases as bars on a common axis, and in words what cannot be seen there.
"""

import time
from collections.abc import Sequence
from xml.sax.saxutils import escape

from upgrader.tool.history import HistoryEvent
from upgrader.tool.plain_text import CELL, plain

_LEFT, _BARS, _RIGHT, _ROW, _TOP = 300, 600, 330, 26, 60
_GRID = 5
#: Phases in their order, with a colour for each; what clients notice is red.
_COLOURS = {
    "setup": "#c9d7e8",
    "collecting": "#f3d58a",
    "frozen": "#c0392b",
    "loading": "#e06a5b",
    "committed": "#8fb98b",
    "paused": "#c0392b",
}
_OTHER = "#777777"
_STYLE = """\
<style>
text { font: 13px sans-serif; }
.title { font-size: 17px; font-weight: bold; }
.axis { fill: #555; font-size: 11px; }
</style>"""
_THINNEST = 2.0  # a phase of a millisecond is to be seen


def plot(unit: str, events: Sequence[HistoryEvent]) -> str:
    """An SVG document with the upgrades among these events."""
    rows = [(event, _bars(event)) for event in events if _bars(event)]
    longest = max((sum(s for _, s in bars) for _, bars in rows), default=0) or 1.0
    height = _TOP + _ROW * (len(rows) + 2) + 30
    width = _LEFT + _BARS + _RIGHT
    out = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        _STYLE,
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(12, 26, f"Upgrades of {unit}", "title"),
    ]
    bottom = _TOP + _ROW * len(rows)
    for step in range(_GRID + 1):
        x = _LEFT + _BARS * step / _GRID
        out.append(f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>')
        out.append(_text(x - 14, _TOP - 14, _span(longest * step / _GRID), "axis"))
    for number, (event, bars) in enumerate(rows):
        out += _row(event, bars, _TOP + _ROW * number, _BARS / longest)
    shown = dict.fromkeys(name for _, bars in rows for name, _ in bars)
    for number, name in enumerate(shown):
        x, y = 12 + 130 * number, bottom + _ROW
        colour = _COLOURS.get(name, _OTHER)
        out.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{colour}"/>')
        out.append(_text(x + 20, y + 12, name))
    out.append("</svg>")
    return "\n".join(out) + "\n"


def _bars(event: HistoryEvent) -> list[tuple[str, float]]:
    """The phases of an event that stands for a whole upgrade; none of one that does not."""
    if event.side == "source" and event.phase == "migrate":
        return [(name, seconds) for name, seconds in event.times if seconds > 0]
    if event.side == "destination" and event.mode == "restart" and event.pause:
        return [("paused", event.pause)]
    return []


def _row(event: HistoryEvent, bars: list[tuple[str, float]], y: float, scale: float) -> list[str]:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    out = [_text(12, y + 16, f"{stamp}  {event.mode} {event.source} → {event.destination}")]
    x = float(_LEFT)
    for name, seconds in bars:
        width = max(seconds * scale, _THINNEST)
        out.append(
            f'<rect x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="{_ROW - 8}"'
            f' fill="{_COLOURS.get(name, _OTHER)}">'
            f"<title>{_clean(name)} {_span(seconds)}</title></rect>"
        )
        x += width
    words = f"paused {_span(event.pause)}, {event.fds} FDs"
    if event.outcome != "done":
        words = event.message.partition("\n")[0]
        words = words if len(words) < 60 else words[:59] + "…"
    elif event.left_behind:
        words += f", {event.left_behind} left behind"
    out.append(_text(x + 8, y + 16, words))
    return out


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}"{f" class={kind!r}" if kind else ""}>{_clean(text)}</text>'
    )


def _clean(text: str) -> str:
    """Escaped, and without what XML does not allow."""
    return escape(plain(text, CELL))


def _span(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
