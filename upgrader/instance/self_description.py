# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an instance says of itself when it is asked: collects it from any thread, and changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Sequence

from upgrader.errors import UpgradeError
from upgrader.instance.connection import show_peer
from upgrader.instance.self_report import SelfReport
from upgrader.protocol.identity import identify
from upgrader.protocol.varlink_types import VERSION, Backend, Connection, Description, Refusal
from upgrader.systemd import start_record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from upgrader.instance.interfaces import Open

_LISTED = 100  # connections that are described one by one, the busy and old first; and modules


class Describer:
    """One instance, and the files and modules that it was made of when it became ready."""

    def __init__(self, host: SelfReport, library: str) -> None:
        """`library`: the version of this one."""
        self._host = host
        self._library = library
        self._files = _program_files(host.files)
        self._modules = frozenset(sys.modules)

    def fingerprint(self) -> str:
        """The files of the program as they are on disk now, in one checksum."""
        now = sorted((path, _stamp(path)) for path in self._files)
        return hashlib.sha256(repr(now).encode()).hexdigest()[:32]

    def describe(self, expected: str, preflight: bool) -> Description:
        """All there is to know; `expected`: the id of the upgrade that the next reload is, or
        empty; `preflight`: it is only that."""
        host = self._host
        connections = list(host.connections_open())
        backends = [self._backend(name, connections) for name in sorted(host.declarations.sockets)]
        return Description(
            service=host.service,
            version=host.version,
            unit=host.unit,
            pid=os.getpid(),
            generation=host.generation,
            phase=host.standing,
            library=self._library,
            since=round(host.since, 3),
            credentials=os.environ.get("CREDENTIALS_DIRECTORY", ""),
            changed=[path for path, seen in self._files.items() if _stamp(path) != seen],
            late=self._late(),
            expected=bool(expected),
            upgrade=expected,
            preflight=preflight,
            rehearsal=preflight,
            states={
                name: declared.description.version
                for name, declared in host.declarations.states.items()
            },
            trials=[d.trial for d in host.declarations.states.values() if d.trial],
            backends=backends,
            connections=len(connections),
            held=_held(connections),
            parameters=host.parameters.shown(),
            overrides=dict(host.overrides),
            migration=host.progress.now,
            started=start_record.describe(host.declarations.activated, host.settings),
            interface=VERSION,
            last=host.progress.last,
            loaded=host.progress.origin,
            refused=host.refusal or Refusal(),
            fingerprint=self.fingerprint(),
        )

    def _late(self) -> list[str]:
        # A codec comes when a text is first read in it, and is nobody's code of two versions.
        late = (name for name in sys.modules.keys() - self._modules)
        return sorted(name for name in late if not name.startswith("encodings."))[:_LISTED]

    def _backend(self, name: str, connections: Sequence[tuple[str, Open]]) -> Backend:
        bound = self._host.declarations.sockets[name]
        own = [each for backend, each in connections if backend == name]
        fd, address, inode = -1, "", 0
        with contextlib.suppress(OSError, UpgradeError):  # closed: another instance has it
            identity = identify(bound.socket)
            fd, address, inode = bound.fileno(), identity.address, identity.inode
        return Backend(
            name=name,
            kind=bound.kind,
            fd=fd,
            address=address,
            inode=inode,
            transfer=self._host.parameters.transfers(name),
            connections=len(own),
            busy=sum(1 for each in own if each.waiting is None),
        )


def _held(connections: Sequence[tuple[str, Open]]) -> list[Connection]:
    first = sorted(connections, key=lambda each: (each[1].waiting is not None, each[1].since))
    now = time.monotonic()
    return [
        Connection(
            backend=backend,
            peer=show_peer(each.sock),
            fd=each.sock.fileno(),
            age=round(now - each.since, 3),
            waiting=each.waiting or "",
            what=each.what,
        )
        for backend, each in first[:_LISTED]
    ]


def _program_files(more: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The files that this program is made of, with what a replaced one would change."""
    paths = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    paths |= {sys.executable, os.path.abspath(sys.argv[0]), *more}
    return {path: _stamp(path) for path in paths if path}


def _stamp(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size
