# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parked channel: a stream with FDs in a socket that nobody reads, peeked and at last spent."""

import contextlib
import fcntl
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.support import cannot_run
from upgrader.errors import ChannelBusy, ChannelError, ProtocolError
from upgrader.protocol import channel, records
from upgrader.protocol.channel import Parked, ParkedChannel, ReceivedImage, park
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import Identity, identify
from upgrader.protocol.image import seal, unseal
from upgrader.protocol.records import RECORD_SIZE, End, EndReason, Fds, Hello

from .golden import MANIFEST

GENERATION = 3


@pytest.fixture(autouse=True)
def many_fds() -> Iterator[None]:
    """As `attach` does: FDs in flight are counted against the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def image() -> Iterator[Fd]:
    with seal(MANIFEST) as memfd:
        yield memfd


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(300)]


class Store:
    """What PID 1 does with the read end: keep a duplicate, and pass it to each new process."""

    def __init__(self) -> None:
        self.kept: list[socket.socket] = []

    def __call__(self, reader: socket.socket) -> None:
        self.kept.append(reader.dup())

    def pass_on(self) -> ParkedChannel:
        return ParkedChannel(self.kept[0].dup(), "upgrader-channel-3")

    def go_on(self, found: ParkedChannel) -> None:
        for number, sock in enumerate(self.kept[1:], 1):
            found.go_on(f"upgrader-entry-channel.3.{number}", Fd(sock.dup().detach()))


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    for sock in store.kept:
        sock.close()


@contextlib.contextmanager
def opened(store: Store) -> Iterator[ParkedChannel]:
    parked = store.pass_on()
    try:
        assert parked.open()
        yield parked
    finally:
        parked.close()


def identities(stream: ReceivedImage) -> list[Identity]:
    return [identify(fd) for fd in stream.fds]


# Parking and replay


def test_what_is_parked_is_read(image: Fd, sockets: list[socket.socket], store: Store) -> None:
    """All FDs arrive in the order of the manifest, more than fit one record."""
    assert Parked(300, EndReason.COMPLETE) == park(GENERATION, image, sockets, store)

    with opened(store) as parked:
        stream = parked.peek()

        assert (GENERATION, 300, EndReason.COMPLETE) == (
            stream.generation, stream.announced, stream.reason,
        )  # fmt: skip
        assert [identify(sock) for sock in sockets] == identities(stream)
        assert MANIFEST == unseal(stream.image) == unseal(parked.image)
        assert GENERATION == parked.generation


def test_received_fds_are_cloexec(image: Fd, sockets: list[socket.socket], store: Store) -> None:
    """A child process that the author starts while loading inherits none of them."""
    park(GENERATION, image, sockets[:3], store)
    with opened(store) as parked:
        stream = parked.peek()
        for fd in (*stream.fds, stream.image, parked.image):
            assert fcntl.FD_CLOEXEC & fcntl.fcntl(fd.fileno(), fcntl.F_GETFD)


def test_peeking_consumes_nothing(image: Fd, sockets: list[socket.socket], store: Store) -> None:
    """Each attempt sees the same, in the same process and in the next."""
    park(GENERATION, image, sockets, store)
    seen = []
    for _ in range(3):
        with opened(store) as parked:
            seen += [identities(parked.peek()) for _ in range(2)]

    assert [seen[0]] * 6 == seen


def test_no_fds(image: Fd, store: Store) -> None:
    """A service with state only has an empty list."""
    assert Parked(0, EndReason.COMPLETE) == park(GENERATION, image, [], store)
    with opened(store) as parked:
        assert not parked.peek().fds


def test_nothing_is_left_open(image: Fd, sockets: list[socket.socket]) -> None:
    """The source keeps no end of the channel: PID 1 has the only one."""
    ends: list[int] = []
    park(GENERATION, image, sockets, lambda reader: ends.append(reader.fileno()))

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ends[0])


def test_a_store_that_refuses(image: Fd, sockets: list[socket.socket]) -> None:
    """What PID 1 does not take is not written to anybody."""

    def refuse(reader: socket.socket) -> None:
        raise ChannelError("no")

    with pytest.raises(ChannelError, match="no"):
        park(GENERATION, image, sockets, refuse)


def test_a_closed_reader(image: Fd, sockets: list[socket.socket]) -> None:
    """A channel that nobody holds is an error, not a silent loss."""
    with pytest.raises(ChannelError, match="Broken pipe"):
        park(GENERATION, image, sockets, lambda reader: reader.shutdown(socket.SHUT_RD))


# The commit


def test_spent_is_seen_by_every_copy(image: Fd, sockets: list[socket.socket], store: Store) -> None:
    """PID 1's duplicate reads as spent, also when it is passed on once more."""
    park(GENERATION, image, sockets, store)
    with opened(store) as parked:
        parked.spend()

    again = store.pass_on()
    assert not again.open()
    with pytest.raises(ProtocolError, match="spent"):
        again.peek()
    again.close()


