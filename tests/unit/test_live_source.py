# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a source makes of what comes over its channel, and for which Ack it commits."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.unit.played import DestinationProcess, Here
from tests.unit.units import Keeping
from upgrader.codes import Code
from upgrader.instance.control_answers import Negotiation
from upgrader.instance.live_source import LiveSource, MigrationRequest
from upgrader.instance.offer import common_stream
from upgrader.instance.self_report import SelfReport
from upgrader.protocol import channel, image, interpreter, records
from upgrader.protocol.ledger import new_ledger
from upgrader.protocol.switchover import DestinationAction, Event, Source, SourceAction
from upgrader.protocol.varlink import VarlinkError

LIMIT = 20.0


class Bench:
    """A source, and the other end of its channel."""

    def __init__(self, stream: int) -> None:
        self.source, self.peer = channel.pair()
        self.client, connection = socket.socketpair()
        self.here = Here([socket.create_server(("127.0.0.1", 0)), connection])
        self.process = DestinationProcess(lambda: None)
        self.clock = 0.0
        self.stream = stream
        self.live_source = LiveSource(
            MigrationRequest(self.source, self.process, stream), self.here,
            limit=LIMIT, timeout=10 * LIMIT, clock=lambda: self.clock,
        )  # fmt: skip

    def say(self, *records: records.Record) -> None:
        for record in records:
            channel.send(self.peer, record, version=self.stream)

    def expected(self) -> records.Ack:
        """The Ack for the image that will be sent."""
        with image.seal(self.here.freeze().manifest) as memfd:
            return records.Ack(3, image.checksum(memfd))

    def close(self) -> None:
        if self.live_source._telling:
            self.here.answers.put(None)
            self.live_source.settle()
        self.live_source.hang_up()
        for owner in (self.source, self.peer, self.client, self.process, self.here):
            owner.close()


@pytest.fixture
def make() -> Iterator[Callable[[int], Bench]]:
    made: list[Bench] = []

    def new(stream: int) -> Bench:
        made.append(Bench(stream))
        return made[-1]

    yield new
    for bench in made:
        bench.close()


def test_the_ack_of_what_was_sent_commits(make: Callable[[int], Bench]) -> None:
    bench = make(2)
    bench.say(bench.expected())

    assert Source.COMMITTED is bench.live_source.give()
    assert not bench.here.serving


WRONG: list[Callable[[records.Ack], records.Ack]] = [
    lambda right: records.Ack(right.generation + 1, right.image),
    lambda right: records.Ack(right.generation, right.image ^ 1),
    lambda right: records.Ack(),
]


@pytest.mark.parametrize("change", WRONG, ids=["generation", "checksum", "bare"])
def test_the_ack_of_something_else_does_not(
    change: Callable[[records.Ack], records.Ack], make: Callable[[int], Bench]
) -> None:
    """The source takes its image back, serves on, and says why."""
    bench = make(2)
    bench.say(change(bench.expected()))

    assert Source.SERVING is bench.live_source.give()
    assert bench.here.serving
    assert "acknowledges what it was not sent" in bench.live_source.reason
    assert bench.process.killed


@pytest.mark.parametrize("stream", records.VERSIONS)
@pytest.mark.parametrize("way", ["closes", "shuts"])
def test_an_ack_sent_too_early_does_not_commit(
    stream: int, way: str, make: Callable[[int], Bench]
) -> None:
    """It is queued, and then the image cannot be sent: nobody has it."""
    bench = make(stream)
    bench.say(bench.expected())
    if way == "closes":
        bench.peer.close()
    else:
        bench.peer.shutdown(socket.SHUT_RD)

    assert Source.SERVING is bench.live_source.give()
    assert (bench.here.serving, Code.SOURCE_FAILED) == (True, bench.live_source.code)


def test_an_ack_of_an_image_sent_in_part_does_not_commit(make: Callable[[int], Bench]) -> None:
    bench = make(2)
    bench.say(bench.expected())
    bench.here.fails = {SourceAction.SEND_IMAGE}

    assert Source.SERVING is bench.live_source.give()
    record = channel.receive(bench.peer, peek=False)
    assert record is not None
    assert isinstance(record[0], records.Hello)
    for fd in record[1]:
        fd.close()


@pytest.mark.parametrize("record", [records.Ack(), records.Ack(3, 1)])
def test_a_bare_ack_counts_in_version_1(record: records.Ack, make: Callable[[int], Bench]) -> None:
    """Once all is sent; what it may say besides was not known then."""
    bench = make(1)
    bench.say(record)

    assert Source.COMMITTED is bench.live_source.give()


def test_a_record_of_version_1_where_2_was_agreed(make: Callable[[int], Bench]) -> None:
    """It has an old Ack, which names nothing."""
    bench = make(2)
    channel.send(bench.peer, records.Ack(), version=1)

    assert Source.SERVING is bench.live_source.give()


def test_an_abort_has_a_code(make: Callable[[int], Bench]) -> None:
    bench = make(2)
    bench.say(records.abort(Code.VERIFY_FAILED, "no"))

    assert Source.SERVING is bench.live_source.give()
    assert (Code.VERIFY_FAILED, "no") == (bench.live_source.code, bench.live_source.reason)


@pytest.mark.parametrize("code", ["", "of-a-later-version"])
def test_a_code_that_is_not_known(code: str, make: Callable[[int], Bench]) -> None:
    """Version 1 has none, and a later one may have more."""
    bench = make(2)
    bench.say(records.Abort("no", code))

    assert Source.SERVING is bench.live_source.give()
    assert (Code.UNKNOWN, "no") == (bench.live_source.code, bench.live_source.reason)


