# SPDX-License-Identifier: LGPL-2.1-or-later
"""The destination of a live migration: performs what the table says, and finds events.

It negotiates, takes the image, has it loaded, and owns everything from the Ack on. Nothing that it
has received is touched before that.
"""

import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Any, NoReturn, Self

from upgrader.codes import Code
from upgrader.errors import ChannelError, PreflightPassed, ProtocolError, UpgradeError
from upgrader.instance.fork_guard import Fence
from upgrader.instance.lent_sockets import Borrowed
from upgrader.protocol import channel, image, interpreter, ledger, records
from upgrader.protocol.fd import Fd
from upgrader.protocol.switchover import Destination, Event
from upgrader.protocol.takeover_line import Said, Word, encode, encode_1
from upgrader.protocol.varlink import INTERFACE, VarlinkError
from upgrader.protocol.varlink_client import call
from upgrader.systemd import precedence

#: Seconds that a destination whose Ack was not taken waits for the source's end: it has decided by
#: then, unless it is stopped.
_VERDICT = 5.0
#: Seconds between two signs of life of a destination that loads.
_PROGRESS = 0.05
_HANGUP = 0  # for poll(2): POLLHUP is always reported, and not for SHUT_RD alone
_log = logging.getLogger("upgrader")


class LiveDestination:
    """The destination's side of one migration. `side.feed` takes one event; `next_event` waits for
    it while the channel or takeover has something to say."""

    def __init__(
        self,
        sock: socket.socket,
        takeover: socket.socket,
        *,
        timeout: float,
        on_exit: Callable[[BaseException], None] = lambda error: None,
        path: str = "",
        adjustment: int = 0,
        upgrade: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`timeout`: seconds for the negotiation, and for the image; `on_exit` is told why this
        process ends, before it may be killed; `path`: of the source's socket; `adjustment`: the
        oom_score_adj of an ordinary main process of the unit; `upgrade`: the id of this one, empty
        with a takeover of library 0.1.0."""
        self.upgrade = upgrade
        self._sock = sock
        self._takeover = takeover
        self._on_exit = on_exit
        self._path = path
        self._adjustment = adjustment
        self._clock = clock
        self._said = clock()
        self._timeout = timeout
        self._give_up = clock() + timeout
        self._sock.settimeout(timeout)
        self._stream = records.VERSIONS[0]
        self._image: channel.ReceivedImage | None = None
        self._piece = Fd(-1)
        self._pieces = 0  # of tables, that have come
        self.on_piece: Callable[[Fd], None] = lambda piece: None  #: loads it
        self.on_image: Callable[[channel.ReceivedImage], None] = lambda stream: None  #: loads it
        self.on_owner: Callable[[], None] = lambda: None  #: serves
        self._error: BaseException = ChannelError("no reason was given")
        self.fence = Fence(sock, takeover)
        self.side = interpreter.destination(self)

    @classmethod
    def from_line(
        cls, line: str, upgrade: str, timeout: float, on_exit: Callable[[BaseException], None]
    ) -> Self:
        """The migration that takeover has started this process for, as TAKEOVER and UPGRADE say."""
        number, adjustment, path = line.split(":", 2)
        os.set_inheritable(int(number), False)
        return cls(
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
            socket.socket(fileno=int(number)),
            timeout=timeout,
            on_exit=on_exit,
            path=path,
            adjustment=int(adjustment),
            upgrade=upgrade,
        )

    @property
    def state(self) -> Destination:
        """Where the destination stands."""
        return self.side.state

    # Driving the table

    @property
    def takeover(self) -> socket.socket:
        """The line to takeover."""
        return self._takeover

    def borrow(self, offer: dict[str, Any]) -> Borrowed | None:
        """Have the source lend its sockets before anything is disturbed; as `Borrowed.ask`."""
        return Borrowed.ask(self._path, offer, self._timeout)

    def gone(self) -> NoReturn:
        """Give up, because takeover or the source is gone; raises ChannelError."""
        why = "the running instance has ended"
        alone = self._is_alone()
        self._run(self._takeover_gone() if alone else self._not_sent(Event.HANGUP, why))
        raise self._error

    def take(
        self,
        offer: dict[str, Any],
        load: Callable[[channel.ReceivedImage], None],
        load_piece: Callable[[Fd], None],
    ) -> None:
        """Negotiate with `offer`, and have `load` take the image, and `load_piece` each piece of a table
        before it; raises why it cannot be had: ChannelError, ProtocolError, or whatever these raise."""
        self.on_image, self.on_piece = load, load_piece
        self._run(self._negotiate(offer))
        while self.state is Destination.WAITING:
            self._run(self.next_event())
        self._raise_failure()

    def acknowledge(self, serve: Callable[[], None]) -> None:
        """Commit: `serve` runs as soon as this instance owns everything; raises ChannelError if it
        must not.

        A takeover that is gone means that nobody waits for the outcome: that is an abort.
        """
        self.on_owner = serve
        self._run(self.loaded())
        while self.state is Destination.ASKING:
            self._run(self.next_event())
        self._raise_failure()

    def refuse(self, error: BaseException) -> None:
        """Tell the source and takeover why this instance does not take over, unless it has ended."""
        if self.state in (Destination.PREPARING, Destination.WAITING, Destination.LOADING):
            self._run(self._failed(Event.REFUSED, error))

    def loaded(self) -> Event:
        """What the end of loading means: LOADED, unless nobody waits for it any more."""
        return self._takeover_gone() if self._is_alone() else Event.LOADED

    def next_event(self) -> Event:
        """Wait for the image, or else for what becomes of an Ack that was not taken."""
        asking = self.state is Destination.ASKING
        poll = select.poll()
        poll.register(self._sock, _HANGUP if asking else select.POLLIN)
        poll.register(self._takeover, select.POLLRDHUP)
        left = self._give_up - self._clock()
        ready = [number for number, _ in poll.poll(max(left, 0) * 1000)]
        if self._takeover.fileno() in ready:
            return self._takeover_gone()
        if asking:
            return self._verdict(gone=bool(ready))
        if not ready:
            return self._not_sent(Event.REFUSED, "the image did not come in time")
        try:
            first = channel.receive(self._sock, peek=False, wait=True)
            if first and isinstance(first[0], records.TablePiece):
                self._piece = self._take_piece(first[0], first[1])
                return Event.PIECE
            self._image = channel.receive_image(self._sock, first)
        except (UpgradeError, OSError) as error:
            if self._is_closed():
                return self._not_sent(Event.HANGUP, str(error))
            return self._failed(Event.REFUSED, error)
        self._said = self._clock()  # the limit counts from here
        return Event.IMAGE

    def progress(self, loaded: int) -> None:
        """Something more has been loaded: ask for more time, but not all the time."""
        now = self._clock()
        if now < self._said + _PROGRESS:
            return
        self._said = now
        with contextlib.suppress(OSError):
            self._send(records.Progress(loaded))

    # The actions

    def send_go(self) -> Event | None:
        """SEND_GO; from here on the image is waited for."""
        self._give_up = self._clock() + self._timeout
        precedence.claim()  # from here on clients may wait for this process
        try:
            self._send(records.Go(), wait=True)
        except OSError as error:
            return self._not_sent(Event.HANGUP, str(error))
        return None

    def load_piece(self) -> Event | None:
        """LOAD_PIECE, and say so: the source sends no more than it can load."""
        try:
            with self._piece as piece:
                self.on_piece(piece)
        except Exception as error:
            return self._failed(Event.REFUSED, error)
        self._pieces += 1
        self._give_up = self._clock() + self._timeout
        try:
            self._send(records.Progress(self._pieces), wait=True)
        except (UpgradeError, OSError) as error:
            return self._not_sent(Event.HANGUP, str(error))
        return None

    def load(self) -> Event | None:
        """LOAD, the beginning of it: LOADED comes once the instance is checked as well."""
        assert self._image
        self.fence.add(self._image.image, self._image.ledger, self._image.fds)
        try:
            self.on_image(self._image)
        except Exception as error:
            return self._failed(Event.REFUSED, error)
        return None

    def send_ack(self) -> Event | None:
        """SEND_ACK, in one system call: what that answers is what has happened."""
        assert self._image
        try:
            self._send(records.Ack(self._image.generation, image.checksum(self._image.image)))
        except OSError:
            self._give_up = self._clock() + _VERDICT
            return Event.HANGUP
        return Event.TAKEN

    def send_abort(self) -> Event | None:
        """SEND_ABORT."""
        with contextlib.suppress(OSError):
            self._send(records.abort(_code(self._error), _show(self._error)))
        return None

    def serve(self) -> Event | None:
        """SERVE; takeover is told, whatever becomes of it."""
        self.fence.lift()
        try:
            self.on_owner()
        finally:
            self._say(Word(Said.COMMITTED))
        return None

    def exit(self) -> Event | None:
        """EXIT: takeover is told why, and the source sees the end of the channel."""
        self._on_exit(self._error)
        self._say(Word(Said.FAILED, _code(self._error), _show(self._error)))
        self._sock.close()
        self._takeover.close()
        return None

    # After the Ack

    def become_ordinary(self) -> None:
        """Undo what made this process the first to go when memory runs out."""
        place = "/proc/self/oom_score_adj"
        with contextlib.suppress(OSError), open(place, "w", encoding="ascii") as file:
            file.write(str(self._adjustment))

    def wait_for_source(self) -> None:
        """Return once the source has named its successor, or has ended."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.poll()

    def release_takeover(self) -> None:
        """Give up the line to takeover, whoever else holds it: its part is over."""
        with contextlib.suppress(OSError):
            self._takeover.shutdown(socket.SHUT_RDWR)
        self._takeover.close()

    def close(self) -> None:
        """Give up the channel."""
        self._sock.close()

    # Inside

    def _run(self, event: Event | None) -> None:
        while event is not None:
            event = self.side.feed(event)

    def _take_piece(self, record: records.TablePiece, fds: list[Fd]) -> Fd:
        """The FD of the next piece; raises ProtocolError for anything else."""
        if record.number != self._pieces or len(fds) != 1 or self._stream < records.TABLES:
            for fd in fds:
                fd.close()
            why = f"number {record.number} with {len(fds)} FDs, after {self._pieces}"
            raise ProtocolError("piece of a table", why)
        return fds[0]

    def _negotiate(self, offer: dict[str, Any]) -> Event:
        try:
            self._sock.connect(self._path)
            agreed = call(self._sock, f"{INTERFACE}.Migrate", offer, upgrade=True)
        except VarlinkError as error:
            code = Code(error.parameters.get("code", Code.REFUSED))
            why = f"the running instance refuses: {error}"
            return self._failed(Event.REFUSED, ChannelError(why, code=code))
        except OSError as error:
            return self._not_sent(Event.HANGUP, f"the running instance cannot be asked: {error}")
        stream = agreed.get("stream", 1)  # an instance of interface 1 knows one version
        if stream not in records.VERSIONS:
            why = f"stream version {stream} was not offered"
            return self._failed(Event.REFUSED, ProtocolError("Migrate", why))
        self._stream = stream
        self._say(Word(Said.PREPARED))
        return self._takeover_gone() if self._is_alone() else Event.PREPARED

    def _verdict(self, *, gone: bool) -> Event:
        """Whether the source serves again, or has died after it froze: then nobody has since."""
        assert self._image
        if gone and not ledger.is_taken_back(self._image.ledger):
            _log.error("the instance before has died, and had given everything to this one")
            return Event.ORPHANED
        why = "the running instance has given up waiting, and serves on"
        return self._failed(Event.TAKEN_BACK, ChannelError(why, code=Code.NOT_READY_IN_TIME))

    def _is_closed(self) -> bool:
        poll = select.poll()
        poll.register(self._sock, _HANGUP)
        return bool(poll.poll(0))

    def _is_alone(self) -> bool:
        """Whether takeover has died, or has called the upgrade off and only listens."""
        poll = select.poll()
        poll.register(self._takeover, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _takeover_gone(self) -> Event:
        why = "takeover is gone, so nobody waits for this instance"
        return self._failed(Event.TAKEOVER_GONE, ChannelError(why, code=Code.TAKEOVER_GONE))

    def _not_sent(self, event: Event, why: str) -> Event:
        return self._failed(event, ChannelError(why, code=Code.SOURCE_FAILED))

    def _failed(self, event: Event, error: BaseException) -> Event:
        self._error = error
        return event

    def _raise_failure(self) -> None:
        if self.state is Destination.FAILED:
            raise self._error

    def _send(self, record: records.Record, *, wait: bool = False) -> None:
        channel.send(self._sock, record, version=self._stream, wait=wait)

    def _say(self, word: Word) -> None:
        """Tell takeover how far it has come."""
        data = encode(word) if self.upgrade else encode_1(word)
        with contextlib.suppress(OSError):
            self._takeover.send(data, socket.MSG_NOSIGNAL)


def _code(error: BaseException) -> Code:
    return error.code if isinstance(error, UpgradeError) else Code.LOAD_FAILED


def _show(error: BaseException) -> str:
    return str(error) if isinstance(error, PreflightPassed) else f"{type(error).__name__}: {error}"
