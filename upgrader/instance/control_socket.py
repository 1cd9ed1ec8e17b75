# SPDX-License-Identifier: LGPL-2.1-or-later
"""The instance's own socket: speaks Varlink from a thread, so that a busy service still answers.

It decides nothing: `control_calls` has each call answered. A connection that becomes a migration channel is
given away whole, before a single byte of the stream has been read.
"""

import contextlib
import errno
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec

from upgrader.codes import Code
from upgrader.instance.control_calls import (
    GIVEN_AWAY,
    SLOW,
    Answers,
    answer,
    answer_reader,
    told,
)
from upgrader.instance.control_listener import Caller, Places, caller_at
from upgrader.instance.phases import News
from upgrader.instance.process import reserve
from upgrader.protocol import varlink
from upgrader.protocol.varlink import INTERFACE, VarlinkError
from upgrader.protocol.varlink_messages import Call, Reply, encode

#: Connections at a time; for one more, the one that has been silent for longest goes.
MAX_CLIENTS = 32
#: Likewise of those who may only read, of all users and of one: they take the place of nobody else.
MAX_READERS = 8
MAX_READERS_OF_ONE = 2
#: Seconds that a connection may be silent; one that is told about a migration may for longer.
IDLE = 30.0
#: Numbers of FDs for those who ask a service that has used up all others.
_SPARE = 4
_PATIENCE = 0.1  # seconds until accepting is tried again
#: Bytes of answers that a client may leave unread.
MAX_UNREAD = 4 << 20
#: Seconds for clients to be told the last news before this process ends.
_LAST_WORDS = 0.2
#: Seconds in all for those who have just come, and between two looks at them.
_LAST_ANSWERS, _PAUSE = 1.0, 0.002

_Answer = Callable[[Answers, str, Caller, Call], dict[str, Any]]

_log = logging.getLogger("upgrader")


