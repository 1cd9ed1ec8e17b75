# SPDX-License-Identifier: LGPL-2.1-or-later
"""The migration channel: an AF_UNIX stream socket that carries records with their FDs.

Here it is *parked*: the source writes the whole stream into one end without a reader, and PID 1
holds the other end. The destination reads it with MSG_PEEK, which duplicates the FDs and consumes
nothing, so that a destination that dies changes nothing; after the commit it drains the channel
for real, and PID 1's copy then reads as empty: *spent*.
"""

import array
import contextlib
import errno
import fcntl
import logging
import socket
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from upgrader.errors import ChannelBusy, ChannelError, ForeignError, ProtocolError, UpgradeError
from upgrader.protocol import records
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import HasFileno
from upgrader.protocol.ledger import count_attempt, new_ledger
from upgrader.protocol.received_fds import ReceivedFds
from upgrader.protocol.record_order import Incoming, batches

_SO_PEEK_OFF = 42  # <asm-generic/socket.h>; Python has no name for it
_SPACE = socket.CMSG_SPACE(records.MAX_FDS * array.array("i").itemsize)
_log = logging.getLogger("upgrader")


class Parked(msgspec.Struct, frozen=True):
    """What went into a parked channel: `sent` FDs of the manifest, in its order."""

    sent: int
    reason: records.EndReason


class ReceivedImage(msgspec.Struct, frozen=True):
    """A whole stream as read: `fds[i]` belongs to entry `i`; shorter than the manifest if cut."""

    generation: int
    announced: int  #: FDs that the source had for the manifest
    image: Fd
    ledger: Fd
    fds: ReceivedFds
    reason: records.EndReason | None  #: None: the source died before it could say


def pair() -> tuple[socket.socket, socket.socket]:
    """A new channel: (read end, write end)."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def send(
    sock: socket.socket,
    record: records.Record,
    fds: Sequence[HasFileno] = (),
    *,
    version: int,
    wait: bool = False,
) -> None:
    """Send one record of a stream of `version` with its FDs in one message; raises OSError.

    It blocks only with `wait`, and as long as the timeout of the socket.
    """
    _send(sock, record, _numbers(fds), version=version, wait=wait)


def _numbers(fds: Sequence[HasFileno]) -> "array.array[int]":
    return array.array("i", [owner.fileno() for owner in fds])


def _send(
    sock: socket.socket,
    record: records.Record,
    numbers: "array.array[int]",
    *,
    version: int,
    wait: bool = False,
) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
    flags = socket.MSG_NOSIGNAL | (0 if wait else socket.MSG_DONTWAIT)
    sent = sock.sendmsg([records.encode(record, version)], rights, flags)
    if sent != records.RECORD_SIZE:
        raise ChannelError(f"{sent} of {records.RECORD_SIZE} bytes of a record were taken")


def receive(
    sock: socket.socket, *, peek: bool, wait: bool = False
) -> tuple[records.Record, list[Fd]] | None:
    """One record with its FDs (CLOEXEC), or None where there is no more.

    With `wait` it waits as long as the timeout of the socket, and raises TimeoutError then. Raises
    ProtocolError for a bad record, ChannelError when FDs were cut off or nothing can be read; the
    FDs that came are closed then.
    """
    if (item := _receive(sock, peek=peek, wait=wait)) is None:
        return None
    return item[0], list(item[1])


def _receive(
    sock: socket.socket, *, peek: bool, wait: bool
) -> tuple[records.Record, ReceivedFds] | None:
    flags = socket.MSG_CMSG_CLOEXEC | (socket.MSG_PEEK if peek else 0)
    flags |= 0 if wait else socket.MSG_DONTWAIT
    try:
        frame, ancillary, result, _ = sock.recvmsg(records.RECORD_SIZE, _SPACE, flags)
    except BlockingIOError:
        return None
    except TimeoutError:
        raise
    except OSError as error:
        raise ChannelError(f"the channel cannot be read: {error.strerror}") from error
    fds = ReceivedFds.of(ancillary)
    try:
        if result & socket.MSG_CTRUNC:
            raise ChannelError(
                f"{len(fds)} FDs came, the rest was cut off",
                remedy="raise LimitNOFILE= of this service",
            )
        if not frame:
            return None
        return records.decode(frame), fds
    except UpgradeError:
        fds.close()
        raise


def require_room() -> None:
    """Raise ChannelError if the kernel takes no more FDs of this user into flight (ETOOMANYREFS): then
    nothing can be parked. Raises OSError if that cannot be tried."""
    reader, writer = pair()
    with reader, writer:
        try:
            socket.send_fds(writer, [b"\0"], [writer.fileno()])
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            raise ChannelError(
                f"nothing could be parked now: {error.strerror}, of all services of its user together",
                remedy="raise LimitNOFILE= of this service",
            ) from error


def park(
    generation: int,
    image: Fd,
    fds: Sequence[HasFileno],
    store: Callable[[socket.socket], None],
) -> Parked:
    """Park an image and its FDs, the most valuable first; `store` gives the read end to PID 1. If one
    channel is full, another one goes on where it ended, and `store` gets that, too.

    What does not fit ends the list: the number sent says so. Raises ChannelError if not even the
    image fits, and whatever `store` raises for the first channel.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> socket.socket:
            reader, writer = pair()
            stack.enter_context(reader)
            stack.enter_context(writer)
            # PID 1 first: with too many FDs in flight not even this one FD could be sent.
            store(reader)
            return writer

        attempts = stack.enter_context(new_ledger())
        writer = begin()
        try:
            send(
                writer,
                records.Hello(generation, len(fds)),
                [image, attempts],
                version=records.PARKED,
            )
        except OSError as error:
            raise ChannelError(
                f"the image cannot be parked: {error.strerror}",
                remedy="raise LimitNOFILE= of this service",
            ) from error
        sent, reason, before = *_send_batches(writer, fds, 0), -1
        while reason is records.EndReason.CHANNEL_FULL and sent > before:
            try:
                writer = begin()
            except (UpgradeError, OSError) as error:
                _log.warning("no further channel can be parked: %s", str(error))
                break
            before = sent
            sent, reason = _send_batches(writer, fds, sent)
        with contextlib.suppress(BlockingIOError):  # without an End it is read as cut off there
            send(writer, records.End(sent, reason), version=records.PARKED)
    return Parked(sent, reason)