def test_spending_closes_the_fds(image: Fd, store: Store) -> None:
    """The peer of a parked connection sees its end once nobody else holds it."""
    here, there = socket.socketpair()
    with there:
        park(GENERATION, image, [here], store)
        here.close()
        there.setblocking(False)
        with pytest.raises(BlockingIOError):
            there.recv(1)
        with opened(store) as parked:
            parked.spend()

        assert b"" == there.recv(1)


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_half_spent_is_spent(
    taken: int, image: Fd, sockets: list[socket.socket], store: Store
) -> None:
    """Whoever began to consume it was the owner: a new instance must not load the rest."""
    park(GENERATION, image, sockets, store)
    for _ in range(taken):
        assert store.kept[0].recv(RECORD_SIZE)

    half = store.pass_on()
    assert not half.open()
    half.close()


# Streams that end early


def written(*sent: tuple[records.Record, list[socket.socket | Fd]]) -> Callable[[], Store]:
    def write() -> Store:
        store = Store()
        reader, writer = channel.pair()
        with reader, writer:
            store(reader)
            for record, fds in sent:
                channel.send(writer, record, fds, version=records.PARKED)
        return store

    return write


def test_a_source_killed_before_hello() -> None:
    """Nothing was parked: it reads as spent."""
    store = written()()
    empty = store.pass_on()

    assert not empty.open()
    empty.close()
    store.kept[0].close()


def test_a_source_killed_before_end(image: Fd, sockets: list[socket.socket]) -> None:
    """What came is there, and the stream says that nobody said why there is no more."""
    two: list[socket.socket | Fd] = [*sockets[:2]]
    store = written((Hello(3, 5), [image, image]), (Fds(0, 2), two))()
    with opened(store) as parked:
        stream = parked.peek()

        assert (5, None) == (stream.announced, stream.reason)
        assert [identify(sock) for sock in two] == identities(stream)
    store.kept[0].close()


BAD = {
    "too few in a batch": ([(Fds(0, 2), 1)], "FDs 0 to 1: came with 1 FDs instead of 2"),
    "too many in a batch": ([(Fds(0, 2), 3)], "FDs 0 to 1: came with 3 FDs instead of 2"),
    "overlapping": ([(Fds(0, 2), 2), (Fds(1, 2), 2)], "FDs 1 to 2: .*start at 2"),
    "more than announced": ([(Fds(0, 6), 6)], "too many: 5 were announced"),
    "two Hellos": ([(Hello(3, 5), 2)], "Hello: unexpected in phase active"),
    "after the End": (
        [(End(0, EndReason.CHANNEL_FULL), 0), (Fds(0, 1), 1)],
        # Peeking at a record without FDs brings those of the next one along.
        "End: came with 1 FDs instead of 0",
    ),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD.keys())
def test_bad_streams(
    bad: list[tuple[records.Record, int]], message: str, image: Fd, sockets: list[socket.socket]
) -> None:
    """The record is named, and nothing is consumed."""
    rest: list[tuple[records.Record, list[socket.socket | Fd]]] = [
        (record, [*sockets[:fds]]) for record, fds in bad
    ]
    store = written((Hello(3, 5), [image, image]), *rest)()
    with opened(store) as parked:
        for _ in range(2):
            with pytest.raises(ProtocolError, match=message):
                parked.peek()
    store.kept[0].close()


@pytest.mark.parametrize("fds", [0, 1, 3])
def test_a_hello_without_its_fds(fds: int, sockets: list[socket.socket]) -> None:
    """The image and the ledger must be there."""
    store = written((Hello(3, 5), [*sockets[:fds]]))()
    bad = store.pass_on()
    with pytest.raises(ProtocolError, match=f"Hello: came with {fds} FDs instead of 2"):
        bad.open()
    bad.close()
    store.kept[0].close()


