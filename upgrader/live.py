# SPDX-License-Identifier: LGPL-2.1-or-later
"""A live migration, both sides, in blocking steps: drives the tables of `switchover`.

The source runs `give` inside one callback of its loop, which is what freezes it. Nothing here
starts or supervises a process; that is `takeover`.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from upgrader import channel, image, wire
from upgrader.backends import Fd
from upgrader.backends.fd import HasFileno
from upgrader.calling import call
from upgrader.errors import ChannelError, UpgradeError
from upgrader.fence import Fence
from upgrader.parameters import COMMITTED, FAILED
from upgrader.switchover import DESTINATION, SOURCE, Action, Destination, Event, Source, step
from upgrader.varlink import INTERFACE, VarlinkError

#: Seconds that a destination whose Ack was not taken waits for the source's end: it has decided by
#: then, unless it is stopped.
_VERDICT = 5.0
#: Seconds between two signs of life of a destination that loads.
_PROGRESS = 0.05
_log = logging.getLogger("upgrader")


class Successor:
    """The process that takeover registered, held by pidfd, so that its number cannot be reused."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = Fd(os.pidfd_open(pid))

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return not _ready(self._pidfd, 0)

    def fileno(self) -> int:
        """Readable once it has ended."""
        return self._pidfd.fileno()

    def kill(self) -> None:
        """Make sure that it does not linger; whether it works decides nothing."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd.fileno(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Request:
    """A destination that is ready: its channel, after Go."""

    sock: socket.socket
    successor: Successor


@dataclass(frozen=True, slots=True)
class Built:
    """A frozen instance: the image of all of it, and of what may be replayed after a crash."""

    manifest: image.Manifest
    fds: Sequence[HasFileno]


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the source's instance does at each step; each may raise UpgradeError or OSError.

    `name_successor` returns True when PID 1 has confirmed its new main process. `wake` is called
    at least every `beat` seconds meanwhile: WatchdogSec= does not stop for a migration.
    """

    freeze: Callable[[], Built]
    insure: Callable[[], None]
    name_successor: Callable[[int], bool]
    wake: Callable[[], None] = lambda: None
    beat: float = float("inf")