class ParkedChannel:
    """A channel that PID 1 held under `name`, as the destination finds it. Owns the socket, and those
    that go on where it is full."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._sock = sock
        self._more: list[socket.socket] = []
        self.others: tuple[str, ...] = ()  #: what PID 1 holds for this image besides
        self._first: list[Fd] = []
        self.name = name
        self.generation = 0

    @property
    def image(self) -> Fd:
        """The sealed memfd; only after `open` has returned True."""
        return self._first[0]

    def open(self) -> bool:
        """Lock the channel and look at its first record; False if it is spent.

        A channel that does not begin with Hello is spent, too: whoever began to consume it had
        told PID 1 that it owns all of this, and was killed.

        Raises ChannelBusy when another process reads it: the peek offset lives in the shared
        socket, and two readers would each get half the records. Raises ForeignError if it is no
        channel, ProtocolError or ChannelError if it cannot be read.
        """
        if (self._sock.family, self._sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise ForeignError(self.name, "is not a UNIX stream socket")
        if self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ForeignError(self.name, "is a listener")
        try:
            fcntl.lockf(self._sock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ChannelBusy("another process is reading the parked channel") from error
        self._rewind()
        first = receive(self._sock, peek=True)
        if first is None:
            return False
        record, fds = first
        if not isinstance(record, records.Hello):
            return False
        Incoming().receive(record, len(fds))
        self.generation = record.generation
        self._first = fds
        return True

    def go_on(self, name: str, more: Fd) -> None:
        """Go on with another channel, which PID 1 held under `name`; raises ProtocolError if it is
        none."""
        try:
            self._more.append(more.socket())
        except OSError as error:
            raise ProtocolError(name, f"is no channel: {error.strerror}") from error
        self.others += (name,)

    def detach(self) -> Fd:
        """Give the socket away; the caller owns it."""
        return Fd(self._sock.detach())

    def count_attempt(self) -> int:
        """Count one more attempt to load; returns how many there were before.

        The ledger is a file of the stream itself, so the count survives whoever dies.
        """
        return count_attempt(self._first[1])

    def peek(self) -> ReceivedImage:
        """Read the whole stream, consuming nothing; raises RefusedError or ChannelError."""
        self._rewind()
        return _collect(self._sock, *self._more, peek=True)

    def spend(self) -> None:
        """Consume the stream for real: from now on every copy of the channel reads as spent."""
        for sock in (self._sock, *self._more):
            while _take(sock):
                pass
        self.close()

    def close(self) -> None:
        """Give up the channel (and its lock) without consuming anything."""
        for fd in self._first:
            fd.close()
        for sock in (self._sock, *self._more):
            sock.close()

    def _rewind(self) -> None:
        for sock in (self._sock, *self._more):
            sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)


def _take(sock: socket.socket) -> bool:
    try:  # without room for ancillary data the kernel closes the FDs
        return bool(sock.recv(records.RECORD_SIZE, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


def receive_image(
    sock: socket.socket, first: tuple[records.Record, list[Fd]] | None = None
) -> ReceivedImage:
    """Read the whole stream of a live source, waiting as long as the timeout of the socket; `first`:
    what has been read of it.

    Raises RefusedError, ChannelError or TimeoutError.
    """
    stream = _collect(sock, peek=False, before=first)
    if stream.reason is None:
        raise ChannelError("the source closed the channel in the middle of its image")
    return stream


def _collect(
    *socks: socket.socket, peek: bool, before: tuple[records.Record, list[Fd]] | None = None
) -> ReceivedImage:
    incoming = Incoming()
    first: Sequence[Fd] = ()
    fds = ReceivedFds()
    if before:
        incoming.receive(before[0], len(before[1]))
        first = before[1]
    for sock in socks:
        while incoming.end is None and (item := _receive(sock, peek=peek, wait=not peek)):
            record, came = item
            incoming.receive(record, len(came))
            if isinstance(record, records.Hello):
                first = list(came)
            else:
                fds.join(came)
    if not first:
        raise ProtocolError("stream", "is empty: it has been spent")
    reason = incoming.end.reason if incoming.end else None
    return ReceivedImage(
        incoming.hello.generation, incoming.hello.fds, first[0], first[1], fds, reason
    )


def send_image(
    sock: socket.socket,
    generation: int,
    image: Fd,
    attempts: Fd,
    fds: Sequence[HasFileno],
    *,
    version: int,
    limit: float,
    timeout: float,
    crowds: Iterable[Sequence[int]] = (),
) -> None:
    """Send an image with all its FDs to a live destination, waiting while its queue is full. `crowds`: the
    numbers of those that come after the others.

    Raises OSError: TimeoutError if it takes nothing for `limit` seconds, or not all in `timeout`.
    ETOOMANYREFS (FDs in flight) passes as it takes them, so that is tried again as long.
    """
    end = time.monotonic() + timeout
    numbers = _numbers(fds)
    for each in crowds:
        numbers.extend(each)

    def send_in_time(record: records.Record, numbers: "array.array[int]") -> None:
        give_up = min(time.monotonic() + limit, end)
        while True:
            left = give_up - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the image is not taken within {limit:.1f} s")
            sock.settimeout(left)
            try:
                return _send(sock, record, numbers, version=version, wait=True)
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                time.sleep(0.001)

    count = len(numbers)
    send_in_time(records.Hello(generation, count), _numbers([image, attempts]))
    for batch in batches(count):
        send_in_time(batch, numbers[batch.first : batch.first + batch.count])
    send_in_time(records.End(count, records.EndReason.COMPLETE), numbers[:0])


def _send_batches(
    writer: socket.socket, fds: Sequence[HasFileno], sent: int
) -> tuple[int, records.EndReason]:
    """Send them from number `sent` on; returns how many are sent by then, and why not more."""
    for batch in batches(len(fds), sent):
        try:
            part = fds[batch.first : batch.first + batch.count]
            send(writer, batch, part, version=records.PARKED)
        except BlockingIOError:
            return sent, records.EndReason.CHANNEL_FULL
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            return sent, records.EndReason.TOO_MANY_IN_FLIGHT
        sent += batch.count
    return sent, records.EndReason.COMPLETE