@pytest.mark.parametrize("data", [b"x", b"x" * RECORD_SIZE, records.encode(Hello(1, 0), 1)[:-1]])
def test_what_is_no_record(data: bytes) -> None:
    """Foreign bytes, and a record that ends in the middle."""
    reader, writer = channel.pair()
    writer.send(data)
    writer.close()
    parked = ParkedChannel(reader, "upgrader-channel-1")
    with pytest.raises(ProtocolError, match="record: "):
        parked.open()
    parked.close()


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        (socket.AF_UNIX, socket.SOCK_DGRAM, "upgrader-channel-1: is not a UNIX stream socket"),
        (socket.AF_INET, socket.SOCK_STREAM, "upgrader-channel-1: is not a UNIX stream socket"),
        (socket.AF_UNIX, socket.SOCK_STREAM, "cannot be read: "),
    ],
)
def test_what_is_no_channel(family: int, kind: int, message: str) -> None:
    """The migration channel is local: anything but a connected UNIX socket is refused."""
    parked = ParkedChannel(socket.socket(family, kind), "upgrader-channel-1")
    with pytest.raises((ProtocolError, ChannelError), match=message):
        parked.open()
    parked.close()


# Limits


@pytest.fixture
def small_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a few records only."""

    def small() -> tuple[socket.socket, socket.socket]:
        reader, writer = socket.socketpair()
        writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's least
        return reader, writer

    monkeypatch.setattr(channel, "pair", small)


@pytest.mark.usefixtures("small_channels")
def test_a_full_channel_goes_on_in_another_one(
    image: Fd, sockets: list[socket.socket], store: Store
) -> None:
    """All of it is read, as often as one likes, until it is spent; and a library that knows of the
    first channel only reads what is there."""
    assert Parked(6000, EndReason.COMPLETE) == park(GENERATION, image, sockets * 20, store)
    assert len(store.kept) > 2
    for _ in range(2):
        with opened(store) as found:
            store.go_on(found)
            stream = found.peek()

            assert (6000, EndReason.COMPLETE) == (len(stream.fds), stream.reason)
            assert [identify(s) for s in sockets * 20] == identities(stream)
    with opened(store) as found:
        stream = found.peek()

        assert 0 < len(stream.fds) < 6000
        assert (6000, None) == (stream.announced, stream.reason)
    with opened(store) as found:
        store.go_on(found)
        found.spend()
    assert [b""] * len(store.kept) == [sock.recv(1, socket.MSG_DONTWAIT) for sock in store.kept]


@pytest.mark.usefixtures("small_channels")
def test_parts_in_another_order(image: Fd, sockets: list[socket.socket], store: Store) -> None:
    """Whoever has mixed them up: no FD is taken for another one."""
    park(GENERATION, image, sockets * 20, store)
    store.kept[1:] = store.kept[:0:-1]
    with opened(store) as found:
        store.go_on(found)
        with pytest.raises(ProtocolError, match="expected to start at"):
            found.peek()


@pytest.mark.usefixtures("small_channels")
def test_what_goes_on_with_no_channel(
    image: Fd, sockets: list[socket.socket], store: Store
) -> None:
    """It is named."""
    park(GENERATION, image, sockets, store)
    with opened(store) as found, pytest.raises(ProtocolError, match=r"entry-x: is no channel"):
        found.go_on("upgrader-entry-x", image.duplicate())


@pytest.mark.usefixtures("small_channels")
def test_a_full_channel_ends_the_list(
    image: Fd, sockets: list[socket.socket], store: Store
) -> None:
    """If there is no room for another one, what does not fit is left out, and the number sent says so
    on both sides."""

    def only_one(reader: socket.socket) -> None:
        if store.kept:
            raise ChannelError("the FD store is full")
        store(reader)

    parked = park(GENERATION, image, sockets * 20, only_one)

    assert EndReason.CHANNEL_FULL is parked.reason
    assert 0 < parked.sent < 6000
    with opened(store) as found:
        stream = found.peek()

        assert parked.sent == len(stream.fds)
        assert 6000 == stream.announced
        assert [identify(s) for s in sockets] == identities(stream)[:300]


CHILD = """
import os, resource, socket, sys
from upgrader.protocol import channel
from upgrader.protocol.fd import Fd
{setup}
"""


def child(script: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(setup=script), *arguments],
        pass_fds=pass_fds,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def test_too_many_in_flight_ends_the_list() -> None:
    """ETOOMANYREFS: the rest is named by the number sent, the image is safe."""
    if os.geteuid() != 0:
        cannot_run("needs root, to become a user without privileges")
    script = """
os.setgroups([]); os.setgid(61234); os.setuid(61234)
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
image, kept = Fd(os.memfd_create("image")), []
parked = channel.park(1, image, [image] * 2000, lambda reader: kept.append(reader.dup()))
print(parked.sent, parked.reason)
"""
    sent, reason = child(script).split()

    assert EndReason.TOO_MANY_IN_FLIGHT == reason
    assert 0 < int(sent) < 2000
    assert 0 == int(sent) % records.MAX_FDS


def test_no_room_for_the_image_is_an_error() -> None:
    """With a limit that low nothing can be parked, and the message says what to do."""
    if os.geteuid() != 0:
        cannot_run("needs root, to become a user without privileges")
    script = """
