# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an instance answers on its socket, and to whom: decides who may migrate, and whether.

FDs and state go only to the one process that takeover has registered, and takeover is whoever
PID 1 says is the control process of this unit; root may do both. Nobody else of the uid can.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import msgspec

from upgrader.codes import Code
from upgrader.errors import BusyWork, ChannelError, ParameterError, UpgradeError
from upgrader.instance import lent_sockets
from upgrader.instance.announcements import Announcements
from upgrader.instance.callers import is_of_unit, require_root, require_takeover
from upgrader.instance.control_listener import Caller
from upgrader.instance.exec_mode import Execution, command
from upgrader.instance.guard import guard_of
from upgrader.instance.interfaces import Keeper
from upgrader.instance.lender import Lender
from upgrader.instance.live_source import MigrationRequest
from upgrader.instance.offer import Offer
from upgrader.instance.phases import News
from upgrader.instance.self_description import Describer
from upgrader.instance.self_report import SelfReport
from upgrader.instance.successor import Successor
from upgrader.instance.turns import Settled
from upgrader.protocol import channel, records
from upgrader.protocol.fd import Fd
from upgrader.protocol.parameters import FD_STORE_ONLY, Mechanism
from upgrader.protocol.phase import Decision, Phase
from upgrader.protocol.varlink import INTERFACE, VarlinkError, invalid, refused
from upgrader.protocol.varlink_types import Last, Refusal
from upgrader.systemd.cgroup import unit_of

_GO = 10.0  # seconds that a destination may take between its negotiation and Go
_DECIDED = 5.0  # seconds that Cancel and Withdraw wait for the decision
_REMEMBERED = 16  # upgrades that were withdrawn before they began
_PHASES = {Code.CANCELLED: Phase.CANCELLED, Code.PREFLIGHT_PASSED: Phase.PREFLIGHT}
_NEVER_REGISTERED = "takeover has ended, and had not started a new version"
_PASSED = "preflight passed: all was loaded and checked"
_GONE = "takeover has ended, so nobody waited for the new version"


