# SPDX-License-Identifier: LGPL-2.1-or-later
"""Paths of the exploration, played by the real interpreters over real sockets, event by event.

`Play` has a `LiveSource` and a `LiveDestination` at the two ends of a socket pair, a listener and a connection to move,
and looks after each move whether the real sides stand where the model does. Both are in this
process; a side that dies has its FDs closed. PID 1, takeover and the clock are played here.
"""

import contextlib
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from tests.unit.paths import Move, Path
from tests.unit.protocol import EARLY_ACK, Channel, Process, World, owns
from upgrader.codes import Code
from upgrader.errors import NotifyError, UpgradeError, VerifyError
from upgrader.instance.frozen import Built
from upgrader.instance.live_destination import LiveDestination
from upgrader.instance.live_source import LiveSource, MigrationRequest
from upgrader.protocol import channel, image, interpreter, ledger, records, table_pieces
from upgrader.protocol.channel import ReceivedImage
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import HasFileno, identify
from upgrader.protocol.kinds import Kind, Waiting
from upgrader.protocol.switchover import (
    DESTINATION,
    SOURCE,
    Destination,
    DestinationAction,
    Event,
    Source,
    SourceAction,
    Table,
)

#: Seconds without progress, and in all, on a clock that jumps.
LIMIT, TIMEOUT = 1000.0, 100_000.0
#: Seconds for a thread to do what it should have done long ago.
PATIENCE = 5.0
STREAM = records.VERSIONS[-1]


class Clock:
    """The time, with jumps."""

    def __init__(self) -> None:
        self.offset = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.offset


@dataclass
class DestinationProcess:
    """The destination as the source sees it."""

    on_kill: Callable[[], None]
    pid: int = 2
    alive: bool = True
    killed: bool = False

    def fileno(self) -> int:
        return self._end.fileno()

    def __post_init__(self) -> None:
        self._end, self._other = socket.socketpair()

    def kill(self) -> None:
        self.killed = True
        self.on_kill()

    def end(self) -> None:
        self.alive = False
        self._other.close()

    def close(self) -> None:
        self._end.close()
        self._other.close()


class Broken:
    """An FD that cannot be sent."""

    def fileno(self) -> int:
        return -1


def make_piece(number: int = 0) -> table_pieces.Piece:
    """A piece of a table."""
    writing = table_pieces.Writing(table_pieces.Head("played", "table", 1, 0))
    writing.add({"key": number}, ["gone"])
    return writing.seal()


class Here:
    """The instance of the source: implements `live_source.Steps` with two real backends."""

    def __init__(self, backends: list[socket.socket]) -> None:
        self.backends = backends
        self.fails: set[str] = set()
        self.on_resume: Callable[[], None] = lambda: None
        self.done: list[str] = []
        self.serving = True
        self.recording = False
        self.asked = threading.Event()
        self.answers: queue.SimpleQueue[UpgradeError | None] = queue.SimpleQueue()

    def record(self) -> None:
        self.recording = True

    def freeze(self) -> Built:
        self.serving = False
        if SourceAction.FREEZE in self.fails:
            raise OSError("out of FDs")
        entries = [
            image.ManifestEntry("door", Kind.LISTENER, identify(self.backends[0])),
            image.ManifestEntry(
                "door", Kind.CONNECTION, identify(self.backends[1]), 0,
                ConnectionState(Waiting.MESSAGE),
            ),
        ]  # fmt: skip
        fds: list[HasFileno] = [*self.backends]
        if SourceAction.SEND_IMAGE in self.fails:
            fds[1] = Broken()  # Hello goes out, and no more
        return Built(image.Manifest("played", 3, "1", 1, entries=entries), fds)

    def resume(self, code: Code, reason: str) -> None:
        assert reason
        self.on_resume()
        self.serving = True
        self.recording = False

    def retire(self) -> None:
        self.done.append(SourceAction.RETIRE)

    def insure(self) -> None:
        self._require_open()
        if SourceAction.INSURE in self.fails:
            raise OSError("out of FDs")
        self.done.append(SourceAction.INSURE)

    def name_successor(self, pid: int) -> None:
        self.asked.set()
        answer = self.answers.get(timeout=PATIENCE)
        self.asked.clear()
        if answer:
            raise answer

    def let_go(self) -> None:
        self.done.append(SourceAction.LET_GO)
        self.close()

    def park(self) -> None:
        self._require_open()
        self.done.append(SourceAction.PARK)

    def exit(self, *, failed: bool) -> None:
        assert failed == (SourceAction.PARK in self.done)
        self.done.append(SourceAction.EXIT)

    def wake(self) -> None:
        pass

    def close(self) -> None:
        for sock in self.backends:
            sock.close()

    def _require_open(self) -> None:
        for sock in self.backends:
            os.fstat(sock.fileno())


