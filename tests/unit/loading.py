# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program to load an image into, with what PID 1 passes it; asserts nothing."""

import os
import socket
from pathlib import Path
from typing import Any

import msgspec

import upgrader
from upgrader.instance.adopted import Adopted
from upgrader.instance.commit import LoadedInstance
from upgrader.instance.declarations import Connections, Declarations
from upgrader.instance.declared_socket import Bound
from upgrader.instance.load import Loader
from upgrader.protocol.channel import park
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import identify
from upgrader.protocol.image import Manifest, ManifestEntry, seal
from upgrader.protocol.kinds import Kind, Waiting
from upgrader.protocol.parameters import Parameters
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.state_codec import save
from upgrader.systemd.fdstore import FdStore
from upgrader.systemd.listen_fds import Passed
from upgrader.systemd.notify import Notifier


@upgrader.state("counters", version=2, readable_from=1)
class Counters:
    requests: int = 0


@upgrader.state("session")
class Session:
    number: int = 0


@upgrader.state("session", version=2)
class Session2:
    number: int = 0
    name: str = upgrader.since(2, default="x")


@upgrader.state("session", version=3, readable_from=1)
class Session3:
    count: int = 0


@upgrader.convert_back(Session3, 2)
def to_2(fields: dict[str, Any]) -> dict[str, Any]:
    return {"number": fields["count"], "name": "back"}


@upgrader.state("counters", version=3, readable_from=2)
class Counters3:
    requests: int = 0
    seen: list[str] = upgrader.since(3, default_factory=list)


def handler(peer: Any, counters: Counters) -> None:
    pass


class Bench:
    """A program with one state, a door with connections and an inbox; and what PID 1 passes it."""

    def __init__(self, directory: Path) -> None:
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(directory / "notify"))
        self.notify.setblocking(False)
        self.notifier = Notifier(str(directory / "notify"))
        # No barrier: nobody answers here.
        self.store = FdStore(self.notifier)
        self.notifier.barrier = lambda: None  # type: ignore[method-assign]
        self.opened: list[socket.socket] = [self.notify]
        self.kept: list[tuple[str, Fd]] = []
        self.session: type | None = Session
        self.loads: list[LoadedInstance] = []
        self.adopted: list[Adopted] = []

    def socket(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        sock = socket.socket(socket.AF_INET, kind)
        sock.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        self.opened.append(sock)
        return sock

    def keep(self, name: str, owner: Any) -> None:
        self.kept.append((name, Fd(os.dup(owner.fileno()))))

    def park(self, manifest: Manifest, fds: list[Any], *, name: str = "") -> None:
        name = name or f"upgrader-channel-{manifest.generation}"
        with seal(manifest) as memfd:
            park(manifest.generation, memfd, fds, lambda reader: self.keep(name, reader))

    def load(self, **parameters: Any) -> LoadedInstance:
        declarations = Declarations("web")
        declarations.add_state(Counters)
        door = Bound(Kind.LISTENER, "door")
        declarations.add_socket(door)
        declarations.add_socket(Bound(Kind.DATAGRAMS, "inbox"))
        declarations.add_connections(Connections(door, self.session, handler))
        self.declarations = declarations
        passed = [Passed(name, fd.duplicate()) for name, fd in self.kept]
        loader = Loader(declarations, Parameters(**parameters), self.store, passed)
        loaded = loader.load()
        self.opened += [bound.socket for bound in declarations.sockets.values()]
        self.adopted += loaded.adopted
        self.loads.append(loaded)
        return loaded

    def told(self) -> list[str]:
        """What PID 1 was told, without what was stored."""
        heard = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.notify, 4096, 8)
            except BlockingIOError:
                return heard
            for number in fds:
                os.close(number)
            heard.append(data.decode())

    def close(self) -> None:
        self.told()
        self.notifier.close()
        for loaded in self.loads:
            if loaded.channel:
                loaded.channel.close()
        for owner in [*self.opened, *self.adopted]:
            owner.close()
        for _, fd in self.kept:
            fd.close()


def image(bench: Bench, generation: int = 3) -> tuple[Manifest, list[Any]]:
    """An image of all that the program declares, with one connection."""
    door, inbox = bench.socket(), bench.socket(socket.SOCK_DGRAM)
    client = socket.create_connection(door.getsockname())
    connection, _ = door.accept()
    bench.opened += [client, connection]
    number = msgspec.msgpack.encode(Session(7))
    moved = ConnectionState(Waiting.MESSAGE, b"half", b"rest", number)
    entries = [
        ManifestEntry("door", Kind.LISTENER, identify(door)),
        ManifestEntry("inbox", Kind.DATAGRAMS, identify(inbox)),
        ManifestEntry("door", Kind.CONNECTION, identify(connection), 0, moved),
    ]
    sessions = {"door": SavedState("session", 1, 1, b"")}
    states = [save(Counters(5))]
    manifest = Manifest("web", generation, "1", 0, states, sessions, entries)
    return manifest, [door, inbox, connection]
