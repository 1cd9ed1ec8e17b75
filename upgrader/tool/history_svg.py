# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draw upgrades as an SVG picture, after the manner of `systemd-analyze plot`.

One row for each: its phases as bars on a common axis, and in words what cannot be seen there.
"""

import math
import time
from collections.abc import Sequence
from xml.sax.saxutils import escape

from upgrader.protocol.wording import counted, show_duration
from upgrader.tool.history import PastResult, PastUpgrade
from upgrader.tool.plain_text import CELL, plain

_LEFT, _BARS, _RIGHT, _ROW, _TOP = 300, 600, 360, 26, 60
_TICKS = 6  # at most
_LETTER = 7.0  # the width of one, about
#: Phases in their order, with a colour for each; what clients notice is red, or violet in a restart.
_COLOURS = {
    "setup": "#c9d7e8",
    "collecting": "#f3d58a",
    "frozen": "#c0392b",
    "loading": "#e06a5b",
    "committed": "#8fb98b",
    "paused": "#8e44ad",
}
_OTHER = "#777777"
_STYLE = """\
<style>
text { font: 13px sans-serif; }
.title { font-size: 17px; font-weight: bold; }
.axis { fill: #555; font-size: 11px; }
.failed { fill: #a00; }
</style>"""
_THINNEST = 2.0  # a phase of a millisecond is to be seen


def plot(unit: str, past: Sequence[PastUpgrade]) -> str:
    """An SVG document with all of these but the mere starts."""
    rows = [(each, _bars(each)) for each in past if each.kind != "start"]
    step, count = _ticks(max((sum(s for _, s in bars) for _, bars in rows), default=0))
    height = _TOP + _ROW * (len(rows) + 2) + 30
    width = _LEFT + _BARS + _RIGHT
    size = f'width="{width}" height="{height}"'
    out = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}">',
        _STYLE,
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(12, 26, f"Upgrades of {unit}", "title"),
    ]
    bottom = _TOP + _ROW * len(rows)
    for tick in range(count + 1):
        x = _LEFT + _BARS * tick / count
        out.append(f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>')
        out.append(_text(x - 14, _TOP - 14, show_duration(step * tick), "axis"))
    for number, (each, bars) in enumerate(rows):
        out += _row(each, bars, _TOP + _ROW * number, _BARS / (step * count))
    shown = dict.fromkeys(name for _, bars in rows for name, _ in bars)
    for number, name in enumerate(shown):
        x, y = 12 + 130 * number, bottom + _ROW
        colour = _COLOURS.get(name, _OTHER)
        out.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{colour}"/>')
        out.append(_text(x + 20, y + 12, name))
    out.append("</svg>")
    return "\n".join(out) + "\n"


def _ticks(longest: float) -> tuple[float, int]:
    """The seconds from one tick to the next, a round number, and how many there are."""
    if longest <= 0:
        return 1.0, 1
    power = 10.0 ** math.floor(math.log10(longest / _TICKS))
    step = next(n * power for n in (1, 2, 5, 10) if longest <= n * power * _TICKS * (1 + 1e-9))
    return step, max(math.ceil(longest / step - 1e-9), 1)


def _bars(each: PastUpgrade) -> list[tuple[str, float]]:
    """The phases of an upgrade; none if nobody has told them."""
    if each.times:
        return [(name, seconds) for name, seconds in each.times if seconds > 0]
    return [("paused", each.pause)] if each.pause else []


def _row(each: PastUpgrade, bars: list[tuple[str, float]], y: float, scale: float) -> list[str]:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.time))
    failed = "failed" if each.result is PastResult.FAILED else ""
    out = [_text(12, y + 16, f"{stamp}  {each.kind} {each.generations('→')}", failed)]
    x = float(_LEFT)
    for name, seconds in bars:
        width = max(seconds * scale, _THINNEST)
        out.append(
            f'<rect x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="{_ROW - 8}"'
            f' fill="{_COLOURS.get(name, _OTHER)}">'
            f"<title>{_clean(name)} {show_duration(seconds)}</title></rect>"
        )
        x += width
    words = f"{each.result}: {each.reason}" if failed else str(each.result)
    if each.result is PastResult.DONE:
        words = f"paused {show_duration(each.pause)}, {counted(each.fds, 'FD')}"
        if each.left_behind:
            words += f", {each.left_behind} left behind"
    room = int((_LEFT + _BARS + _RIGHT - x - 8) / _LETTER)
    words = words if len(words) <= room else words[: room - 1] + "…"
    out.append(_text(x + 8, y + 16, words, failed))
    return out


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}"{f" class={kind!r}" if kind else ""}>{_clean(text)}</text>'
    )


def _clean(text: str) -> str:
    """Escaped, and without what XML does not allow."""
    return escape(plain(text, CELL))
