# SPDX-License-Identifier: LGPL-2.1-or-later
"""The upgrades of a unit as the journal has them, from the structured fields; changes nothing."""

import contextlib
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import msgspec

from upgrader.systemd import journal
from upgrader.systemd.unit import Unit
from upgrader.tool.journal_fields import of_line, of_owners, of_unit, seconds, whole

_SECONDS = 10
_FIELDS = (
    "MESSAGE", "PRIORITY", "UPGRADER_GENERATION", "UPGRADER_SIDE", "UPGRADER_PHASE",
    "UPGRADER_OUTCOME", "UPGRADER_MODE", "UPGRADER_SOURCE", "UPGRADER_DESTINATION",
    "UPGRADER_PAUSE_USEC", "UPGRADER_SECONDS", "UPGRADER_FDS", "UPGRADER_BYTES",
    "UPGRADER_LEFT_BEHIND", "UPGRADER_TIMES", "UPGRADER_ID",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One entry: what one side of a migration said, in its own words and in numbers.

    `time`: seconds since the epoch, at its end; `times`: seconds that each phase took.
    """

    time: float
    generation: int
    side: str
    phase: str
    outcome: str
    message: str
    mode: str = ""
    source: int = 0
    destination: int = 0
    pause: float = 0.0
    seconds: float = 0.0
    fds: int = 0
    bytes: int = 0
    left_behind: int = 0
    id: str = ""
    times: tuple[tuple[str, float], ...] = ()


def read(unit: Unit, count: int, *, user: bool = False) -> list[HistoryEvent]:
    """The last `count` events of a unit, oldest first; none where the journal cannot be read.

    Believed are the processes of the unit, its user, and root: anybody may write such fields.
    """
    event = (f"MESSAGE_ID={journal.MESSAGE_ID}", f"UPGRADER_UNIT={unit.id}")
    command = [
        "journalctl", "-q", "--no-pager", "--all", "-o", "json", "-n", str(count),
        f"--output-fields={','.join(_FIELDS)}", *(["--user"] if user else []),
        *event, *of_unit(unit, user), "+", *event, *of_owners(unit, user),
    ]  # fmt: skip
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS, check=True
        )
        return agreed(parse(done.stdout.decode(errors="replace").splitlines()))
    return []


def agreed(events: Iterable[HistoryEvent]) -> list[HistoryEvent]:
    """The same events with one pause for each upgrade: only the destination knows when it is over."""
    events = list(events)
    pauses = {each.id: each.pause for each in events if each.id and each.side == "destination"}
    return [replace(each, pause=pauses.get(each.id, each.pause)) for each in events]


def parse(lines: Iterable[str]) -> Iterator[HistoryEvent]:
    """Events from `journalctl -o json`; what is none is skipped."""
    for line in lines:
        with contextlib.suppress(ValueError, KeyError):
            raw = of_line(line)

            def number(name: str, raw: dict[str, str] = raw) -> int:
                return whole(raw.get(f"UPGRADER_{name}", "0"))

            yield HistoryEvent(
                time=whole(raw["__REALTIME_TIMESTAMP"]) / 1e6,
                generation=number("GENERATION"),
                side=raw["UPGRADER_SIDE"],
                phase=raw["UPGRADER_PHASE"],
                outcome=raw["UPGRADER_OUTCOME"],
                message=raw.get("MESSAGE", ""),
                mode=raw.get("UPGRADER_MODE", ""),
                source=number("SOURCE"),
                destination=number("DESTINATION"),
                pause=number("PAUSE_USEC") / 1e6,
                seconds=seconds(raw.get("UPGRADER_SECONDS", "0")),
                fds=number("FDS"),
                bytes=number("BYTES"),
                left_behind=number("LEFT_BEHIND"),
                id=raw.get("UPGRADER_ID", ""),
                times=tuple(_times(raw.get("UPGRADER_TIMES", ""))),
            )


def encode(events: list[HistoryEvent]) -> bytes:
    """A list of objects."""
    values = [{**msgspec.to_builtins(event), "times": dict(event.times)} for event in events]
    return msgspec.json.encode(values)


def _times(text: str) -> Iterator[tuple[str, float]]:
    for word in text.split():
        name, _, took = word.partition("=")
        yield name, seconds(took)
