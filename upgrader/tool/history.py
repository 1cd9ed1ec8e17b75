# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read the upgrades of a unit from the structured fields of the journal.

Each side of an upgrade has an entry of its own, and takeover has one if it fails: `upgrades` puts
together what belongs together.
"""

import contextlib
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import msgspec

from upgrader.codes import Code
from upgrader.systemd import journal
from upgrader.systemd.journal import JournalOutcome
from upgrader.systemd.unit import Unit
from upgrader.tool.journal_fields import (
    namespaces,
    of_line,
    of_owners,
    of_unit,
    seconds,
    whole,
    whole_or,
)

_SECONDS = 10
_FIELDS = (
    "MESSAGE", "PRIORITY", "UPGRADER_GENERATION", "UPGRADER_SIDE", "UPGRADER_PHASE",
    "UPGRADER_OUTCOME", "UPGRADER_MODE", "UPGRADER_SOURCE", "UPGRADER_DESTINATION",
    "UPGRADER_PAUSE_USEC", "UPGRADER_SECONDS", "UPGRADER_FDS", "UPGRADER_BYTES",
    "UPGRADER_LEFT_BEHIND", "UPGRADER_TIMES", "UPGRADER_ID", "UPGRADER_CODE", "UPGRADER_REASON",
    "UPGRADER_PREFLIGHT", "UPGRADER_PID", "_PID",
)  # fmt: skip


#: What each side says of an upgrade; the journal has more under the same MESSAGE_ID=.
_PHASES = ("migrate", "load", "park", "upgrade", "attach")


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One entry: what one side of a migration said, in its own words and in numbers.

    `time`: seconds since the epoch, at its end; `times`: seconds that each phase took; `id` and
    `code` are of the upgrade, empty if nobody said them; `pid` is the destination's.
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
    code: str = ""
    reason: str = ""
    preflight: bool = False
    pid: int = 0

    @property
    def done(self) -> bool:
        """Whether this side did what it should."""
        return self.outcome == JournalOutcome.DONE

    @property
    def loads(self) -> bool:
        """Whether a destination says that it is the owner."""
        return self.side == "destination" and self.done


class PastResult(StrEnum):
    """How an upgrade of the past ended."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PASSED = "passed"  #: a preflight: the new version would have taken over
    PARKED = "parked"  #: a restart whose other half is not known


@dataclass(frozen=True, slots=True)
class PastUpgrade:
    """One upgrade, or one start, of all that was said of it.

    `kind` is the mode, "preflight", or "start"; `source` and `destination` are generations, 0 if there
    is none. `time` is seconds since the epoch, at its end; `seconds`, `pause` and `times` as of the
    events. The pause is that of the destination, which knows when it was ready.
    """

    time: float
    kind: str
    result: PastResult
    source: int
    destination: int
    seconds: float
    pause: float
    fds: int
    bytes: int
    left_behind: int
    reason: str
    times: tuple[tuple[str, float], ...]
    events: tuple[HistoryEvent, ...]

    def generations(self, arrow: str) -> str:
        """From which to which, as far as it came."""
        numbers = [str(each) for each in (self.source, self.destination) if each]
        if self.result is not PastResult.DONE:
            numbers = numbers[:1]
        return f" {arrow} ".join(numbers)


def read(unit: Unit, count: int, *, user: bool = False) -> list[HistoryEvent]:
    """The last `count` events of a unit, oldest first; none where the journal cannot be read.

    Believed are the processes of the unit, its user, and root: anybody may write such fields.
    """
    event = (f"MESSAGE_ID={journal.MESSAGE_ID}", f"UPGRADER_UNIT={unit.id}")
    command = [
        "journalctl", "-q", "--no-pager", "--all", "-o", "json", "-n", str(count),
        f"--output-fields={','.join(_FIELDS)}", *(["--user"] if user else []),
        *namespaces(unit), *event, *of_unit(unit, user), "+", *event, *of_owners(unit, user),
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
                code=raw.get("UPGRADER_CODE", ""),
                reason=raw.get("UPGRADER_REASON", ""),
                preflight=bool(raw.get("UPGRADER_PREFLIGHT", "")),
                pid=_destination(raw),
            )


def upgrades(events: Sequence[HistoryEvent]) -> list[PastUpgrade]:
    """The upgrades and starts among these events, oldest first; in linear time but for sorting."""
    rows = _Rows()
    for event in events:
        if event.phase in _PHASES:
            rows.add(event)
    return sorted((_past(row) for row in rows.rows), key=lambda each: each.time)