os.setgroups([]); os.setgid(61235); os.setuid(61235)
kept = []
def store(reader):
    kept.append(reader.dup())
    kept.extend(socket.socketpair())
    for _ in range(30):
        socket.send_fds(kept[1], [b"x"], [0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
try:
    channel.park(1, Fd(os.memfd_create("image")), [], store)
except channel.ChannelError as error:
    print(error)
"""
    assert "image cannot be parked: Too many references" in (text := child(script))
    assert "LimitNOFILE=" in text


def test_what_could_not_be_parked_is_known_before() -> None:
    """Where there is room, nothing is said, and nothing stays open or in flight."""
    channel.require_room()
    if os.geteuid() != 0:
        cannot_run("needs root, to become a user without privileges")
    script = """
os.setgroups([]); os.setgid(61236); os.setuid(61236)
here, there = socket.socketpair()
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
before = len(os.listdir("/proc/self/fd"))
for _ in range(30):
    try:
        channel.require_room()
        socket.send_fds(there, [b"x"], [0])
    except channel.ChannelError as error:
        print(error)
        break
print(len(os.listdir("/proc/self/fd")) - before)
"""
    said, opened = child(script).splitlines()
    assert "nothing could be parked now: Too many references" in said
    assert opened == "0"


def test_too_few_fd_numbers_is_an_error(
    image: Fd, sockets: list[socket.socket], store: Store
) -> None:
    """A destination with a low limit refuses (MSG_CTRUNC), and consumes nothing."""
    park(GENERATION, image, sockets, store)
    number = store.kept[0].fileno()
    script = """
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
found = channel.ParkedChannel(socket.socket(fileno=int(sys.argv[1])), "x")
print(found.open())
before = len(os.listdir("/proc/self/fd"))
try:
    found.peek()
except channel.ChannelError as error:
    print(error)
print(len(os.listdir("/proc/self/fd")) - before)
"""
    text = child(script, str(number), pass_fds=(number,)).splitlines()

    assert "True" == text[0]
    assert "the rest was cut off (raise LimitNOFILE=" in text[1]
    assert "0" == text[2]
    with opened(store) as parked:
        assert 300 == len(parked.peek().fds)


# One reader at a time


def test_a_second_process_gets_busy(image: Fd, sockets: list[socket.socket], store: Store) -> None:
    """While one process reads, another one is told so; when the first is gone, it may."""
    park(GENERATION, image, sockets, store)
    number = store.kept[0].fileno()
    script = """
try:
    print(channel.ParkedChannel(socket.socket(fileno=int(sys.argv[1])), "x").open())
except channel.ChannelBusy as error:
    print(type(error).__name__)
"""
    with opened(store) as parked:
        assert "ChannelBusy\n" == child(script, str(number), pass_fds=(number,))
        assert 300 == len(parked.peek().fds)

    assert "True\n" == child(script, str(number), pass_fds=(number,))
    with opened(store):
        pass
    assert issubclass(ChannelBusy, ChannelError)


# The ledger


def test_attempts_are_counted_across_processes(image: Fd, store: Store) -> None:
    """The count lives in the stream: whoever dies, it stays."""
    park(GENERATION, image, [], store)
    number = store.kept[0].fileno()
    script = """
found = channel.ParkedChannel(socket.socket(fileno=int(sys.argv[1])), "x")
found.open()
print(found.count_attempt(), flush=True)
os.kill(os.getpid(), 9)
"""
    counts = []
    for _ in range(3):
        died = subprocess.run(
            [sys.executable, "-c", CHILD.format(setup=script), str(number)],
            pass_fds=(number,),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        counts.append(died.stdout.strip())
    with opened(store) as parked:
        assert 3 == parked.count_attempt()
        assert 4 == parked.count_attempt()

    assert ["0", "1", "2"] == counts


def test_a_ledger_that_cannot_be_kept(image: Fd) -> None:
    """It is named."""
    reading, writing = os.pipe()
    sealed = seal(MANIFEST)
    for ledger in (Fd(reading), Fd(writing), sealed):
        store = written((Hello(3, 0), [image, ledger]))()
        with opened(store) as parked, pytest.raises(ProtocolError, match="ledger: cannot be kept"):
            parked.count_attempt()
        store.kept[0].close()
        ledger.close()
