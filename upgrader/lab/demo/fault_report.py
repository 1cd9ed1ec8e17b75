# SPDX-License-Identifier: LGPL-2.1-or-later
"""Show what each fault did to the clients, as JSON and as a table for people."""

from collections.abc import Sequence

import msgspec

_TOLD = 150  # characters of an answer in the table; in the JSON there is all of it


class FaultRow(msgspec.Struct, frozen=True, kw_only=True):
    """One fault, played once. Counts are what the clients lost from before it until the next good
    version had gone in; `stall_ms` is the longest wait of any request.

    `caller_told` is what `upgrader upgrade` said, and `exit_code` how it ended; `then` is what the
    instance that served afterwards said of itself; `must_lose` says why
    something had to be lost, and is empty if nothing may be; `next_upgrade` is what was said of
    the good version that went in afterwards.
    """

    fault: str
    failed_requests: int
    broken_streams: int
    connections_lost: int
    state_errors: int
    stall_ms: float
    caller_told: str
    exit_code: int
    then: str
    must_lose: str
    next_upgrade: str
    next_upgrade_done: bool
    losses: list[str]

    @property
    def bad(self) -> bool:
        """Return whether the fault did what no fault may do."""
        lost = bool(
            self.failed_requests
            or self.broken_streams
            or self.connections_lost
            or self.state_errors
        )
        return (lost and not self.must_lose) or not self.next_upgrade_done or not self.caller_told


def to_json(rows: Sequence[FaultRow]) -> bytes:
    """Encode the rows as a list of objects."""
    return msgspec.json.encode(rows)


def table(rows: Sequence[FaultRow]) -> str:
    """Format the rows, two or three lines for each fault."""
    head = ("", "requests", "streams", "idle", "state", "stall")
    lines = [_line(*head), _line("", "lost", "lost", "lost", "errors", "")]
    for row in rows:
        counts = (row.failed_requests, row.broken_streams, row.connections_lost, row.state_errors)
        stall = f"{row.stall_ms:,.0f} ms".replace(",", " ")
        lines.append(_line(("! " if row.bad else "") + row.fault, *map(str, counts), stall))
        lines.append(f"      told: {_short(row.caller_told)}")
        if row.must_lose and any(counts):
            lines.append(f"      then: {_short(row.then)}")
            lines.append(f"      necessarily: {row.must_lose}")
        if not row.next_upgrade_done:
            lines.append(f"      THE NEXT VERSION DID NOT GO IN: {_short(row.next_upgrade)}")
        if row.bad:
            lines += [f"      {loss}" for loss in row.losses[:3]]
    bad = sum(row.bad for row in rows)
    verdict = (
        f"{bad} of {len(rows)} did what they must not (marked with !)."
        if bad
        else f"{len(rows)} faults; nothing was lost that could have been kept, and every caller was told."
    )
    return "\n".join([*lines, "", verdict])


def _line(name: str, *cells: str) -> str:
    return f"  {name:<38}" + "".join(f"{cell:>10}" for cell in cells)


def _short(text: str) -> str:
    return text if len(text) <= _TOLD else f"{text[: _TOLD - 1]}…"
