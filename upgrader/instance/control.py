# SPDX-License-Identifier: LGPL-2.1-or-later
"""The socket of one instance, if it has one: made, opened, named anew and closed.

What is answered there is `negotiation`'s, and how is `control`'s.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from upgrader import __version__
from upgrader.instance.process import ENVIRONMENT, begin_thread, free_numbers
from upgrader.instance.self_report import SelfReport
from upgrader.instance.turns import Settled
from upgrader.protocol.later import load_all
from upgrader.protocol.rendezvous import DRAINING, socket_name, socket_path
from upgrader.systemd.listen_fds import own_number

if TYPE_CHECKING:  # loaded by the instances that can be asked
    from upgrader.instance.control_answers import Negotiation
    from upgrader.instance.control_listener import Places
    from upgrader.instance.control_socket import Control
    from upgrader.instance.exec_mode import Execution
    from upgrader.instance.interfaces import Keeper
    from upgrader.instance.live_source import MigrationRequest

#: Free numbers of FDs that clients do not use up before the socket is made.
_PLENTY = 1024
#: What an instance that can be asked loads, in pieces.
_ANSWERING = (
    "shutil",
    "upgrader.instance.exec_mode",
    "upgrader.instance.live_source",
    "upgrader.instance.source_steps",
    "upgrader.instance.copying",
    "upgrader.systemd.start_record",
    "upgrader.instance.control_calls",
    "upgrader.instance.control_answers",
    "upgrader.instance.control_socket",
)
_AGAIN = 1.0  # seconds until the socket is tried again
_TO_BE_FOUND = 1.0  # seconds that a new instance has to be found by those who ask
_PAUSE = 0.002  # seconds between two looks
_NOT_HEARD = "systemd cannot be asked from here, so there is no live upgrade"
#: Should it park at each SIGTERM, clients of a stopped unit would hang instead of being refused. Units
#: that the bus turns away, as dbus-daemon does with DynamicUser=, park: they cannot help it.
_HIDDEN = ", and systemctl restart is the same as a stop; upgrader restart keeps everything"
_log = logging.getLogger("upgrader")


class Answering:
    """An instance as it is asked by others; not at all without systemd."""

    def __init__(self, report: SelfReport, environment: Mapping[str, str]) -> None:
        self._report = report
        self._path = socket_path(environment)
        self._number = int(own_number(environment))
        invocation = environment.get("INVOCATION_ID", "")
        self._name = socket_name(invocation) if invocation else ""
        self._places: Places | None = None
        self._control: Control | None = None
        self._make: Callable[[], None] = lambda: None
        self._opened = self._closed = self._given_up = False
        self._failure = ""  # the last that was unexpected: said once, however often it is tried
        self.negotiation: Negotiation | None = None  #: who may migrate, once it can be asked

    def prepare(
        self,
        on_request: Callable[[MigrationRequest | Execution], object],
        on_reload: Callable[[], object],
        on_settle: Callable[[], Settled],
        keeper: Keeper,
        *,
        now: bool,
    ) -> None:
        """Say what the socket calls, in another thread; `keeper` keeps FDs of a destination. `now`: listen
        at once, beside the source: whoever asks for this instance then waits until it answers."""
        if not self._report.supervised:
            self._path = self._name = ""
            return
        if not self._path and not self._name:
            _log.info("no RuntimeDirectory=: this instance has no socket, and no live upgrade")
            return

        def make() -> None:
            from upgrader.instance.control_answers import Negotiation
            from upgrader.instance.control_socket import Control

            report = self._report
            self.negotiation = Negotiation(
                report, __version__, on_request, on_reload, keeper, on_settle
            )
            if self._places and not self._given_up:
                self._control = control = Control(self._places, self.negotiation, __version__)
                report.progress.on_change(control.announce)

        self._make = make
        if now:
            self._try(self._listen)

    def before_clients(self) -> None:
        """Make the socket now if FDs are scarce: once clients are served, they may use up all of
        them, and modules are loaded from files."""
        if free_numbers() < _PLENTY:
            self._try_to_make()

    def _ask_systemd(self) -> None:
        """Ask PID 1 what it has made this process from, once."""
        report = self._report
        if report.ask_settings or not (self._path or self._name):
            return
        from functools import partial

        from upgrader.systemd.start_record import ask_settings

        report.ask_settings = partial(
            ask_settings, report.unit, self._number, ENVIRONMENT, report.made_from
        )
        report.settings = found = report.ask_settings()
        if not found.heard:
            _log.warning("%s%s", _NOT_HEARD, _HIDDEN if report.bus_hidden else "")
        if found.directory:
            report.watched.add_directory(found.directory)

    def _listen(self) -> None:
        """Listen where callers will look for this instance."""
        if self._places or self._given_up or not (self._path or self._name):
            return
        from upgrader.instance.control_listener import Places

        self._places = Places(self._path or self._name)

    def open(self, then: Callable[[], object]) -> None:
        """Answer from now on; made in a thread if it is not there yet, and once clients have been answered.
        Call `then` in that thread, once it is done."""

        def opening() -> None:
            _after_first_clients()
            while not self._closed and not (self.take_place() and self._try_to_make()):
                time.sleep(_AGAIN)
            if self._closed:  # perhaps before there was something to close
                self.close()
                return
            if self._control:
                self._control.open()
            then()
            self._report.watched.read()
            self._report.try_states()

        self._opened = True
        begin_thread(opening)

    def _try_to_make(self) -> bool:
        """Load what is loaded later, and make what answers unless it is there; False as `_try`."""

        def load_and_make() -> None:
            self._ask_systemd()
            load_all(_ANSWERING if self._report.supervised else ())
            self._listen()
            self._make()
            self._make = lambda: None

        return self._try(load_and_make)

    def _try(self, step: Callable[[], None]) -> bool:
        """False if it may go well another time. After one that never will, nobody can ask it."""
        try:
            step()
        except OSError as error:
            _log.error("%s: nobody can ask this instance: %s", self._path or self._name, error)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                return False
            self._given_up = True
            if self._places:
                self._places.close()
        except Exception as error:  # a module may be missing while its package is replaced
            if self._failure != (failure := repr(error)):
                self._failure = failure
                _log.exception("%s: nobody can ask this instance yet", self._path or self._name)
            return False
        return True

    def drain(self) -> None:
        """Be found beside the new instance, until this process ends."""
        if self._control and self._path:
            from upgrader.instance.control_listener import beside

            path = beside(self._path, DRAINING.format(self._report.generation))
            try:
                self._control.also_at(path)
            except OSError as error:
                _log.warning("%s: %s: nobody sees what is drained here", path, error.strerror)

    def take_place(self) -> bool:
        """From now on, have those who ask wait for this instance and not find the source; where there was
        none, it is found once it answers. False if that may go well another time."""
        return self._try(self._places.open) if self._places and not self._given_up else True

    def leave_place(self, other_lives: Callable[[], bool]) -> None:
        """Answer until those who ask find the new instance, and whoever has come before is answered; for as
        long as that lives, and not for long."""
        if not (self._places and self._control):
            return
        _after_first_clients()
        give_up = time.monotonic() + _TO_BE_FOUND
        while not self._places.taken and other_lives() and time.monotonic() < give_up:
            time.sleep(_PAUSE)
        self._control.finish()

    def close(self) -> None:
        """Answer no more, and open nothing for it."""
        self._closed = True
        if self._control:
            self._control.close()
        elif self._places and self._opened:  # the thread ends the rest
            self._places.remove()
        elif self._places:
            self._places.close()

    @property
    def restart_announced(self) -> bool:
        """Whether somebody has said that a restart comes."""
        return self.negotiation is not None and self.negotiation.restart_announced

    def crosses(self, backend: str) -> bool:
        """Whether the connections of a backend move, as far as this side knows."""
        if self.negotiation:
            return self.negotiation.crosses(backend)
        return self._report.parameters.transfers(backend)

    def tls_trust(self, listener: str) -> str | None:
        """As the destination of a live migration has said; see `Negotiation.tls_trust`."""
        return self.negotiation.tls_trust(listener) if self.negotiation else None

    def speaks_tls(self, listener: str) -> bool:
        """As the destination of a live migration has said; see `Negotiation.speaks_tls`."""
        return self.negotiation is not None and self.negotiation.speaks_tls(listener)

    def reader(self, listener: str) -> int | None:
        """The version of what goes with connections of a listener that a destination can read, 0 if it
        does not say; None if there is none that could be asked."""
        return self.negotiation.offer.reader(listener) if self.negotiation else None


def _after_first_clients() -> None:
    """Wait while the loop has the CPU for those who have waited for the commit."""
    from upgrader.systemd.precedence import FIRST_CLIENTS  # too much before READY

    time.sleep(FIRST_CLIENTS)
