# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an instance answers on its socket, and to whom: decides who may migrate, and whether.

FDs and state go only to the one process that takeover has registered, and takeover is whoever
PID 1 says is the control process of this unit; root may do both. Nobody else of the uid can.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from upgrader import channel, image, wire
from upgrader.control import Caller
from upgrader.declarations import Declarations
from upgrader.errors import BusError, UpgradeError
from upgrader.live import Request, Successor
from upgrader.systemd.bus import Bus
from upgrader.systemd.stop import unit_name
from upgrader.varlink import INTERFACE, VarlinkError

_GO = 10.0  # seconds that a destination may take between its negotiation and Go
_BUS = 1.0


@dataclass(slots=True)
class Facts:
    """What the instance says of itself; `draining` and `phase` change while it runs."""

    service: str
    version: str
    unit: str
    generation: int
    phase: str = "serving"
    draining: list[str] = field(default_factory=list)


class Negotiation:
    """Implements `control.Answers`. `on_request` is called, in the control thread, for a
    destination that is ready, `on_refused` when one has failed."""

    def __init__(
        self,
        facts: Facts,
        declarations: Declarations,
        on_request: Callable[[Request], object],
        on_reload: Callable[[], object],
        on_refused: Callable[[str], object],
    ) -> None:
        self._facts = facts
        self._declarations = declarations
        self._on_request = on_request
        self._on_reload = on_reload
        self._on_refused = on_refused
        self._expected = False
        self._lock = threading.Lock()
        self._successor: Successor | None = None
        self._since = 0.0
        self._migrating = False
        self._files = _program_files()

    def describe(self) -> dict[str, Any]:
        """All there is to know."""
        facts = self._facts
        return {
            "service": facts.service,
            "version": facts.version,
            "unit": facts.unit,
            "pid": os.getpid(),
            "generation": facts.generation,
            "phase": facts.phase,
            "credentials": os.environ.get("CREDENTIALS_DIRECTORY", ""),
            "changed": [path for path, seen in self._files.items() if _stamp(path) != seen],
            "expected": self._expected,
            "draining": list(facts.draining),
        }

    def expect(self) -> None:
        """An operator has asked for an upgrade, not for a reload."""
        self._expected = True

    def reload(self, caller: Caller) -> None:
        """Run what the author wants at a reload, and wait for it."""
        self._require_takeover(caller)
        try:
            self._on_reload()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise VarlinkError(f"{INTERFACE}.ReloadFailed", {"why": why}) from error

    def register(self, caller: Caller, pid: int) -> None:
        """Only takeover, and only one process at a time, which must belong to this unit."""
        self._require_takeover(caller)
        with self._lock:
            if self._successor and self._migrating:
                age = time.monotonic() - self._since
                raise _busy(f"process {self._successor.pid}, registered {age:.1f} s ago")
            if self._successor:  # left behind by a takeover that was killed
                self._successor.kill()
                self._successor = None
            try:
                successor = Successor(pid)
                with open(f"/proc/{pid}/cgroup", encoding="ascii") as file:
                    unit = unit_name(file.read())
            except OSError as error:
                raise refused(f"process {pid}: {error.strerror}") from error
            if unit != self._facts.unit:
                raise refused(f"process {pid} belongs to {unit or 'no unit'}")
            self._successor = successor
            self._since = time.monotonic()

    def revoke(self, caller: Caller, pid: int, why: str) -> None:
        """From now on that process cannot migrate, for a reason; Busy while it is about to."""
        self._require_takeover(caller)
        with self._lock:
            if self._successor is not None and self._successor.pid == pid:
                if self._migrating:
                    raise _busy(f"process {pid}, which migrates")
                self._successor = None
        self._on_refused(why)

    def negotiate(self, caller: Caller, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Agree to a migration before anything is disturbed, or say what does not fit."""
        with self._lock:
            successor = self._successor
            # Held by pidfd: while it lives, its number is not given to another process.
            if successor is None or successor.pid != caller.pid or not successor.alive:
                raise refused(f"process {caller.pid} was not registered by takeover")
            self._check(parameters)
            self._migrating = True
        return {"generation": self._facts.generation}

    def migrate(self, sock: socket.socket) -> None:
        """Wait for Go, then hand the channel to the loop that serves."""
        sock.settimeout(_GO)
        try:
            item = channel.receive(sock, peek=False, wait=True)
        except (UpgradeError, OSError):
            item = None
        successor = self._successor
        if item is None or not isinstance(item[0], wire.Go) or successor is None:
            sock.close()
            self.over()
            return
        self._on_request(Request(sock, successor))

    def over(self) -> None:
        """The migration has ended, and this instance serves on."""
        with self._lock:
            self._migrating = self._expected = False
            self._successor = None

    def _check(self, parameters: Mapping[str, Any]) -> None:
        for name, own in (("stream", wire.VERSION), ("image", image.FORMAT)):
            if parameters.get(name) != own:
                raise refused(f"{name} version {parameters.get(name)}, the running one has {own}")
        states, backends = parameters.get("states"), parameters.get("backends")
        if not isinstance(states, dict) or not isinstance(backends, list):
            raise refused("states and backends are missing")
        for name, declared in self._declarations.states.items():
            mine = declared.description
            theirs = states.get(name)
            if theirs is None and name not in backends:
                raise refused(f"state {name!r} is not declared by the new version")
            if theirs is not None and mine.version > theirs and mine.readable_from > theirs:
                raise refused(
                    f"state {name!r} has version {mine.version}, readable from version"
                    f" {mine.readable_from} on; the new version has {theirs}"
                )
        for name, bound in self._declarations.sockets.items():
            if name not in backends:
                raise refused(f"{bound.kind} {name!r} is not declared by the new version")

    def _require_takeover(self, caller: Caller) -> None:
        try:
            with Bus(_BUS) as bus:
                control = bus.get(self._facts.unit, "ControlPID")
        except BusError as error:
            raise refused(f"systemd does not say who takeover is: {error}") from error
        if caller.pid != control and caller.uid != 0:
            raise refused(f"process {caller.pid} is not the control process of this unit")


def refused(why: str) -> VarlinkError:
    """The error for whatever is not allowed or does not fit."""
    return VarlinkError(f"{INTERFACE}.Refused", {"why": why})


def _busy(holder: str) -> VarlinkError:
    return VarlinkError(f"{INTERFACE}.Busy", {"holder": holder})


def _program_files() -> dict[str, tuple[int, ...]]:
    """The files that this program is made of, with what a replaced one would change."""
    paths = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    paths |= {sys.executable, os.path.abspath(sys.argv[0])}
    return {path: _stamp(path) for path in paths if path}


def _stamp(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size
