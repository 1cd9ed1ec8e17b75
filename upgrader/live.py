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
from upgrader.control import call
from upgrader.errors import ChannelError, UpgradeError
from upgrader.switchover import DESTINATION, SOURCE, Action, Destination, Event, Source, step
from upgrader.varlink import INTERFACE, VarlinkError

_log = logging.getLogger("upgrader")


class Successor:
    """The process that takeover registered, held by pidfd, so that its number cannot be reused."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = Fd(os.pidfd_open(pid))

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        poll = select.poll()
        poll.register(self._pidfd.fileno(), select.POLLIN)
        return not poll.poll(0)

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

    `name_successor` returns True when PID 1 has confirmed its new main process.
    """

    freeze: Callable[[], Built]
    insure: Callable[[], None]
    name_successor: Callable[[int], bool]


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
            with image.seal(manifest) as memfd:
                channel.send_image(self._sock, manifest.generation, memfd, self._built.fds)
        except (UpgradeError, OSError) as error:
            self._fail(Event.NOT_SENT, error)

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
        left = self._deadline - time.monotonic()
        self._sock.settimeout(max(left, 0.001))
        try:
            item = channel.receive(self._sock, peek=False, wait=True)
        except TimeoutError:
            self.reason = self.reason or f"no progress within {self._limit:.1f} s"
            return Event.DEADLINE
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
        self._enter(Event.PREPARED)
        channel.send(self._sock, wire.Go(), wait=True)
        try:
            stream = channel.receive_image(self._sock)
        except (UpgradeError, OSError):
            self._enter(Event.HANGUP)
            raise
        self._enter(Event.IMAGE)
        return stream

    def progress(self, loaded: int) -> None:
        """Ask for more time."""
        with contextlib.suppress(OSError):
            channel.send(self._sock, wire.Progress(loaded))

    def acknowledge(self) -> None:
        """Commit: from here on this instance owns everything; raises ChannelError if it must not.

        A takeover that is gone means that nobody waits for the outcome: that is an abort.
        """
        if not self._takeover_lives():
            self._enter(Event.TAKEOVER_GONE)
            raise ChannelError("takeover is gone, so nobody waits for this instance")
        self._enter(Event.LOADED)
        try:
            channel.send(self._sock, wire.Ack())
        except OSError as error:
            self._enter(Event.HANGUP)
            raise ChannelError(
                "the running instance has given up waiting, and serves on"
            ) from error
        self._enter(Event.TAKEN)
        self.say("committed")

    def refuse(self, reason: str) -> None:
        """Tell the source and takeover why this instance does not take over."""
        if self._state in (Destination.WAITING, Destination.LOADING):
            self._enter(Event.REFUSED)
            with contextlib.suppress(OSError):
                channel.send(self._sock, wire.abort(reason))
        self.say(f"failed: {reason}")

    def say(self, text: str) -> None:
        """Tell takeover how far it has come."""
        with contextlib.suppress(OSError):
            self._takeover.send(text.encode()[:4000], socket.MSG_NOSIGNAL)

    def become_ordinary(self) -> None:
        """Undo what made this process the first to go when memory runs out."""
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(self._adjustment))

    @property
    def source_done(self) -> bool:
        """Whether the source has named its successor, or has ended."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def release_takeover(self) -> None:
        """Give up the line to takeover: its part is over."""
        self._takeover.close()

    def close(self) -> None:
        """Give up the channel."""
        self._sock.close()

    def _enter(self, event: Event) -> None:
        self._state, _ = step(DESTINATION, self._state, event)

    def _takeover_lives(self) -> bool:
        poll = select.poll()
        poll.register(self._takeover, 0)  # POLLHUP is always reported
        return not poll.poll(0)