def test_a_silent_destination_has_a_limit(make: Callable[[int], Bench]) -> None:
    """Each sign of life moves it; the reason that counts is the first."""
    bench = make(2)
    side = bench.live_source.side
    side.feed(Event.GO)
    bench.clock += LIMIT - 1
    bench.say(records.Progress(1))
    side.feed(bench.live_source.next_event())
    bench.clock += LIMIT - 1
    bench.say(records.Progress(2))
    side.feed(bench.live_source.next_event())
    bench.clock += LIMIT

    assert Event.DEADLINE is bench.live_source.next_event()
    assert Code.NOT_READY_IN_TIME is bench.live_source.code


def test_a_destination_that_never_stops_talking(make: Callable[[int], Bench]) -> None:
    """Its signs of life move the limit, and not the end of all patience: that is looked at first."""
    bench = make(2)
    bench.live_source.side.feed(Event.GO)
    bench.say(records.Progress(1), bench.expected())
    bench.clock += 10 * LIMIT

    assert Event.DEADLINE is bench.live_source.next_event()
    bench.live_source.side.feed(Event.DEADLINE)
    assert Event.PROGRESS is bench.live_source.next_event()
    assert Event.ACK is bench.live_source.next_event()  # queued by then, it counts


def test_an_image_that_is_not_taken(make: Callable[[int], Bench]) -> None:
    """A destination that reads nothing, or too slowly, holds the source for the limit."""
    bench = make(2)
    with image.seal(bench.here.freeze().manifest) as memfd, new_ledger() as ledger:
        with contextlib.suppress(BlockingIOError):
            while True:
                channel.send(bench.source, records.Go(), version=2)
        for limit, timeout in ((0.01, 10.0), (10.0, 0.01), (10.0, -1.0)):
            with pytest.raises(TimeoutError):
                channel.send_image(
                    bench.source, 3, memfd, ledger, [], version=2, limit=limit, timeout=timeout
                )


def test_a_dead_destination_whose_child_holds_the_channel(make: Callable[[int], Bench]) -> None:
    """No end of the channel is to be seen; the end of the process is."""
    bench = make(2)
    bench.live_source.side.feed(Event.GO)
    bench.process.end()

    assert Event.SUCCESSOR_DEAD is bench.live_source.next_event()
    assert Code.ENDED_EARLY is bench.live_source.code


def test_a_destination_that_closes_unread(make: Callable[[int], Bench]) -> None:
    """The kernel calls that a reset; nothing more can come."""
    bench = make(2)
    bench.live_source.side.feed(Event.GO)
    bench.peer.close()

    assert Event.HANGUP is bench.live_source.next_event()


def test_fds_for_a_source_are_closed(make: Callable[[int], Bench]) -> None:
    """A destination has nothing to give."""
    bench = make(2)
    bench.live_source.side.feed(Event.GO)
    before = len(os.listdir("/proc/self/fd"))
    channel.send(bench.peer, records.Progress(1), [bench.client] * 5, version=2)

    assert Event.PROGRESS is bench.live_source.next_event()
    assert before == len(os.listdir("/proc/self/fd"))


# Which version of the stream


@pytest.mark.parametrize(
    ("offered", "agreed"),
    [
        ({"stream": 1}, 1),
        ({"stream": 2}, 2),
        ({"stream": 1, "streams": [1, 2]}, 2),
        ({"stream": 1, "streams": [1, 2, 3]}, 3),
        ({"stream": 1, "streams": [3, 4, 5]}, 3),
        ({"stream": 1, "streams": [1, "2", None]}, 1),
    ],
)
def test_the_newest_common_version(offered: dict[str, object], agreed: int) -> None:
    """`stream` is what a library of interface 1 offers, and all that it reads."""
    assert agreed == common_stream(offered)


@pytest.mark.parametrize("offered", [{}, {"stream": 4}, {"streams": [4]}, {"streams": "12"}])
def test_no_common_version(offered: dict[str, object]) -> None:
    with pytest.raises(VarlinkError):
        common_stream(offered)


# Who performs


class Recorder:
    """Performs anything, and notes what."""

    def __init__(self) -> None:
        self.performed: list[str] = []

    def __getattr__(self, name: str) -> Callable[[], Event]:
        def perform() -> Event:
            self.performed.append(name)
            return Event.STOP

        return perform


def test_every_action_is_performed_by_the_method_of_its_name() -> None:
    """What it has found out is handed back."""
    recorder = Recorder()
    for action in SourceAction:
        assert Event.STOP is interpreter.perform_source(recorder, action)
    for other in DestinationAction:
        assert Event.STOP is interpreter.perform_destination(recorder, other)

    assert [each.name.lower() for each in (*SourceAction, *DestinationAction)] == recorder.performed


# Before Go


@pytest.mark.parametrize("way", ["closes", "junk", "ack", "silent"])
def test_a_destination_that_never_says_go_is_ended(
    way: str, make: Callable[[int], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its takeover may be gone; the source serves on, and takes the next one."""
    bench = make(2)
    requests: list[object] = []
    negotiation = Negotiation(
        SelfReport("x", "1", {}), "1", requests.append, lambda: None, Keeping()
    )
    negotiation._successor = bench.process
    negotiation._migrating = True
    match way:
        case "closes":
            bench.peer.close()
        case "junk":
            bench.peer.send(b"x" * records.RECORD_SIZE)
        case "ack":
            bench.say(bench.expected())
        case "silent":
            monkeypatch.setattr("upgrader.instance.control_answers._GO", 0.01)
    negotiation.migrate(bench.source)

    assert bench.process.killed
    assert ([], False) == (requests, negotiation._migrating)
    assert -1 == bench.source.fileno()