class Giver:
    """The source's side of one migration."""

    def __init__(self, request: Request, hooks: Hooks, limit: float, timeout: float) -> None:
        """`limit`: seconds without progress that are too many; `timeout`: seconds in all."""
        self._request = request
        self._sock = request.sock
        self._hooks = hooks
        self._limit = limit
        self._last = time.monotonic() + timeout
        self._deadline = min(self._last, time.monotonic() + limit)
        self._pending: list[Event] = []
        self._ledger: Fd | None = None
        self.state = Source.SERVING
        self.reason = ""

    def give(self) -> Source:
        """Give everything to the destination; returns where the source stands then.

        SERVING (nothing happened), RETIRED, or PARKED (the destination died at once). While PID 1
        does not answer it stays here, and does not serve: PID 1 would take its end for the end of
        the service.
        """
        event = Event.GO
        while True:
            self.state, actions = step(SOURCE, self.state, event)
            self._pending.clear()
            for action in actions:
                self._perform(action)
            if self.state in (Source.SERVING, Source.RETIRED, Source.PARKED):
                return self.state
            event = self._pending.pop(0) if self._pending else self._next_event()

    def _perform(self, action: Action) -> None:
        match action:
            case Action.FREEZE | Action.SEND_IMAGE if self._pending:
                return
            case Action.FREEZE:
                try:
                    self._built = self._hooks.freeze()
                except (UpgradeError, OSError) as error:
                    self._fail(Event.NOT_SENT, error)
            case Action.SEND_IMAGE:
                self._send_image()
            case Action.EXTEND:
                self._deadline = min(self._last, time.monotonic() + self._limit)
            case Action.TAKE_BACK if self._ledger:
                channel.take_back(self._ledger)
            case Action.SHUT:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RD)
            case Action.KILL:
                self._request.successor.kill()
            case Action.INSURE:
                try:
                    self._hooks.insure()
                except (UpgradeError, OSError) as error:
                    _log.warning("no insurance: %s", error)
            case Action.NAME_SUCCESSOR:
                self._pending.append(self._name_successor())

    def _send_image(self) -> None:
        manifest = self._built.manifest
        self._sock.settimeout(self._limit)
        try:
            self._ledger = channel.new_ledger()
            with image.seal(manifest) as memfd:
                channel.send_image(
                    self._sock, manifest.generation, memfd, self._ledger, self._built.fds
                )
        except (UpgradeError, OSError) as error:
            self._fail(Event.NOT_SENT, error)
        self._deadline = min(self._last, time.monotonic() + self._limit)

    def _name_successor(self) -> Event:
        if not self._request.successor.alive:
            return Event.SUCCESSOR_DEAD
        try:
            named = self._hooks.name_successor(self._request.successor.pid)
        except UpgradeError as error:
            _log.error("%s", error)
            named = False
        if not named:
            return Event.UNANSWERED
        # Dead before it was named, PID 1 has refused it, and says nothing of that.
        return Event.NAMED if self._request.successor.alive else Event.SUCCESSOR_DEAD

    def _next_event(self) -> Event:
        while not _ready(self._sock, 0):
            left = self._deadline - time.monotonic()
            if left <= 0:
                self.reason = self.reason or f"no progress within {self._limit:.1f} s"
                return Event.DEADLINE
            if not self._request.successor.alive:
                # A process that it has forked may hold the channel open: no end is to be seen.
                self.reason = self.reason or "the destination has ended"
                return Event.SUCCESSOR_DEAD
            _first_ready(min(left, self._hooks.beat), self._sock, self._request.successor)
            self._hooks.wake()
        try:
            item = channel.receive(self._sock, peek=False)
        except ConnectionError as error:
            self.reason = self.reason or str(error)
            return Event.HANGUP
        except (UpgradeError, OSError) as error:
            # Not a hang-up: an Ack may follow, until the channel is shut.
            self.reason = self.reason or str(error)
            return Event.UNREADABLE
        match item[0] if item else None:
            case wire.Ack():
                return Event.ACK
            case wire.Progress():
                return Event.PROGRESS
            case wire.Abort(reason):
                self.reason = reason
                return Event.ABORT
            case None:
                self.reason = self.reason or "the destination has ended"
                return Event.HANGUP
            case record:
                self.reason = self.reason or f"{type(record).__name__} is no record for a source"
                return Event.UNREADABLE

    def _fail(self, event: Event, error: BaseException) -> None:
        self.reason = str(error)
        self._pending.append(event)


