# SPDX-License-Identifier: LGPL-2.1-or-later
"""The instance's own socket: speaks Varlink from a thread, so that a busy service still answers.

It decides nothing: every call goes to `Answers`. A connection that becomes a migration channel is
given away whole, before a single byte of the stream has been read.
"""

import contextlib
import logging
import os
import selectors
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from upgrader import varlink
from upgrader.varlink import Call, Reply, VarlinkError

#: Connections at a time, and seconds that one may say nothing.
MAX_CLIENTS = 32
IDLE = 30.0

_PEERCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
_log = logging.getLogger("upgrader")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end, by SO_PEERCRED."""

    pid: int
    uid: int


class Answers(Protocol):
    """What an instance answers; called from the control thread. Raises VarlinkError."""

    def describe(self) -> dict[str, Any]:
        """Describe."""

    def expect(self) -> None:
        """Expect."""

    def reload(self, caller: Caller) -> None:
        """Reload."""

    def register(self, caller: Caller, pid: int) -> None:
        """Register."""

    def revoke(self, caller: Caller, pid: int, why: str) -> None:
        """Revoke."""

    def negotiate(self, caller: Caller, parameters: dict[str, Any]) -> dict[str, Any]:
        """Migrate: agree, or refuse."""

    def migrate(self, sock: socket.socket) -> None:
        """Take over the connection on which `negotiate` has been answered."""


class Control:
    """The listening socket and its thread."""

    def __init__(self, path: Path, answers: Answers) -> None:
        self._path = path
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._clients: dict[socket.socket, _Client] = {}
        # Bound beside its place and renamed: the old instance's socket works until then, and
        # there is no moment without one.
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
        self._listener.bind(str(beside))
        os.chmod(beside, 0o600)
        self._listener.listen(16)
        self._listener.setblocking(False)
        os.rename(beside, path)
        self._inode = path.stat().st_ino
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="upgrader-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering; the path goes only if no other instance has taken it."""
        self._waker.close()
        self._thread.join(1.0)
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(IDLE):
                if key.fileobj is self._wake:
                    self._end()
                    return
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, _Client):
                    self._serve(key.data)
            now = time.monotonic()
            for client in [c for c in self._clients.values() if c.since + IDLE < now]:
                self._drop(client)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            _log.debug("control socket: %s", error)
            return
        if len(self._clients) >= MAX_CLIENTS:
            sock.close()
            return
        sock.setblocking(False)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        pid, uid, _ = _PEERCRED.unpack(credentials)
        client = _Client(sock, Caller(pid, uid), bytearray(), time.monotonic())
        self._clients[sock] = client
        self._selector.register(sock, selectors.EVENT_READ, client)

    def _serve(self, client: "_Client") -> None:
        try:
            # recvmsg with no room for FDs: any that come are closed by the kernel.
            data = client.sock.recvmsg(65536)[0]
            client.buffer += data
            client.since = time.monotonic()
            while data and (message := varlink.take(client.buffer)) is not None:
                call = msgspec.json.decode(message, type=Call)
                if not self._answer(client, call):
                    return
        except BlockingIOError:
            return
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            _log.debug("control socket: %s", error)
            data = b""
        if not data:
            self._drop(client)

    def _answer(self, client: "_Client", call: Call) -> bool:
        """Answer one call; False if the connection is no longer ours."""
        try:
            reply = Reply(self._call(client.caller, call))
        except VarlinkError as error:
            reply = Reply(error.parameters, error.name)
        migrates = call.upgrade and not reply.error
        if migrates:
            self._selector.unregister(client.sock)
            del self._clients[client.sock]
        if not call.oneway:
            client.sock.sendall(varlink.encode(reply))
        if migrates:
            self._answers.migrate(client.sock)
        return not migrates

    def _call(self, caller: Caller, call: Call) -> dict[str, Any]:
        match call.method:
            case "org.varlink.service.GetInfo":
                return {
                    "vendor": "upgrader",
                    "product": "upgrader",
                    "version": "1",
                    "url": "",
                    "interfaces": ["org.varlink.service", varlink.INTERFACE],
                }
            case "org.varlink.service.GetInterfaceDescription":
                return {"description": _description(call.parameters.get("interface"))}
            case "io.upgrader.Instance.Describe":
                return self._answers.describe()
            case "io.upgrader.Instance.Expect":
                self._answers.expect()
                return {}
            case "io.upgrader.Instance.Reload":
                self._answers.reload(caller)
                return {}
            case "io.upgrader.Instance.Register":
                self._answers.register(caller, _pid(call))
                return {}
            case "io.upgrader.Instance.Revoke":
                self._answers.revoke(caller, _pid(call), str(call.parameters.get("why", "")))
                return {}
            case "io.upgrader.Instance.Migrate":
                if not call.upgrade:
                    raise _invalid("upgrade")
                return self._answers.negotiate(caller, call.parameters)
        raise VarlinkError("org.varlink.service.MethodNotFound", {"method": call.method})

    def _drop(self, client: "_Client") -> None:
        self._selector.unregister(client.sock)
        self._clients.pop(client.sock, None)
        client.sock.close()

    def _end(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)
        self._selector.close()
        self._listener.close()
        self._wake.close()


@dataclass(slots=True)
class _Client:
    sock: socket.socket
    caller: Caller
    buffer: bytearray
    since: float


def _pid(call: Call) -> int:
    pid = call.parameters.get("pid")
    if not isinstance(pid, int) or pid < 1:
        raise _invalid("pid")
    return pid


def _description(interface: object) -> str:
    known = {
        varlink.INTERFACE: varlink.DESCRIPTION,
        "org.varlink.service": varlink.SERVICE_DESCRIPTION,
    }
    if interface not in known:
        name = "org.varlink.service.InterfaceNotFound"
        raise VarlinkError(name, {"interface": str(interface)})
    return known[str(interface)]


def _invalid(parameter: str) -> VarlinkError:
    return VarlinkError("org.varlink.service.InvalidParameter", {"parameter": parameter})


def call(
    sock: socket.socket, method: str, parameters: dict[str, Any], *, upgrade: bool = False
) -> dict[str, Any]:
    """Call a method of another instance; raises VarlinkError, OSError or TimeoutError.

    Reads one byte at a time at the end of the reply: what follows belongs to the stream.
    """
    sock.sendall(varlink.encode(Call(method, parameters, upgrade=upgrade)))
    buffer = bytearray()
    while (message := varlink.take(buffer)) is None:
        data = sock.recv(1)
        if not data:
            raise ConnectionResetError("the instance closed the connection without an answer")
        buffer += data
    reply = msgspec.json.decode(message, type=Reply)
    if reply.error:
        raise VarlinkError(reply.error.rpartition(".")[2], reply.parameters)
    return reply.parameters