class Negotiation:
    """Implements `control.Answers`. `on_request` is called, in a thread of its own, for a
    destination that is ready."""

    def __init__(
        self,
        host: SelfReport,
        library: str,
        on_request: Callable[[MigrationRequest | Execution], object],
        on_reload: Callable[[], object],
        keeper: Keeper,
        on_settle: Callable[[], Settled] = lambda: Settled([], []),
    ) -> None:
        self._host = host
        self._describer = Describer(host, library)
        self._on_request = on_request
        self._on_reload = on_reload
        self._lender = Lender(host.declarations, keeper)
        self._guard = guard_of(())  # of what is lent
        self._on_settle = on_settle
        self._announced = Announcements()
        self._withdrawn: deque[str] = deque(maxlen=_REMEMBERED)
        self._preflight = False  # the migration under way, or the last one, is only a preflight
        self._lock = threading.Lock()
        self._successor: Successor | None = None
        self._since = 0.0
        self._migrating = False
        self._channel: socket.socket | None = None
        self._called_off: tuple[Code, str] | None = None
        self.offer = Offer()  #: what the destination has said that it takes

    def describe(self) -> dict[str, Any]:
        """All there is to know."""
        told: dict[str, Any] = msgspec.to_builtins(self._describer.describe(self._announced))
        return told

    def describe_to_all(self) -> dict[str, Any]:
        """What everybody may know; of several who ask in no time, all are told the same."""
        return self._describer.describe_to_all(self._announced)

    def query(self) -> News:
        """The migration under way, or the last one."""
        return self._host.progress.news

    def set_parameters(self, caller: Caller, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Set some, and say what holds then."""
        require_root(caller)
        wanted = parameters.get("parameters")
        if not isinstance(wanted, dict):
            raise invalid("parameters")
        for name, value in wanted.items():
            if not isinstance(value, str):
                raise invalid(name)
        try:
            self._host.override(wanted)
        except ParameterError as error:
            raise invalid(f"{error.name}: {error.reason}") from error
        return {"parameters": self._host.parameters.shown()}

    def cancel(self, caller: Caller) -> dict[str, Any]:
        """Call off the migration under way: the source serves on, unless it is too late.

        As when it gives up by itself: an Ack that is already queued still counts, and a later one
        fails at the destination.
        """
        require_root(caller)
        with self._lock:
            if self._successor is None or not self._successor.alive:
                raise VarlinkError(f"{INTERFACE}.NothingToCancel", {})
            self._call_off(Code.CANCELLED, Phase.CANCELLED.value)
        progress = self._host.progress
        progress.wait_decided(progress.last.id, _DECIDED)
        self._lender.wait_clean()
        now = progress.now
        if now.phase is not Phase.CANCELLED:
            raise VarlinkError(f"{INTERFACE}.TooLate", {"phase": now.phase})
        return {"migration": msgspec.to_builtins(now)}

    def expect(self, caller: Caller, upgrade: str) -> None:
        """An operator has asked for an upgrade, not for a reload."""
        require_root(caller)
        self._announced.upgrade(upgrade)

    def announce(self) -> str:
        """The next reload is an upgrade that this instance wants itself; returns its id."""
        return self._announced.upgrade()

    def take_back(self, upgrade: str) -> None:
        """No reload comes for this id."""
        self._announced.take_back(upgrade)

    def preflight(self, caller: Caller, upgrade: str) -> None:
        """An operator wants to know whether the new version would take over."""
        require_root(caller)
        self._announced.preflight(upgrade)

    def withdraw(self, caller: Caller, upgrade: str) -> dict[str, Any]:
        """Call off an upgrade that nobody waits for any more, unless it is too late, and say how it is
        decided.

        One that was not registered cannot be any more. Raises VarlinkError for one without an id.
        """
        require_root(caller)
        if not upgrade:
            raise invalid("upgrade")
        with self._lock:
            progress = self._host.progress
            if progress.last.id != upgrade:
                self._withdrawn.append(upgrade)
                self._announced.take_back(upgrade)
                gone = Last(
                    upgrade, "source", Decision.ABORTED, Code.TAKEOVER_GONE, _NEVER_REGISTERED,
                    source=self._host.generation, destination=self._host.generation + 1,
                )  # fmt: skip
                return {"last": msgspec.to_builtins(gone)}
            self._call_off(Code.TAKEOVER_GONE, _GONE)
        decided = progress.wait_decided(upgrade, _DECIDED)
        self._lender.wait_clean()
        return {"last": msgspec.to_builtins(decided)}

    def try_states(self, caller: Caller) -> dict[str, Any]:
        """Find out which states can be saved as they are now."""
        require_root(caller)
        return {"trials": msgspec.to_builtins(self._host.try_states())}

    def settle(self, caller: Caller) -> dict[str, Any]:
        """Wait, serving, until a restart would cut nothing in two, and could park the rest."""
        require_root(caller)
        settled = self._on_settle()
        if settled.busy:
            raise refused(str(BusyWork(settled.busy)), Code.BUSY_WORK)
        try:
            with contextlib.suppress(OSError):  # no free numbers: for parking, some are kept
                channel.require_room()
        except ChannelError as error:
            raise refused(str(error), Code.SOURCE_FAILED) from error
        self._announced.restart()
        return {"cut": settled.cut}

    @property
    def restart_announced(self) -> bool:
        """Whether a restart is about to come, as far as its caller has said."""
        return self._announced.restart_due

    def reload(self, caller: Caller) -> None:
        """Run what the author wants at a reload, and wait for it."""
        require_takeover(caller, self._host.unit)
        watched = self._host.watched
        read = watched.before_reload()
        try:
            self._on_reload()
            watched.reloaded(read)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise VarlinkError(f"{INTERFACE}.ReloadFailed", {"why": why}) from error

    def register(self, caller: Caller, pid: int, upgrade: str) -> None:
        """Only takeover, and only one process at a time, which must belong to this unit."""
        root = require_takeover(caller, self._host.unit)
        if not self._host.parameters.enabled:
            raise refused("UPGRADER=off: it is a plain service, and can only be restarted")
        if self._host.parameters.mechanism is Mechanism.FD_STORE:
            raise refused(FD_STORE_ONLY, Code.LIMIT)
        problem = self._host.unsavable()
        self._lender.wait_clean()
        with self._lock:
            if upgrade in self._withdrawn:
                raise refused("nobody waits for this upgrade any more", Code.TAKEOVER_GONE)
            if self._migrating:
                age = time.monotonic() - self._since
                holder = self._successor.pid if self._successor else os.getpid()
                raise _busy(f"process {holder}, since {age:.1f} s")
            if self._successor:  # left behind by a takeover that was killed
                self._successor.kill()
                self._successor = None
            try:
                successor = Successor(pid)
                with open(f"/proc/{pid}/cgroup", encoding="ascii", errors="replace") as file:
                    group = file.read()
            except OSError as error:
                raise refused(f"process {pid}: {error.strerror}") from error
            if not is_of_unit(group, self._host.unit, root):
                raise refused(f"process {pid} belongs to {unit_of(group) or 'no unit'}")
            self._successor = successor
            self._lender.begin()
            self._since = time.monotonic()
            self._called_off = None
            expected, self._preflight = self._announced.begin()
            # A takeover of interface 1 does not say for which upgrade it was started.
            upgrade = upgrade or expected
            host = self._host
            host.progress.begin(
                "live", host.generation, destination=host.generation + 1, pid=pid, upgrade=upgrade,
                preflight=self._preflight,
            )  # fmt: skip
            if problem:  # before the new version is started
                self._successor = None
                self._abort(Code.SOURCE_FAILED, problem)
                raise refused(problem, Code.SOURCE_FAILED)

    def revoke(self, caller: Caller, pid: int, why: str, code: Code) -> None:
        """Call off the upgrade of a process, and wait until nothing is left of it; raises Busy until
        it is decided, if it migrates."""
        require_takeover(caller, self._host.unit)
        with self._lock:
            if self._successor is not None and self._successor.pid == pid:
                self._call_off(code, why)
                if self._migrating:
                    raise _busy(f"process {pid}, which migrates")
        self._lender.wait_clean()

    def _call_off(self, code: Code, reason: str) -> None:
        """Have the upgrade under way fail for this reason, unless it is decided otherwise."""
        if self._successor is None or self._host.progress.last.decision is not Decision.NONE:
            return
        if self._channel is None:  # it has not said Go, and now it never will
            self._successor.kill()
            self._successor = None
            self._migrating = False
            self._abort(code, reason)
            return
        self._called_off = self._called_off or (code, reason)
        with contextlib.suppress(OSError):  # it has ended by itself
            self._channel.shutdown(socket.SHUT_RD)

    def _abort(self, code: Code, reason: str) -> None:
        """Decide that this instance serves on; what was decided before stays."""
        progress = self._host.progress
        if progress.last.decision is not Decision.NONE:
            return
        progress.enter(_PHASES.get(code, Phase.FAILED), code=code, reason=reason)
        self._lender.give_up()
        if self._preflight:
            return
        refusal = None
        if code.suspects_version:
            refusal = Refusal(
                progress.last.id, code, reason, self._host.watched.look().fingerprint,
                round(time.time(), 3),
            )  # fmt: skip
        self._host.refused(reason, refusal)

    def lend(self, caller: Caller, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Agree as to a migration, and lend all sockets: this instance serves on."""
        with self._lock:
            self._agree(caller, parameters)
            others = self._host.declarations.backends.values()
            moving = [each for each in others if self.crosses(each.name)]
            self._guard = guard_of(moving)
            return dict(self._lender.offer(moving))

    def lending(self, sock: socket.socket) -> None:
        """Send what is lent, and keep what the destination has kept, until that hangs up: then it
        migrates or has ended, which takeover says as well, and better."""
        successor, upgrade = self._successor, self._host.progress.last.id
        self._lender.returned.clear()
        with sock, self._guard, contextlib.suppress(OSError):
            sock.settimeout(None)
            self._lender.send(sock)
            while kept := lent_sockets.next_kept(sock):
                sock.sendall(self._keep_for(successor, *kept).encode() + b"\0")
        self._lender.returned.set()
        self._host.progress.wait_decided(upgrade, _DECIDED)
        with self._lock:
            if successor and self._successor is successor and not self._migrating:
                self._call_off(Code.ENDED_EARLY, "the new version has ended before it was ready")

    def wait_returned(self, seconds: float) -> bool:
        """Wait until the destination has hung up after that, if it has borrowed anything; returns
        whether it has."""
        return self._lender.returned.wait(seconds)

    def _keep_for(self, successor: Successor | None, name: str, fd: Fd) -> str:
        with self._lock, fd:
            if self._successor is not successor:
                return "nobody waits for this upgrade any more"
            return self._lender.keep(name, fd)

    def negotiate(self, caller: Caller, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Agree to a migration before anything is disturbed, or say what does not fit."""
        with self._lock:
            self._agree(caller, parameters)
            self._migrating = True
            return {"generation": self._host.generation, "stream": self.offer.stream}

    def _agree(self, caller: Caller, parameters: Mapping[str, Any]) -> None:
        """Raise VarlinkError unless this is the registered process, and what it offers fits."""
        successor = self._successor
        # Held by pidfd: while it lives, its number is not given to another process.
        if successor is None or successor.pid != caller.pid or caller.gone or not successor.alive:
            raise refused(f"process {caller.pid} was not registered by takeover")
        if parameters.get("upgrade") not in (None, self._host.progress.last.id):
            raise refused(f"process {caller.pid} was started for another upgrade")
        try:
            host = self._host
            self.offer = Offer.read(parameters, host.declarations, host.parameters.transfers)
        except VarlinkError as error:
            code = Code(error.parameters.get("code", Code.REFUSED))
            self._abort(code, str(error.parameters.get("why", error)))
            raise

    def migrate(self, sock: socket.socket) -> None:
        """Wait for Go, then hand the channel to the loop that serves."""
        successor = self._successor
        sock.settimeout(_GO)
        try:
            item = channel.receive(sock, peek=False, wait=True)
        except (UpgradeError, OSError):
            item = None
        with self._lock:
            current = successor is not None and self._successor is successor
            goes = current and item is not None and isinstance(item[0], records.Go)
            if goes:
                self._channel = sock
        if successor is None or not goes:
            sock.close()
            if successor and current:
                successor.kill()  # cleaning up, as takeover may be gone by now
                self.over(Code.ENDED_EARLY, "the new version never said that it is ready")
            return
        self._guard.stop()
        self._host.progress.enter(Phase.COLLECTING)
        self._on_request(MigrationRequest(sock, successor, self.offer.stream))

    def over(self, code: Code, reason: str) -> tuple[Code, str]:
        """The migration has ended, and this instance serves on; returns why, as it is told."""
        if code is Code.PREFLIGHT_PASSED:
            reason = _PASSED
        with self._lock:
            successor, self._successor = self._successor, None
            self._migrating = False
            self._channel = None
            self.offer = Offer()
            if self._called_off:
                if successor:
                    successor.kill()
                # To the source, a channel that was shut looks like one that has ended by itself.
                told = code not in (Code.ENDED_EARLY, Code.UNKNOWN)
                if not told or self._called_off[0] is Code.CANCELLED:
                    code, reason = self._called_off
            self._abort(code, reason)
        return code, reason

    def execute(self, caller: Caller, parameters: Mapping[str, Any], upgrade: str) -> NoReturn:
        """Become another program; answers only if that fails."""
        require_root(caller)
        words = parameters.get("command") or []
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise invalid("command")
        try:
            execution = Execution(
                command(words, self._host.unit, self._host.notify_socket), upgrade
            )
            execution.check()
        except (UpgradeError, OSError) as error:
            raise refused(str(error)) from error
        if problem := self._host.unsavable():
            raise refused(problem, Code.SOURCE_FAILED)
        with self._lock:
            if self._successor and self._successor.alive:
                raise _busy(f"process {self._successor.pid}")
            if self._migrating:
                raise _busy("another execution")
            self._migrating = True
            self._since = time.monotonic()
            self._called_off, self._preflight = None, False
            host = self._host
            host.progress.begin(
                "exec", host.generation, destination=host.generation + 1, pid=os.getpid(),
                upgrade=upgrade or uuid.uuid4().hex,
            )  # fmt: skip
        host.progress.enter(Phase.COLLECTING)
        self._on_request(execution)
        raise VarlinkError(f"{INTERFACE}.ExecFailed", {"why": execution.failed.result()})

    def crosses(self, backend: str) -> bool:
        """Whether both sides want the connections of a backend to move."""
        return self._host.parameters.transfers(backend) and backend not in self.offer.withheld

    def tls_trust(self, listener: str) -> str | None:
        """What decides at the destination which certificates of clients are trusted at a listener whose
        TLS connections it takes; None if it does not."""
        return self.offer.tls.get(listener)

    def speaks_tls(self, listener: str) -> bool:
        """Whether all connections of a listener speak TLS at the destination."""
        return listener in self.offer.speak_tls


def _busy(holder: str) -> VarlinkError:
    return VarlinkError(f"{INTERFACE}.Busy", {"holder": holder})