class Taker:
    """The destination's side: negotiates, then takes the image; nothing is touched before the Ack."""

    def __init__(
        self, path: Path, takeover: socket.socket, adjustment: int, timeout: float
    ) -> None:
        """`adjustment`: the oom_score_adj of an ordinary main process of the unit."""
        self._path = path
        self._adjustment = adjustment
        self._takeover = takeover
        self._timeout = timeout
        self._state = Destination.PREPARING
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._ledger: Fd | None = None
        self.fence = Fence(self._sock, takeover)
        self._said = time.monotonic()

    @classmethod
    def from_line(cls, line: str, timeout: float) -> Self:
        """The migration that takeover has started this process for, as TAKEOVER says."""
        number, adjustment, path = line.split(":", 2)
        os.set_inheritable(int(number), False)
        return cls(Path(path), socket.socket(fileno=int(number)), int(adjustment), timeout)

    def prepare(self, parameters: dict[str, Any]) -> None:
        """Connect and negotiate; raises ChannelError with the source's reason."""
        self._sock.settimeout(self._timeout)
        try:
            self._sock.connect(str(self._path))
            call(self._sock, f"{INTERFACE}.Migrate", parameters, upgrade=True)
        except (VarlinkError, OSError) as error:
            self._enter(Event.REFUSED)
            raise ChannelError(f"the running instance refuses: {error}") from error
        self.say("prepared")

    def receive(self) -> channel.Stream:
        """Say Go, and take the whole image; raises UpgradeError or OSError."""
        self._require_takeover()
        self._enter(Event.PREPARED)
        channel.send(self._sock, wire.Go(), wait=True)
        try:
            stream = channel.receive_image(self._sock)
        except (UpgradeError, OSError):
            self._enter(Event.HANGUP)
            raise
        self._enter(Event.IMAGE)
        self.fence.add(stream.image, stream.ledger, *stream.fds)
        self._ledger = stream.ledger
        return stream

    def progress(self, loaded: int) -> None:
        """Something more has been loaded: ask for more time, but not all the time."""
        now = time.monotonic()
        if now < self._said + _PROGRESS:
            return
        self._said = now
        with contextlib.suppress(OSError):
            channel.send(self._sock, wire.Progress(loaded))

    def acknowledge(self) -> None:
        """Commit: from here on this instance owns everything; raises ChannelError if it must not.

        A takeover that is gone means that nobody waits for the outcome: that is an abort.
        """
        self._require_takeover()
        self._enter(Event.LOADED)
        try:
            channel.send(self._sock, wire.Ack())
        except OSError as error:
            self._enter(Event.HANGUP)
            if not self._is_orphaned():
                self._enter(Event.TAKEN_BACK)
                raise ChannelError(
                    "the running instance has given up waiting, and serves on"
                ) from error
            self._require_takeover()
            self._enter(Event.ORPHANED)
            _log.error("the instance before has died, and had given everything to this one")
        else:
            self._enter(Event.TAKEN)
        self.fence.lift()
        self.say(COMMITTED)

    def _is_orphaned(self) -> bool:
        """Whether the source has died after it froze: then nobody has served since."""
        poll = select.poll()
        poll.register(self._sock, 0)  # POLLHUP is always reported, and not for SHUT_RD alone
        gone = bool(poll.poll(_VERDICT * 1000))
        return gone and self._ledger is not None and not channel.is_taken_back(self._ledger)

    def refuse(self, reason: str) -> None:
        """Tell the source and takeover why this instance does not take over."""
        if self._state in (Destination.WAITING, Destination.LOADING):
            self._enter(Event.REFUSED)
            with contextlib.suppress(OSError):
                channel.send(self._sock, wire.abort(reason))
        self.say(f"{FAILED}{reason}")

    def say(self, text: str) -> None:
        """Tell takeover how far it has come."""
        with contextlib.suppress(OSError):
            self._takeover.send(text.encode()[:4000], socket.MSG_NOSIGNAL)

    def become_ordinary(self) -> None:
        """Undo what made this process the first to go when memory runs out."""
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(self._adjustment))

    def wait_for_source(self) -> None:
        """Return once the source has named its successor, or has ended."""
        _first_ready(None, self._sock)

    def release_takeover(self) -> None:
        """Give up the line to takeover: its part is over."""
        self._takeover.close()

    def close(self) -> None:
        """Give up the channel."""
        self._sock.close()

    def _enter(self, event: Event) -> None:
        self._state, _ = step(DESTINATION, self._state, event)

    def _require_takeover(self) -> None:
        poll = select.poll()
        # Its death, or that it has called the upgrade off and only listens.
        poll.register(self._takeover, select.POLLRDHUP)
        if poll.poll(0):
            self._enter(Event.TAKEOVER_GONE)
            raise ChannelError("takeover is gone, so nobody waits for this instance")


def _ready(owner: HasFileno, timeout: float) -> bool:
    """Whether there is something to read, or an end to be seen, within `timeout` seconds."""
    return _first_ready(timeout, owner)


def _first_ready(timeout: float | None, *owners: HasFileno) -> bool:
    poll = select.poll()
    for owner in owners:
        poll.register(owner.fileno(), select.POLLIN)
    return bool(poll.poll(None if timeout is None else max(timeout, 0) * 1000))
