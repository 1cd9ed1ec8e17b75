# SPDX-License-Identifier: LGPL-2.1-or-later
"""Collect, from any thread, what an instance says of itself when it is asked."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence

from msgspec import structs, to_builtins

from upgrader.errors import UpgradeError
from upgrader.instance.announcements import Announcements
from upgrader.instance.connection import show_peer
from upgrader.instance.self_report import SelfReport
from upgrader.protocol.identity import identify
from upgrader.protocol.varlink_types import (
    VERSION,
    Backend,
    Connection,
    Description,
    Loaded,
    Refusal,
    ReplayCounts,
    Trial,
)
from upgrader.systemd import journal, start_record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from upgrader.instance.declared_backend import DeclaredBackend
    from upgrader.instance.interfaces import Open

_WITHHELD = "root is told why"
_FRESH = 0.05  # seconds: however many ask, looking at the files of the program costs little
_LISTED = 100  # connections that are described one by one, the busy and old first; and modules


class Describer:
    """One instance, and the modules that it had loaded when it became ready."""

    def __init__(self, host: SelfReport, library: str) -> None:
        """`library`: the version of this one."""
        self._host = host
        self._library = library
        host.watched.add_program()
        self._modules = frozenset(sys.modules)
        self._told_to_all: tuple[float, int, dict[str, Any]] = (0.0, -1, {})

    def describe_to_all(self, announced: Announcements) -> dict[str, Any]:
        """What everybody may know; of several who ask in no time, all are told the same."""
        now, news = time.monotonic(), self._host.progress.news.number
        since, known, told = self._told_to_all
        if known != news or now - since > _FRESH:
            told = to_builtins(public(self.describe(announced)))
            self._told_to_all = now, news, told
        return told

    def describe(self, announced: Announcements) -> Description:
        """All there is to know."""
        host = self._host
        look = host.watched.look()
        connections = list(host.connections_open())
        counted = host.connections_of
        backends = [self._socket(name, connections) for name in sorted(host.declarations.sockets)]
        backends += [self._backend(each) for each in host.declarations.backends.values()]
        programs = host.programs()
        preflight = announced.preflight_due
        started = start_record.describe(host.declarations.activated, host.settings)
        memory = sum(each.memory for each in programs if not each.replaced)
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
            can=[*(["bus"] * host.hears_systemd()), *(["journal"] * journal.reachable())],
            changed=look.changed,
            reread=look.reread,
            late=self._late(),
            expected=bool(announced.expected),
            upgrade=announced.expected,
            preflight=preflight,
            rehearsal=preflight,
            states={
                name: declared.description.version
                for name, declared in host.declarations.states.items()
            },
            trials=[d.trial for d in host.declarations.states.values() if d.trial],
            backends=backends,
            connections=sum(b.connections for b in backends) if counted else len(connections),
            held=_held(connections),
            parameters=host.parameters.shown(),
            overrides=dict(host.overrides),
            migration=host.progress.now,
            started=structs.replace(started, memory=started.memory + memory),
            interface=VERSION,
            last=host.progress.last,
            loaded=_loaded(host),
            refused=host.refusal or Refusal(),
            fingerprint=look.fingerprint,
            drains_until=round(host.drains_until, 3),
            tls_memory=host.tls_memory,
            replays=host.replays() if host.replays else ReplayCounts(),
            last_upgrade=host.progress.last_upgrade,
            programs=programs,
            preflight_first=host.preflight_first,
        )

    def _late(self) -> list[str]:
        # A codec comes when a text is first read in it, and is nobody's code of two versions.
        late = (name for name in sys.modules.keys() - self._modules)
        return sorted(name for name in late if not name.startswith("encodings."))[:_LISTED]

    def _backend(self, declared: DeclaredBackend) -> Backend:
        fd, inode = declared.fds[0].fileno() if declared.fds else -1, 0
        with contextlib.suppress(OSError):  # closed: another instance has it
            inode = os.fstat(fd).st_ino
        return Backend(
            name=declared.name,
            kind=declared.kind.kind,
            fd=fd,
            inode=inode,
            transfer=self._host.parameters.transfers(declared.name),
            size=declared.size(),
            verified=declared.verified,
            text=declared.show(),
        )

    def _socket(self, name: str, connections: Sequence[tuple[str, Open]]) -> Backend:
        bound = self._host.declarations.sockets[name]
        own = [each for backend, each in connections if backend == name]
        fd, identities = -1, []
        with contextlib.suppress(OSError, UpgradeError):  # closed: another instance has it
            identities = [identify(sock) for sock in bound.sockets]
            fd = bound.fileno()
        return Backend(
            name=name,
            kind=bound.kind,
            fd=fd,
            address=identities[0].address if identities else "",
            inode=identities[0].inode if identities else 0,
            addresses=[each.address for each in identities],
            inodes=[each.inode for each in identities],
            transfer=self._host.parameters.transfers(name),
            connections=self._host.connections_of(name) if self._host.connections_of else len(own),
            busy=sum(1 for each in own if each.waiting is None),
        )


def public(said: Description) -> Description:
    """The part of a description that every user of the machine may know.

    That is what PID 1 and the kernel tell everybody (names, processes, settings, listening sockets),
    and what became of upgrades. Not in it are who is connected, variables, modules, what was set at
    run time, and why a state cannot be saved, in which there may be a piece of it.
    """
    given = said.started
    return Description(
        service=said.service,
        version=said.version,
        unit=said.unit,
        pid=said.pid,
        generation=said.generation,
        phase=said.phase,
        library=said.library,
        since=said.since,
        can=said.can,
        changed=said.changed[:_LISTED],
        reread=said.reread[:_LISTED],
        states=said.states,
        trials=[Trial(each.name, problem=_WITHHELD) for each in said.trials if each.problem],
        backends=said.backends,
        connections=said.connections,
        parameters=said.parameters,
        migration=said.migration,
        started=structs.replace(given, environment={}),
        interface=said.interface,
        last=said.last,
        loaded=structs.replace(said.loaded, stayed={}),  # nor why a connection stayed
        refused=said.refused,
        fingerprint=said.fingerprint,
        last_upgrade=said.last_upgrade,
        drains_until=said.drains_until,
        programs=said.programs,
        replays=said.replays,
        partial=True,
        preflight_first=said.preflight_first,
    )


def _loaded(host: SelfReport) -> Loaded:
    origin = host.progress.origin
    lost = host.gap.lost if host.gap else origin.datagrams_lost
    return structs.replace(origin, datagrams_lost=lost)


def _held(connections: Sequence[tuple[str, Open]]) -> list[Connection]:
    first = sorted(connections, key=lambda each: (each[1].waiting is not None, each[1].since))
    now = time.monotonic()
    return [
        Connection(
            backend=backend,
            peer=show_peer(each),
            fd=each.fileno(),
            age=round(now - each.since, 3),
            waiting=each.waiting or "",
            what=each.what,
        )
        for backend, each in first[:_LISTED]
    ]
