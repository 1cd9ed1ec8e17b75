# SPDX-License-Identifier: LGPL-2.1-or-later
"""The source of a live migration: performs what the table says over a channel, and finds events.

It starts and supervises no process; that is `takeover`. What an action means for the instance is
in its `Steps`.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from upgrader.codes import Code
from upgrader.errors import BusyWork, UpgradeError
from upgrader.instance.frozen import Built
from upgrader.instance.successor import SuccessorProcess, first_ready
from upgrader.protocol import channel, image, interpreter, ledger, records
from upgrader.protocol.fd import Fd
from upgrader.protocol.switchover import Event, Source
from upgrader.protocol.table_pieces import Piece

#: Seconds before PID 1 is told once more who its main process is.
_AGAIN = 0.1
_log = logging.getLogger("upgrader")


@dataclass(frozen=True, slots=True)
class MigrationRequest:
    """A destination that is ready: its channel after Go, and the version of the stream there."""

    sock: socket.socket
    successor: SuccessorProcess
    stream: int


class Steps(Protocol):
    """What the actions of the table mean for the instance. Between `freeze` and `resume` or
    `retire` nothing else of it may run."""

    def record(self) -> None:
        """From here on, record what changes in tables."""

    def freeze(self) -> Built:
        """Take everything to the image; raises UpgradeError or OSError, and nothing has changed."""

    def resume(self, code: Code, reason: str) -> None:
        """Serve as before: nothing was given away, for this reason."""

    def retire(self) -> None:
        """Write no state and touch nothing that has moved, but keep it open; drain the rest."""

    def insure(self) -> None:
        """In a thread: leave a duplicate with PID 1; raises UpgradeError or OSError."""

    def name_successor(self, pid: int) -> None:
        """In a thread: have PID 1 take this process for the main one; raises UpgradeError if it
        has not confirmed that."""

    def let_go(self) -> None:
        """Close what has moved."""

    def park(self) -> None:
        """Leave all that was given away with PID 1; raises UpgradeError or OSError."""

    def exit(self, *, failed: bool) -> None:
        """End the process soon."""

    def wake(self) -> None:
        """Called every `beat` seconds while frozen: WatchdogSec= goes on."""


class LiveSource:
    """The source's side of one migration. `side.feed` takes one event; `next_event` waits for it."""

    def __init__(
        self,
        request: MigrationRequest,
        steps: Steps,
        *,
        limit: float,
        timeout: float,
        beat: float = float("inf"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit`: seconds without progress that are too many; `timeout`: seconds in all; `beat`:
        seconds between two calls of `steps.wake`."""
        self._request = request
        self._sock = request.sock
        self._steps = steps
        self._limit = limit
        self._beat = beat
        self._clock = clock
        self._timeout = timeout
        self._last = clock() + timeout
        self._deadline = min(self._last, clock() + limit)
        self.piece: Piece | None = None  #: the next to be sent
        self._pieces = self._loaded = 0  # that are sent, and that the destination has loaded
        self._built: Built | None = None
        self._sent: records.Ack | None = None  # what acknowledges the image, once all of it is out
        self._ledger: Fd | None = None
        self._telling: threading.Thread | None = None
        self.told: Future[Event] = Future()  #: what came of the last naming
        self.side = interpreter.source(self)
        self.code = Code.UNKNOWN
        self.reason = ""  #: why it gave up; the first one, unless the destination says it

    @property
    def state(self) -> Source:
        """Where the source stands."""
        return self.side.state

    @property
    def successor_lives(self) -> bool:
        """Whether the process of the destination runs."""
        return self._request.successor.alive

    def give(self) -> Source:
        """From Go to the decision; returns SERVING or COMMITTED. Nothing else of the instance may
        run meanwhile."""
        event = Event.COPIED if self.state is Source.COPYING else Event.GO
        while True:
            found = self.side.feed(event)
            if self.state not in (Source.FROZEN, Source.DECIDING):
                return self.state
            event = found or self.next_event()

    def settle(self) -> None:
        """From the commit on: wait until PID 1 has answered."""
        while self.state is Source.COMMITTED:
            self.side.feed(self.next_event())

    def next_event(self) -> Event:
        """Wait for what happens next: on the channel, to the destination, or at PID 1."""
        if self.state is Source.COMMITTED:
            return self.told.result()
        while (event := self.look()) is None:
            left = self._deadline - self._clock()
            first_ready(min(left, self._beat), self._sock, self._request.successor)
            self._steps.wake()
        return event

    def look(self) -> Event | None:
        """What has happened on the channel or to the destination, if anything has."""
        # Also where something has come: a destination must not hold this one by talking.
        waits = self.state is Source.FROZEN or (self.state is Source.COPYING and self.in_flight)
        if waits and self._deadline <= self._clock():
            why = f"no progress within {self._limit:.1f} s"
            if self.state is Source.COPYING:
                why = "its tables are not loaded within half of migration-timeout"
            return self._because(Event.DEADLINE, Code.NOT_READY_IN_TIME, why)
        if not first_ready(0, self._sock):
            # A process that it has forked may hold the channel open: no end is to be seen.
            alive = self._request.successor.alive
            return None if alive else self._ended(Event.SUCCESSOR_DEAD)
        try:
            item = channel.receive(self._sock, peek=False)
        except UpgradeError as error:
            if isinstance(error.__cause__, ConnectionError):  # closed, and not all of ours read
                return self._ended(Event.HANGUP)
            # Not a hang-up: an Ack may follow, until the channel is shut.
            return self._because(Event.UNREADABLE, Code.UNKNOWN, str(error))
        if item is None:
            return self._ended(Event.HANGUP)
        record, fds = item
        for fd in fds:
            fd.close()
        return self._read(record)

    @property
    def in_flight(self) -> int:
        """How many pieces of tables the destination has not loaded yet."""
        return self._pieces - self._loaded

    def _read(self, record: records.Record) -> Event:
        match record:
            case records.Ack():
                if self._sent and (self._request.stream == 1 or record == self._sent):
                    return Event.ACK
                why = "the destination acknowledges what it was not sent"
                return self._because(Event.UNREADABLE, Code.UNKNOWN, why)
            case records.Progress(loaded):
                if self.state is Source.COPYING:
                    if not self._loaded < loaded <= self._pieces:
                        why = f"the destination has loaded {loaded} pieces of {self._pieces}"
                        return self._because(Event.UNREADABLE, Code.UNKNOWN, why)
                    self._loaded = loaded
                return Event.PROGRESS
            case records.Abort(reason, code):
                self.reason = reason
                self.code = Code(code)
                return Event.ABORT
        why = f"{type(record).__name__} is no record for a source"
        return self._because(Event.UNREADABLE, Code.UNKNOWN, why)

    # The actions

    def record(self) -> Event | None:
        """RECORD."""
        self._steps.record()
        return self.extend()

    def send_piece(self) -> Event | None:
        """SEND_PIECE: it waits for nothing, as the instance serves."""
        assert self.piece
        if not self.in_flight:
            self.extend()
        try:
            self._send_piece(self.piece)
        except (UpgradeError, OSError) as error:
            return self.not_sent(error)
        return None

    def not_sent(self, error: Exception) -> Event:
        """What it means that a piece could not be made or sent."""
        return self._because(Event.NOT_SENT, Code.SOURCE_FAILED, str(error))

    def freeze(self) -> Event | None:
        """FREEZE: nothing can be sent if that fails."""
        self._last = self._clock() + self._timeout
        self.extend()
        try:
            self._built = self._steps.freeze()
        except (UpgradeError, OSError) as error:
            code = Code.BUSY_WORK if isinstance(error, BusyWork) else Code.SOURCE_FAILED
            return self._because(Event.NOT_SENT, code, str(error))
        return None

    def send_image(self) -> Event | None:
        """SEND_IMAGE, within the limit; from its end on the destination has as long again."""
        assert self._built
        manifest = self._built.manifest
        try:
            self._ledger = ledger.new_ledger()
            self._sock.settimeout(self._limit)
            for piece in self._built.pieces:
                self._send_piece(piece, wait=True)
            with image.seal(self._built.whole()) as memfd:
                checksum = image.checksum(memfd)
                channel.send_image(
                    self._sock,
                    manifest.generation,
                    memfd,
                    self._ledger,
                    self._built.fds,
                    version=self._request.stream,
                    limit=self._limit,
                    timeout=self._last - self._clock(),
                    crowds=[each.numbers for each in self._built.crowds],
                )
        except (UpgradeError, OSError) as error:
            return self.not_sent(error)
        finally:
            self._built.forget_secrets()
        self._sent = records.Ack(manifest.generation, checksum)
        return self.extend()

    def extend(self) -> Event | None:
        """EXTEND: the limit counts anew, `timeout` does not; it is half of that while nobody waits."""
        limit = self._timeout / 2 if self.state is Source.COPYING else self._limit
        self._deadline = min(self._last, self._clock() + limit)
        return None

    def shut(self) -> Event | None:
        """SHUT: what is queued is still read."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
        return None

    def kill(self) -> Event | None:
        """KILL."""
        self._request.successor.kill()
        return None

    def take_back(self) -> Event | None:
        """TAKE_BACK; where nothing was sent, there is nothing to take back."""
        if self._ledger:
            ledger.take_back(self._ledger)
        return None

    def resume(self) -> Event | None:
        """RESUME."""
        self._steps.resume(self.code, self.reason)
        return None

    def hang_up(self) -> Event | None:
        """HANG_UP."""
        self._close()
        return None

    def retire(self) -> Event | None:
        """RETIRE."""
        self._steps.retire()
        return None

    def insure(self) -> Event | None:
        """INSURE, in a thread: what is drained here does not wait for PID 1."""
        self._in_turn(self._insure)
        return None

    def name_successor(self) -> Event | None:
        """NAME_SUCCESSOR, in a thread: `told` will have what came of it."""
        told, again = Future[Event](), self.told.done()
        self.told = told
        self._in_turn(lambda: self._name(told, again=again))
        return None

    def let_go(self) -> Event | None:
        """LET_GO."""
        self._steps.let_go()
        return None

    def park(self) -> Event | None:
        """PARK; if that fails, the insurance is what is left."""
        try:
            self._steps.park()
        except (UpgradeError, OSError) as error:
            _log.error("nothing could be parked: %s", error)
        return None

    def exit(self) -> Event | None:
        """EXIT; to PID 1 it is a failure if nobody is left to serve."""
        self._close()
        self._steps.exit(failed=self.state is Source.PARKED)
        return None

    # Inside

    def _send_piece(self, piece: Piece, *, wait: bool = False) -> None:
        record = records.TablePiece(self._pieces)
        channel.send(self._sock, record, [piece.memfd], version=self._request.stream, wait=wait)
        self._pieces += 1

    def _close(self) -> None:
        self._sock.close()
        if self._ledger:
            self._ledger.close()

    def _in_turn(self, call: Callable[[], None]) -> None:
        """In a thread, after what was begun before."""
        before = self._telling

        def work() -> None:
            if before:
                before.join()
            call()

        self._telling = threading.Thread(target=work, name="upgrader-naming", daemon=True)
        self._telling.start()

    def _insure(self) -> None:
        try:
            self._steps.insure()
        except (UpgradeError, OSError) as error:
            _log.warning("no insurance: %s", error)

    def _name(self, told: Future[Event], *, again: bool) -> None:
        successor = self._request.successor
        if again:
            time.sleep(_AGAIN)
        try:
            if successor.alive:
                self._steps.name_successor(successor.pid)
            # Dead before it was named, PID 1 has refused it, and says nothing of that.
            told.set_result(Event.NAMED if successor.alive else Event.SUCCESSOR_DEAD)
        except UpgradeError as error:
            _log.error("%s", error)
            told.set_result(Event.UNANSWERED)
        except BaseException as error:
            told.set_exception(error)

    def _ended(self, event: Event) -> Event:
        return self._because(event, Code.ENDED_EARLY, "the destination has ended")

    def _because(self, event: Event, code: Code, reason: str) -> Event:
        if not self.reason:
            self.code, self.reason = code, reason
        return event