class _Rows:
    """Puts each event into the newest row that it belongs to, else into a row of its own.

    A restart has no id that both sides know; an older library tells none at all. A new version that
    fails says so before it knows what it is: that is told by its process.
    """

    def __init__(self) -> None:
        self.rows: list[list[HistoryEvent]] = []
        self._by_id: dict[str, int] = {}
        self._by_pid: dict[int, int] = {}
        self._early: set[int] = set()  # rows of versions that failed early
        self._attached: dict[int, int] = {}  # by PID, such rows
        self._halves: dict[tuple[bool, int, bool], list[int]] = {}

    def add(self, event: HistoryEvent) -> None:
        """Find its row, or make one."""
        attached = event.phase == "attach"
        known = self._by_pid if attached else self._attached
        found = [self._by_id.get(event.id, -1) if event.id else -1]
        found.append(known.get(event.pid, -1) if event.pid else -1)
        if not attached:
            found += (self._other_half(key) for key in _wanted(event))
        number = max(found)
        if number < 0:
            number = len(self.rows)
            self.rows.append([])
            if not attached and (key := _offered(event)):
                self._halves.setdefault(key, []).append(number)
        row = self.rows[number]
        row.append(event)
        self._by_id[event.id] = max(number, self._by_id.get(event.id, -1))
        self._by_pid[event.pid] = max(number, self._by_pid.get(event.pid, -1))
        news = [event] if number in self._early else row
        if attached:
            self._early.add(number)
        if number in self._early:
            for each in news:
                self._attached[each.pid] = max(number, self._attached.get(each.pid, -1))

    def _other_half(self, key: tuple[bool, int, bool]) -> int:
        """The newest row that is still half an upgrade."""
        waiting = self._halves.get(key, [])
        while waiting and len(self.rows[waiting[-1]]) > 1:
            waiting.pop()
        return waiting[-1] if waiting else -1


def _offered(event: HistoryEvent) -> tuple[bool, int, bool] | None:
    """What half of an upgrade that is done it is: whether of the source, the generation of that, and
    whether it has an id; None if it is none."""
    if event.side == "source" and event.done and not event.preflight:
        return True, event.generation, bool(event.id)
    return (False, event.source, bool(event.id)) if event.loads else None


def _wanted(event: HistoryEvent) -> list[tuple[bool, int, bool]]:
    """What its other half would be; of two that have ids, these decide."""
    if (own := _offered(event)) is None:
        return []
    source, generation, has_id = own
    return [(not source, generation, other) for other in (False, True) if not (has_id and other)]


def _past(row: Sequence[HistoryEvent]) -> PastUpgrade:
    loaded = next((each for each in row if each.loads), None)
    source = next((each for each in row if each.side == "source"), None)
    told = source or row[0]
    numbers = loaded or told
    preflight = any(each.preflight for each in row)
    failed = next((each for each in row if not each.done), told)
    return PastUpgrade(
        time=max(each.time for each in row),
        kind=_kind(numbers, preflight=preflight),
        result=_result(row, told, loaded),
        source=numbers.source or (told.generation if told.side != "destination" else 0),
        destination=numbers.destination or (loaded.generation if loaded else 0),
        seconds=told.seconds or numbers.seconds,
        pause=numbers.pause,
        fds=numbers.fds,
        bytes=numbers.bytes,
        left_behind=numbers.left_behind,
        reason=(told.reason or failed.reason or failed.message).partition("\n")[0],
        times=told.times,
        events=tuple(row),
    )


def _kind(numbers: HistoryEvent, *, preflight: bool) -> str:
    if preflight:
        return "preflight"
    if numbers.mode:
        return numbers.mode
    if numbers.side == "takeover":
        return "live"
    return "start" if numbers.loads else "restart"


def _result(
    row: Sequence[HistoryEvent], told: HistoryEvent, loaded: HistoryEvent | None
) -> PastResult:
    if loaded:
        return PastResult.DONE
    if any(each.code == Code.CANCELLED for each in row):
        return PastResult.CANCELLED
    if any(each.code == Code.PREFLIGHT_PASSED for each in row):
        return PastResult.PASSED
    if not told.done:
        return PastResult.FAILED
    return PastResult.PARKED if told.phase == "park" else PastResult.DONE


def encode(events: list[HistoryEvent]) -> bytes:
    """A list of objects."""
    values = [{**msgspec.to_builtins(event), "times": dict(event.times)} for event in events]
    return msgspec.json.encode(values)


def _destination(raw: dict[str, str]) -> int:
    """The process of the new instance: who writes, or whom the source names."""
    name = {"destination": "_PID", "source": "UPGRADER_PID"}.get(raw["UPGRADER_SIDE"], "")
    return whole_or(raw.get(name, ""), 0)


def _times(text: str) -> Iterator[tuple[str, float]]:
    for word in text.split():
        name, _, took = word.partition("=")
        yield name, seconds(took)
