# SPDX-License-Identifier: LGPL-2.1-or-later
"""An instance as the destination: it loads, becomes the owner or says why not, and is trusted then.

It gives nothing away; `source_side` does.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, NoReturn

from upgrader.backends.listener import bind
from upgrader.codes import Code
from upgrader.errors import BindError, ChannelError, PreflightPassed, UpgradeError, VerifyError
from upgrader.instance.commit import LoadedInstance
from upgrader.instance.control import Answering
from upgrader.instance.declared_socket import check_name
from upgrader.instance.load import Loader
from upgrader.instance.process import begin_thread, is_main, reserve
from upgrader.instance.self_report import SelfReport
from upgrader.protocol.collector import no_collection
from upgrader.protocol.fd import Fd
from upgrader.protocol.later import load_for_loading
from upgrader.protocol.rendezvous import EXECUTED, PREFLIGHT, PREFLIGHT_1, TAKEOVER, UPGRADE
from upgrader.systemd.fdstore import FdStore, Stored, StoreName
from upgrader.systemd.listen_fds import Passed, forget, take
from upgrader.systemd.notify import one_line

if TYPE_CHECKING:  # loaded by the instances that migrate live
    from upgrader.instance.lent_sockets import Borrowed
    from upgrader.instance.live_destination import LiveDestination
    from upgrader.protocol.identity import HasFileno

#: Seconds that a new owner waits for PID 1 to take it for the main process.
NAMED = 2.0
#: FDs that parking opens at once (channel, image, ledger, barrier, bus, journal), and some.
_RESERVED = 16
#: How many of them a question to systemd takes (bus, and what the author's own threads may take).
_LENT = 4

_log = logging.getLogger("upgrader")


class DestinationSide:
    """The part of an instance that comes from another one."""

    def __init__(
        self,
        report: SelfReport,
        store: FdStore,
        answering: Answering,
        environment: MutableMapping[str, str],
    ) -> None:
        self.committing = False  #: from here on it owns, or knows that it must not
        self._report = report
        self._store = store
        self._answering = answering
        self._passed = take(environment)
        self._executed = EXECUTED in environment
        self._preflight = not {PREFLIGHT, PREFLIGHT_1}.isdisjoint(environment)
        if self._executed:
            from upgrader.instance.exec_mode import carried

            self._passed += carried(environment)
        # The id of the one that it is started in, and what PID 1 has told takeover.
        self._upgrade, _, word = environment.pop(UPGRADE, "").partition(":")
        given_by_pid_1 = not self._executed and TAKEOVER not in environment
        report.made_from = None if given_by_pid_1 else word
        self._reserve: list[Fd] = []
        self._settled = threading.Event()  # PID 1 listens to this process
        self._insured: StoreName | None = None
        self._forgetting: threading.Thread | None = None
        self._migration = self._destined(environment)
        self._borrowed: Borrowed | None = None  # from before Go to the commit
        self._returned: Borrowed | None = None  # from there on, until clients are served

    def _destined(self, environment: MutableMapping[str, str]) -> LiveDestination | None:
        """The migration that takeover has started this process for, if any."""
        if TAKEOVER not in environment:
            return None
        with no_collection():
            from upgrader.instance.live_destination import LiveDestination

        forget(environment)
        return LiveDestination.from_line(
            environment.pop(TAKEOVER), self._upgrade,
            self._report.parameters.migration_timeout, self._report_failure,
        )  # fmt: skip

    @property
    def live(self) -> bool:
        """Whether takeover has started this process for a live migration."""
        return self._migration is not None

    def check_addresses(self) -> None:
        """Raise BindError for a declared address that another program has, as loading would: for
        programs that do much before. Whatever PID 1 has passed may have it, so nothing is said then."""
        if self._passed or self._executed or self.live:
            return
        for bound in self._report.declarations.sockets.values():
            for address in bound.addresses:
                try:
                    bind(address, bound.socket_type).close()
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        raise BindError(
                            f"{bound.kind} {bound.name!r}", str(error.strerror)
                        ) from error

    @property
    def waiting(self) -> tuple[HasFileno, HasFileno]:
        """The lines to takeover and to the source: readable once one is gone, as neither has anything
        to say to an instance that prepares itself."""
        assert self._migration
        assert self._borrowed
        return self._migration.takeover, self._borrowed

    def nobody_waits(self) -> NoReturn:
        """Give up, because one of them is gone; raises ChannelError."""
        assert self._migration
        self._migration.gone()

    # Loading

    def borrow(self) -> bool:
        """Open the declared sockets with what the source lends, and have what its program keeps; False
        if it cannot lend, or there is none. Raises ChannelError if it refuses this instance, or has
        other sockets."""
        if self._migration is None:
            return False
        declarations = self._report.declarations
        declarations.serving = True
        self._borrowed = self._migration.borrow(self._loader().offer())
        if self._borrowed is None:
            return False
        for bound in declarations.sockets.values():
            socks = self._borrowed.sockets.get(bound.name, ())
            alone = len(bound.addresses) == 1
            if not socks or not all(
                any(address.matches(sock, alone=alone) for sock in socks)
                for address in bound.addresses
            ):
                why = f"{bound.kind} {bound.name!r} is none of the running instance's"
                raise ChannelError(why, code=Code.LIMIT, remedy="restart the unit instead")
            bound.open(*socks)
        for name, backend in declarations.backends.items():
            if fds := self._borrowed.others.get(name):
                backend.require(fds)
                backend.use(fds)
        declarations.take_passed([], self._borrowed.kept)
        return True

    def _give_back(self) -> None:
        """Close what was borrowed, and stay connected: that is how the source knows of an end."""
        if self._borrowed:
            for bound in self._report.declarations.sockets.values():
                bound.close()
            for item in self._borrowed.kept:
                item.fd.close()
            for backend in self._report.declarations.backends.values():
                backend.close()
                backend.use(())

    def _loader(self) -> Loader:
        report = self._report
        return Loader(
            report.declarations, report.parameters, self._store, self._passed, self._migration,
            executed=self._executed, unit=report.unit if report.supervised else "",
        )  # fmt: skip

    def load(self) -> LoadedInstance:
        """Load everything; raises UpgradeError, and nothing is consumed."""
        report = self._report
        report.declarations.serving = True
        self._give_back()
        loader = self._loader()
        self._passed = []
        with no_collection():
            if self.live:
                load_for_loading()
            loaded = loader.load()
        report.generation = loaded.status.generation
        report.inherit(loaded.overrides)
        return loaded

    def commit(self, loaded: LoadedInstance, serve: Callable[[], None]) -> None:
        """Become the owner: `serve` runs as soon as it is, and `settle` has to be called once clients
        are served. Raises NotifyError or ChannelError, PreflightPassed where this is as far as it may
        go, and whatever `serve` raises."""
        if self._migration and self._preflight:
            raise PreflightPassed
        report = self._report

        def own() -> None:
            report.since = time.time()
            serve()

        self._answering.before_clients()
        self.committing = True
        loaded.commit(report.notifier, self._store, own)
        if not self._migration:
            self._settled.set()
        self._returned, self._borrowed = self._borrowed, None

    def settle(self, loaded: LoadedInstance) -> None:
        """Do what clients need not wait for, and say what this instance has been loaded from."""
        report = self._report
        if self._returned:
            self._returned.close()
        if migration := self._migration:
            migration.become_ordinary()
            self._answering.take_place()  # before another reload can come
            migration.release_takeover()
            source = str(loaded.status.source_generation)
            self._insured = StoreName(Stored.INSURANCE, source)
            begin_thread(lambda: self._settle(migration, loaded))
        self._reserve = reserve(_RESERVED + len(report.declarations.sockets))
        report.gap = loaded.gap
        report.loaded(loaded.status, self._upgrade, loaded.stayed)

    def refuse(self, error: BaseException) -> None:
        """Say why this instance could not be loaded, or did not have to be; an owner has been."""
        if self._report.since:
            return
        self._give_back()
        if self._migration:
            self._migration.refuse(error)
        else:
            self._report_failure(error)

    def _report_failure(self, error: BaseException) -> None:
        if isinstance(error, PreflightPassed):
            return
        text = f"{type(error).__name__}: {error}"
        with contextlib.suppress(UpgradeError):
            self._report.notifier.send(
                f"STATUS=failed to load: {one_line(text)}", "ERRNO=71"
            )  # EPROTO
        if self._report.supervised:  # at a desk, the error itself is seen
            self._report.failed("destination", "load", f"failed to load: {text}")
        self._answering.close()

    def keep(self, name: str, fd: HasFileno) -> None:
        """Store an FD for the program, in place of what was under that name; raises as documented at
        the instance."""
        check_name(f"keep({name!r})", name)
        if self._borrowed:  # PID 1 does not listen to this process yet
            self._borrowed.keep(name, fd)
            return
        declarations = self._report.declarations
        kept = Passed(name, Fd(os.dup(fd.fileno())))
        declarations.replace_kept(kept)
        stored = StoreName.of_kept(name)
        self._store.remove(stored)
        self._store.push(stored, kept.fd)

    def forget(self, name: str) -> None:
        """Give up what the program keeps under a name; raises as documented at the instance."""
        self._report.declarations.forget_kept(name)
        self._settled.wait(NAMED)  # until then, PID 1 listens to another process
        self._store.remove(StoreName.of_kept(name))

    # The first seconds of an owner

    def _settle(self, migration: LiveDestination, loaded: LoadedInstance) -> None:
        """In a thread: wait until PID 1 listens to this process, and tell it the rest."""
        migration.wait_for_source()
        migration.close()
        unit = self._report.unit
        if not is_main(unit):
            # The source has died, and takeover names this process.
            deadline = time.monotonic() + NAMED
            while not is_main(unit) and time.monotonic() < deadline:
                time.sleep(0.01)
        try:
            loaded.settle(self._report.notifier, self._store)
        except UpgradeError as error:
            _log.warning("%s", error)
        self._settled.set()

    @property
    def insurance(self) -> StoreName | None:
        """What the source has left in the FD store for this instance."""
        return self._insured

    def trust(self) -> bool:
        """This instance has lived through its first seconds: the insurance is not needed.

        False while the source may still park it: then ask again later.
        """
        if self._settled.is_set() and self._insured and not self._forgetting:
            # In a thread: PID 1 may take its time, and clients do not wait for it.
            self._forgetting = threading.Thread(target=self.forget_insurance, daemon=True)
            self._forgetting.start()
        return self._insured is None

    def forget_insurance(self) -> None:
        """Take it out of the FD store, if PID 1 can be told."""
        if insured := self._insured:
            with contextlib.suppress(UpgradeError):
                self._store.remove(insured)
            self._insured = None

    def wait_settled(self) -> None:
        """Before the end: wait until PID 1 listens to this process, but not for long."""
        if not self._settled.wait(NAMED):
            _log.warning("systemd has not said that this is the main process by now")

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Lend a few of the numbers that are kept for parking, to ask systemd with them."""
        del self._reserve[-_LENT:]
        try:
            yield
        finally:
            self._reserve += reserve(_LENT)

    def give_back(self) -> None:
        """Give back the numbers that were kept for parking, which begins now."""
        self._reserve.clear()

    def abandon(self, error: BaseException | None) -> None:
        """`attach` is left: tell the source why this never came as far as `serve`."""
        if self._migration and error is not None and not self._report.since:
            self._migration.refuse(error)


def refused_by_check(check: Callable[..., Any], error: Exception) -> VerifyError:
    """The error for a check that raised."""
    if isinstance(error, VerifyError):
        return error
    return VerifyError(f"{check.__qualname__} refused: {type(error).__name__}: {error}")
