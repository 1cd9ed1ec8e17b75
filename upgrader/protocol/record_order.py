# SPDX-License-Identifier: LGPL-2.1-or-later
"""One migration seen from either side: which record may come when; does no IO.

Rules: all legal steps are in TRANSITIONS; this module knows neither sockets nor systemd, nor which
carrier (a live peer, PID 1, an `execve`) takes the stream. `upgrade` is the operator's view.
"""

from collections.abc import Iterator
from enum import StrEnum

from upgrader.errors import ProtocolError
from upgrader.protocol.records import HELLO_FDS, MAX_FDS, End, EndReason, Fds, Hello, Record


class StreamPhase(StrEnum):
    """How far the stream has come."""

    SETUP = "setup"  #: nothing yet
    ACTIVE = "active"  #: image known, FDs are coming
    COMPLETED = "completed"  #: the source has said that this was all


TRANSITIONS: dict[tuple[StreamPhase, type], StreamPhase] = {
    (StreamPhase.SETUP, Hello): StreamPhase.ACTIVE,
    (StreamPhase.ACTIVE, Fds): StreamPhase.ACTIVE,
    (StreamPhase.ACTIVE, End): StreamPhase.COMPLETED,
}


def batches(fds: int, sent: int = 0) -> Iterator[Fds]:
    """The batches in which `fds` FDs are sent, from number `sent` on."""
    for first in range(sent, fds, MAX_FDS):
        yield Fds(first, min(MAX_FDS, fds - first))


class Incoming:
    """The destination's view: checks each record against the rules and the promise of Hello."""

    def __init__(self) -> None:
        self.phase = StreamPhase.SETUP
        self.hello = Hello(generation=0, fds=0)
        self.received = 0
        self.end: End | None = None

    def receive(self, record: Record, fds: int) -> None:
        """Take one record that came with `fds` FDs; raises ProtocolError, changing nothing."""
        step = self.phase, type(record)
        if step not in TRANSITIONS:
            raise ProtocolError(type(record).__name__, f"unexpected in phase {self.phase}")
        match record:
            case Hello():
                if record.generation < 1 or record.fds < 0:
                    raise ProtocolError("Hello", f"{record.generation=} {record.fds=}")
                self._require("Hello", fds, HELLO_FDS)
                self.hello = record
            case Fds():
                item = f"FDs {record.first} to {record.first + record.count - 1}"
                if record.first != self.received or not 0 < record.count <= MAX_FDS:
                    raise ProtocolError(item, f"expected to start at {self.received}")
                if self.received + record.count > self.hello.fds:
                    raise ProtocolError(item, f"too many: {self.hello.fds} were announced")
                self._require(item, fds, record.count)
                self.received += record.count
            case End():
                self._require("End", fds, 0)
                short = record.sent < self.hello.fds
                if record.sent != self.received or short == (record.reason is EndReason.COMPLETE):
                    raise ProtocolError(
                        "End",
                        f"says {record.sent} FDs, {record.reason}; {self.received} came"
                        f" of {self.hello.fds}",
                    )
                self.end = record
        self.phase = TRANSITIONS[step]

    @staticmethod
    def _require(item: str, came: int, expected: int) -> None:
        if came != expected:
            raise ProtocolError(item, f"came with {came} FDs instead of {expected}")
