# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tables and charts of what was measured: medians over all rounds, with the worst beside them."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from tests.bench.peers import load
from tests.bench.peers.measure import UPGRADES, Result
from tests.bench.peers.servers import SERVERS
from upgrader.lab.demo.waits import WaitCause
from upgrader.lab.private_systemd import PrivateSystemd

_HEAD = (
    "", "failed new", "failed kept", "closed", "streams broken", "took over", "stall, ms",
    "with no upgrade, ms", "waits over 10 ms", "new code, ms", "of a start", "outage, broken, s", "outage, hanging, s",
    "FDs", "memory, MB",
)  # fmt: skip


def about(machine: PrivateSystemd, rounds: int) -> list[str]:
    """What was measured where, when and how often."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    measured = f"In each of {rounds} rounds" if rounds > 1 else "In one round"
    return [
        (
            f"{datetime.datetime.now(tz=datetime.UTC).date()}, commit {commit}; {os.cpu_count()} processors,"
            f" Linux {platform.release()}, systemd {machine.systemd_version}, Python"
            f" {platform.python_version()}. {measured}, one server after the other, the"
            f" order turned round every time: {load.RATE:g} new connections a second, {load.KEPT} kept"
            f" alive with {load.KEPT_RATE:g} requests a second each, {load.STREAMS} streams;"
            f" {UPGRADES} upgrades."
        ),
    ]


def table(results: Sequence[Result]) -> list[str]:
    """Lines of Markdown."""
    lines = [_row(_HEAD), _row("---" for _ in _HEAD)]
    for name, own in _by_server(results):
        lines.append(_row([SERVERS[name].title, *_cells(own)]))
    return lines


def write(place: Path, lines: Sequence[str], results: Sequence[Result]) -> None:
    """`peers.md` and `peers.json`."""
    place.mkdir(parents=True, exist_ok=True)
    text = (place / "peers.md").read_text() if (place / "peers.md").exists() else "# Peers\n"
    head, _, rest = text.partition("<!-- peers -->\n")
    _, _, foot = rest.partition("<!-- -->\n")
    body = "\n".join([*lines, "", *table(results)])
    (place / "peers.md").write_text(f"{head}<!-- peers -->\n{body}\n<!-- -->\n{foot}")
    data = msgspec.json.encode({"about": lines, "results": results})
    (place / "peers.json").write_bytes(msgspec.json.format(data) + b"\n")


def charts(place: Path, results: Sequence[Result]) -> None:
    """`stalls.svg` and `new-code.svg`."""
    for file, title, values in (
        ("stalls", "Longest wait of a client in an upgrade, ms", lambda r: r.stalls),
        ("new-code", "From asked to the first answer of new code, ms", lambda r: r.new_code),
    ):
        (place / f"{file}.svg").write_text(_bars(title, results, values))


def _cells(own: Sequence[Result]) -> Iterable[str]:
    for count in ("failed_new", "failed_kept", "closed", "broken"):
        yield str(sum(getattr(each, count) for each in own))
    yield f"{sum(each.took_over for each in own)} of {UPGRADES * len(own)}"
    yield _spread(own, lambda each: each.stalls)
    yield _spread(own, lambda each: each.idle)
    yield _waits(own)
    yield _spread(own, lambda each: each.new_code)
    codes = [value for each in own for value in each.new_code]
    start = statistics.median(each.start for each in own)
    yield f"{statistics.median(codes) / start:.1f}" if codes else ""
    for version in ("broken", "hanging"):
        outages = [each.outages[version] for each in own if version in each.outages]
        silence = max((each.silence for each in outages), default=None)
        failed = sum(each.failed for each in outages)
        yield "" if silence is None else f"{silence:.2f} ({failed} failed)"
    yield f"{own[-1].before.fds} → {own[-1].after.fds}"
    yield f"{own[-1].before.memory:.0f} → {own[-1].after.memory:.0f}"


_WAITS = {
    WaitCause.PAUSE: "pause",
    WaitCause.OPENING: "first steps",
    WaitCause.CPU: "no CPU",
    WaitCause.OTHER: "other",
}


def _waits(own: Sequence[Result]) -> str:
    counted = {
        words: sum(each.waits.get(cause, 0) for each in own) for cause, words in _WAITS.items()
    }
    return ", ".join(f"{count} {words}" for words, count in counted.items() if count) or "0"


def _spread(own: Sequence[Result], values: Callable[[Result], Sequence[float]]) -> str:
    """The median, and the largest in brackets."""
    found = [value * 1000 for each in own for value in values(each)]
    return f"{statistics.median(found):.0f} ({max(found):.0f})" if found else ""


def _by_server(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    found = [(name, [each for each in results if each.server == name]) for name in SERVERS]
    return [(name, own) for name, own in found if own]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bars(
    title: str, results: Sequence[Result], values: Callable[[Result], Sequence[float]]
) -> str:
    """One bar a server: the median, and a line to the largest; as SVG."""
    rows = []
    for name, own in _by_server(results):
        if found := [value * 1000 for each in own for value in values(each)]:
            rows.append((SERVERS[name], statistics.median(found), max(found)))
    longest = max((largest for _, _, largest in rows), default=1.0)
    left, wide, high = 260, 420, 24
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + wide + 90}" height="{50 + high * len(rows)}"'
            ' font-family="sans-serif" font-size="13">'
        ),
        f'<text x="8" y="22" font-weight="bold">{title}: median, and the longest</text>',
    ]
    for number, (server, median, largest) in enumerate(rows):
        y = 40 + high * number
        colour = "#2a6fbb" if server.ours else "#8a8a8a"
        end = left + wide * largest / longest
        lines += [
            f'<text x="8" y="{y + 13}">{server.title}</text>',
            f'<rect x="{left}" y="{y}" width="{max(wide * median / longest, 1):.1f}" height="16" fill="{colour}"/>',
            f'<line x1="{left}" x2="{end:.1f}" y1="{y + 8}" y2="{y + 8}" stroke="{colour}"/>',
            f'<text x="{end + 6:.1f}" y="{y + 13}">{median:.0f} ({largest:.0f})</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"