class There:
    """The instance of the destination."""

    def __init__(self) -> None:
        self.stream: ReceivedImage | None = None
        self.pieces = 0
        self.serving = False
        self.why: BaseException | None = None

    def load_piece(self, piece: Fd) -> None:
        with table_pieces.opened(piece, "played") as (head, _, frames):
            assert (head.field, 1) == ("table", len(list(frames)))
        self.pieces += 1

    def load(self, stream: ReceivedImage) -> None:
        manifest = image.unseal(stream.image)
        assert stream.announced == len(manifest.entries) == len(stream.fds)
        self.stream = stream

    def serve(self) -> None:
        self.serving = True

    def exit(self, error: BaseException) -> None:
        self.why = error

    def close(self) -> None:
        if self.stream:
            for fd in (self.stream.image, self.stream.ledger, *self.stream.fds):
                fd.close()


class Credulous(LiveSource):
    """A source that takes any Ack for the commit."""

    def _read(self, record: records.Record) -> Event:
        return Event.ACK if isinstance(record, records.Ack) else super()._read(record)


class Play:
    """One migration. `omit`: an action that its side does not perform, as "source.freeze"."""

    def __init__(
        self,
        source: Table[Source, SourceAction] = SOURCE,
        destination: Table[Destination, DestinationAction] = DESTINATION,
        omit: str = "",
        live_source: type[LiveSource] = LiveSource,
    ) -> None:
        self._clock = Clock()
        self._a, self._b = channel.pair()
        self._takeover, line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener = socket.create_server(("127.0.0.1", 0))
        self._client, connection = socket.socketpair()
        self.here = Here([listener, connection])
        self._inodes = [os.fstat(sock.fileno()).st_ino for sock in self.here.backends]
        self.there = There()
        self.process = DestinationProcess(self._end_destination)
        self.live_source = live_source(
            MigrationRequest(self._a, self.process, STREAM), self.here,
            limit=LIMIT, timeout=TIMEOUT, clock=self._clock,
        )  # fmt: skip
        self.live_destination = LiveDestination(
            self._b, line, timeout=TIMEOUT, on_exit=self.there.exit, clock=self._clock
        )
        self.live_destination.on_image = self.there.load
        self.live_destination.on_piece = self.there.load_piece
        self.live_destination.on_owner = self.there.serve
        self.live_destination._stream = STREAM  # as negotiated
        side, _, action = omit.partition(".")
        self.live_source.side = interpreter.source(
            _without(self.live_source, action if side == "source" else ""), source
        )
        self.live_destination.side = interpreter.destination(
            _without(self.live_destination, action if side == "destination" else ""), destination
        )
        self.here.on_resume = self._check_taken_back
        self._found: dict[str, Event | None] = {"source": None, "destination": None}
        self._line = line

    def close(self) -> None:
        for owner in (self._a, self._b, self._takeover, self._line, self._client, self.process):
            owner.close()
        self.here.close()
        self.there.close()
        if self.live_source._telling:
            self.here.answers.put(None)
            self.live_source._telling.join()
        self.live_source.hang_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def run(self, path: Path) -> None:
        """Play a path; raises AssertionError, or whatever a side raises, where one leaves it."""
        for move in path:
            self.here.fails = {str(op.what) for op in move.ops if op.who == "fails"}
            for who, what in move.ops:
                match who:
                    case "source":
                        self._source_sees(Event(what))
                    case "destination":
                        self._destination_sees(Event(what))
                    case "sends":
                        self._send(what)
            self._follow(move)
            self._compare(move)

    # Both sides

    def _source_sees(self, event: Event) -> None:
        found = self._found["source"] or self._find_for_source(event)
        assert found == event, f"the source sees {found}, not {event}"
        extends = event is Event.PROGRESS and self.live_source.state is Source.FROZEN
        self._clock.offset += LIMIT * 0.6 if extends else 0
        self._found["source"] = self.live_source.side.feed(found)
        if extends and not _readable(self._a):
            self._check_extended()

    def _find_for_source(self, event: Event) -> Event:
        committed = self.live_source.state is Source.COMMITTED
        match event:
            case Event.GO | Event.COPY:
                item = channel.receive(self._a, peek=False)
                assert item is not None
                assert item[0] == records.Go()
                return event
            case Event.DRAINED | Event.STOP | Event.COPIED:
                return event
            case Event.PIECE:
                self.live_source.piece = made = make_piece()
                if SourceAction.SEND_PIECE in self.here.fails:
                    made.memfd.close()
                return event
            case Event.NAMED | Event.UNANSWERED | Event.SUCCESSOR_DEAD if committed:
                if not self.live_source.told.done():
                    error = NotifyError("no answer") if event is Event.UNANSWERED else None
                    self.here.answers.put(error)
                return self.live_source.told.result(PATIENCE)
            case Event.SUCCESSOR_DEAD if _readable(self._a):
                return self.live_source._ended(event)  # seen before what has come meanwhile
            case Event.DEADLINE:
                copying = self.live_source.state is Source.COPYING
                self._clock.offset += TIMEOUT if copying else LIMIT + 1
        if event not in (Event.DEADLINE, Event.SUCCESSOR_DEAD):
            assert _readable(self._a), f"nothing comes, and no {event}"
        return self.live_source.next_event()

    def _check_extended(self) -> None:
        """After a sign of life the deadline is a whole limit away."""
        self._clock.offset += LIMIT * 0.6
        alive, self.process.alive = self.process.alive, False
        assert (
            self.live_source.next_event() is Event.SUCCESSOR_DEAD
        )  # else it would be the deadline
        self.process.alive = alive
        self.live_source.reason = ""

    def _check_taken_back(self) -> None:
        """Before the source serves, its image is worth nothing, whoever may have it."""
        assert not self.live_source._ledger or ledger.is_taken_back(self.live_source._ledger)

    def _destination_sees(self, event: Event) -> None:
        if event is Event.REFUSED:
            self.live_destination.refuse(VerifyError("no"))
            return
        found = self._found["destination"] or self._find_for_destination(event)
        assert found == event, f"the destination sees {found}, not {event}"
        self._found["destination"] = self.live_destination.side.feed(found)

    def _find_for_destination(self, event: Event) -> Event:
        match self.live_destination.state:
            case Destination.PREPARING:
                return event  # by the negotiation
            case Destination.LOADING:
                return self.live_destination.loaded()
            case Destination.ASKING:
                self._clock.offset += TIMEOUT
            case _:
                assert _readable(self._b) or event is Event.TAKEOVER_GONE
        return self.live_destination.next_event()

    def _send(self, what: str) -> None:
        data = {
            "progress": records.encode(records.Progress(1), STREAM),
            "junk": b"x" * records.RECORD_SIZE,
            EARLY_ACK: records.encode(records.Ack(3, 1), STREAM),
        }
        self._b.send(data[what])

    # The world

    def _follow(self, move: Move) -> None:
        """Let happen what the others do."""
        world = move.world
        if world.takeover.process is not Process.UP:
            self._takeover.close()
        elif not world.takeover.line:
            with contextlib.suppress(OSError):
                self._takeover.shutdown(socket.SHUT_WR)
        if "source: kill" in move.texts:
            assert self.process.killed
        if world.destination.process is not Process.UP:
            self._end_destination()
        if world.source.process is not Process.UP:
            self._a.close()
            self.here.close()
        elif "source: no Go, kills" in move.texts:
            self._a.close()

    def _end_destination(self) -> None:
        self.process.end()
        self._b.close()
        self._line.close()
        self.there.close()

    def _compare(self, move: Move) -> None:
        """Both sides stand where the model does, and the owner has everything, and it works."""
        world = move.world
        here, there = world.source, world.destination
        if here.process is Process.UP and not here.todo:
            if here.naming:
                assert self.here.asked.wait(PATIENCE), "nobody tells PID 1"
                insured = SourceAction.INSURE in self.here.done
                assert insured or "no insurance" in world.history
            assert here.at is self.live_source.state
            assert here.serving is self.here.serving
            if here.at in (Source.SERVING, Source.COPYING):
                assert self.here.recording is (here.at is Source.COPYING)
            assert here.retired is (SourceAction.RETIRE in self.here.done)
            assert here.let_go is (SourceAction.LET_GO in self.here.done)
            assert (here.channel is Channel.CLOSED) is (self._a.fileno() < 0)
        if self.live_source.state is Source.PARKED:
            assert [SourceAction.PARK, SourceAction.EXIT] == self.here.done[-2:]
        if any(op.what in (Event.DRAINED, Event.STOP) for op in move.rows):
            assert SourceAction.EXIT in self.here.done
        if there.process is Process.UP and not there.todo:
            assert there.at is self.live_destination.state
            assert there.ended or there.serving is self.there.serving
        if "destination: load-piece" in move.texts:
            assert self.there.pieces == 1
        if there.at is Destination.LOADING:
            assert self.there.stream
        if "destination: exits" in move.texts and self.live_destination.state is Destination.FAILED:
            assert self.there.why
        self._check_owners(world)

    def _check_owners(self, world: World) -> None:
        assert not (self.here.serving and self.there.serving and world.source.serving)
        owners = owns(world)
        if "source" in owners:
            self._check_open(self.here.backends, serves=self.here.serving)
        if "destination" in owners:
            assert self.there.stream
            self._check_open(self.there.stream.fds, serves=self.there.serving)

    def _check_open(self, backends: Sequence[HasFileno], *, serves: bool) -> None:
        assert self._inodes == [os.fstat(each.fileno()).st_ino for each in backends]
        if serves:
            os.write(backends[1].fileno(), b"x")
            assert self._client.recv(1) == b"x"


def _without(performer: Any, action: str) -> Any:
    """A performer that does not do one of its actions."""
    if not action:
        return performer

    class Omits:
        def __getattr__(self, name: str) -> object:
            return (lambda: None) if name == action else getattr(performer, name)

    return Omits()


def _readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