class Control:
    """The thread that answers at the places of an instance. Nobody is answered before `open`."""

    def __init__(self, places: Places, answers: Answers, version: str) -> None:
        """`version`: of the library. `places` are closed with this. Raises OSError if FDs are scarce."""
        self._places = places
        self._answers = answers
        self._version = version
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._wake.setblocking(False)
        self._todo: deque[Callable[[], object]] = deque()
        self._clients: dict[socket.socket, _Client] = {}
        self._spare = reserve(_SPARE)
        for sock in (*places.listeners, self._wake):
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread: threading.Thread | None = None
        self._opening = threading.Lock()  # an instance may end as soon as it is ready
        self._closed = False
        self._watched = False  # somebody may want news

    def open(self) -> None:
        """Take the place of the instance before, unless that is done, and answer, unless it is closed by
        now; raises OSError."""
        with self._opening:
            if self._closed:
                return
            self._places.open()
            self._thread = threading.Thread(target=self._run, name="upgrader-control", daemon=True)
            self._thread.start()

    def also_at(self, path: str) -> None:
        """Answer at a second path, too; raises OSError."""
        listener = self._places.also_at(path)
        self._later(lambda: self._selector.register(listener, selectors.EVENT_READ))

    def announce(self, news: News) -> None:
        """Tell those who have asked for it that a migration has gone on; from any thread."""
        if self._watched:  # else the thread would take its turn of the interpreter in the pause
            self._later(lambda: self._tell_watchers(news))

    def finish(self) -> None:
        """Return once everybody who has come is answered, or after a while."""
        give_up = time.monotonic() + _LAST_ANSWERS
        done = threading.Event()

        def look() -> None:
            if not self._is_asked():
                done.set()

        while time.monotonic() < give_up and not done.wait(_PAUSE):
            self._later(look)

    def _is_asked(self) -> bool:
        """Whether somebody has come, and is not answered yet; in the thread, which takes who comes."""
        come = any(key.fileobj is not self._wake for key, _ in self._selector.select(0))
        waiting = (not c.heard or (c.waits and not c.watching) for c in self._clients.values())
        return come or any(waiting)

    def close(self) -> None:
        """Tell the last news, and stop answering; a path goes only if no other instance has it."""
        with self._opening:
            if self._closed:
                return
            self._closed = True
        self._later(self._stop)
        if self._thread:
            self._thread.join(_LAST_WORDS * 5)
        else:
            self._end()
        self._places.remove()

    # The thread

    def _run(self) -> None:
        with contextlib.suppress(_Stopped):
            while True:
                for key, events in self._selector.select(IDLE):
                    if key.fileobj is self._wake:
                        self._do_what_is_due()
                    elif isinstance(key.data, _Client):
                        self._serve(key.data, events)
                    elif isinstance(key.fileobj, socket.socket):
                        self._accept(key.fileobj)
                now = time.monotonic()
                for client in [c for c in self._clients.values() if c.since + IDLE < now]:
                    if not client.watching and not client.waits:
                        self._drop(client)
        self._end()

    def _later(self, call: Callable[[], object]) -> None:
        """Have it done by the thread."""
        self._todo.append(call)
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    def _do_what_is_due(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake.recv(4096)
        while self._todo:
            self._todo.popleft()()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
                break
            except OSError as error:
                _log.debug("control socket: %s", error)
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    return
                if not self._spare:  # all are in use by others who ask
                    time.sleep(_PATIENCE)
                    return
                self._spare.pop().close()
        sock.setblocking(False)
        client = _Client(sock, caller_at(sock))
        # A path has a mode; a name in the abstract has none.
        stranger = not self._places.path and client.caller.uid not in (0, os.geteuid())
        client.reads_only = stranger or listener is self._places.for_all
        self._make_room(client)
        self._clients[sock] = client
        self._selector.register(sock, selectors.EVENT_READ, client)
        if client.reads_only and len(self._spare) < _SPARE:
            self._drop(client)

    def _make_room(self, client: "_Client") -> None:
        """End the connection that has been silent for longest, if this one is one too many."""
        everybody = self._clients.values()
        if client.reads_only:
            rivals = [c for c in everybody if c.reads_only]
            own = [c for c in rivals if c.caller.uid == client.caller.uid]
            if len(own) >= MAX_READERS_OF_ONE:
                rivals = own
            elif len(rivals) < MAX_READERS:
                return
        elif len(rivals := list(everybody)) < MAX_CLIENTS:
            return
        self._drop(min(rivals, key=lambda each: each.since))

    def _serve(self, client: "_Client", events: int) -> None:
        if self._clients.get(client.sock) is not client:
            return  # dropped in the meantime
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(client)
            if events & selectors.EVENT_READ:
                # recvmsg with no room for FDs: any that come are closed by the kernel.
                data = client.sock.recvmsg(65536)[0]
                client.buffer += data
                client.since = time.monotonic()
                self._answer_all(client)
                if len(client.buffer) > varlink.LIMIT:
                    raise ValueError("more calls than answers")
                if not data:
                    raise ConnectionResetError("closed")
        except BlockingIOError:
            return
        except Exception as error:
            self._fail(client, error)

    def _fail(self, client: "_Client", error: Exception) -> None:
        """End a connection; whatever was said on it ends neither this thread nor another one."""
        expected = isinstance(error, OSError | ValueError | msgspec.MsgspecError)
        _log.log(
            logging.DEBUG if expected else logging.ERROR,
            "control socket: %s: %s", type(error).__name__, error, exc_info=not expected,
        )  # fmt: skip
        self._drop(client)

    def _answer_all(self, client: "_Client") -> None:
        """Answer what has come, one call after the other."""
        while not client.waits and self._clients.get(client.sock) is client:
            message = varlink.take(client.buffer)
            if message is None:
                return
            self._answer(client, msgspec.convert(varlink.decode(message), Call))

    def _answer(self, client: "_Client", call: Call) -> None:
        client.heard = True
        if client.reads_only:
            self._answered(client, call, self._reply(client.caller, call, answer_reader))
            return
        if call.method == f"{INTERFACE}.QueryMigration" and call.more and not call.oneway:
            self._watched = True  # before it is asked how things stand: nothing new is missed
            news = self._answers.query()
            client.watching = client.waits = True
            client.seen = news.number
            self._send(client, Reply(told(news), continues=True))
            return
        if call.method in SLOW:  # it waits for the service, and others have questions meanwhile
            client.waits = True

            def work() -> None:
                reply = self._reply(client.caller, call)
                self._later(lambda: self._answered(client, call, reply))

            threading.Thread(target=work, name="upgrader-call", daemon=True).start()
            return
        self._answered(client, call, self._reply(client.caller, call))

    def _reply(self, caller: Caller, call: Call, by: _Answer | None = None) -> Reply:
        try:
            return Reply((by or answer)(self._answers, self._version, caller, call))
        except VarlinkError as error:
            return Reply(error.parameters, error.name)
        except Exception as error:
            _log.exception("control socket: %s", call.method)
            why = f"unexpected {type(error).__name__}: {error}"
            return Reply({"why": why, "code": Code.UNKNOWN}, f"{INTERFACE}.Refused")

    def _answered(self, client: "_Client", call: Call, reply: Reply) -> None:
        if self._clients.get(client.sock) is not client:
            return
        try:
            if call.method in GIVEN_AWAY and not reply.error:
                self._give_away(client, call, reply)
                return
            if not call.oneway:
                self._send(client, reply)
            if client.waits:
                client.waits = False
                self._answer_all(client)
        except Exception as error:
            self._fail(client, error)

    def _tell_watchers(self, news: News) -> None:
        last = news.migration.phase.ended
        # Who has asked in the meantime knows it already.
        for client in [c for c in self._clients.values() if c.watching and c.seen < news.number]:
            try:
                client.since = time.monotonic()
                client.watching = client.waits = not last
                self._send(client, Reply(told(news), continues=not last))
                self._answer_all(client)
            except Exception as error:
                self._fail(client, error)
        self._watched = any(c.watching for c in self._clients.values())

    def _give_away(self, client: "_Client", call: Call, reply: Reply) -> None:
        self._selector.unregister(client.sock)
        del self._clients[client.sock]

        def go_on() -> None:
            with contextlib.suppress(OSError):  # whoever has gone is seen to be gone
                client.sock.sendall(encode(reply))
            GIVEN_AWAY[call.method](self._answers)(client.sock)

        # What follows is waited for, and others have questions meanwhile. It begins with the answer:
        # once the other side has that it may say Go, and in the pause this thread has nothing to do.
        threading.Thread(target=go_on, name="upgrader-go", daemon=True).start()

    def _send(self, client: "_Client", reply: Reply) -> None:
        client.unsent += encode(reply)
        self._flush(client)
        if len(client.unsent) > MAX_UNREAD:
            raise ValueError("answers are not read")

    def _flush(self, client: "_Client") -> None:
        with contextlib.suppress(BlockingIOError):
            while client.unsent:
                del client.unsent[: client.sock.send(client.unsent)]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
        self._selector.modify(client.sock, wanted, client)

    def _drop(self, client: "_Client") -> None:
        if self._clients.pop(client.sock, None) is not None:
            self._selector.unregister(client.sock)
            client.sock.close()
            self._spare += reserve(_SPARE - len(self._spare))

    def _stop(self) -> NoReturn:
        """Give those who wait for the end of a migration the time to be told."""
        deadline = time.monotonic() + _LAST_WORDS
        for client in [c for c in self._clients.values() if c.unsent]:
            with contextlib.suppress(OSError):
                client.sock.settimeout(max(deadline - time.monotonic(), 0.001))
                client.sock.sendall(client.unsent)
        raise _Stopped

    def _end(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)
        self._spare.clear()
        self._selector.close()
        self._places.close()
        self._wake.close()
        self._waker.close()
        self._todo.clear()


class _Stopped(Exception):
    pass


@dataclass(slots=True, eq=False)
class _Client:
    sock: socket.socket
    caller: Caller
    buffer: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    since: float = field(default_factory=time.monotonic)
    watching: bool = False  # has asked for every phase
    seen: int = 0  # the number of the news that it has
    waits: bool = False  # its last call is not answered yet
    heard: bool = False  # it has called once
    reads_only: bool = False  # it may be told what everybody may know
