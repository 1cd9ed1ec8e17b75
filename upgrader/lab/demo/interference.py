# SPDX-License-Identifier: LGPL-2.1-or-later
"""Interfere with an upgrade under way: wait for its phases, and signal the processes in it."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Self

import msgspec

from upgrader.lab.demo.bad_versions import LOADED
from upgrader.lab.demo.options import DemoError
from upgrader.lab.demo.stage import SERVICE, Stage
from upgrader.lab.demo.succession import connect, inside, processes
from upgrader.protocol.fd import Fd
from upgrader.protocol.phase import Phase
from upgrader.protocol.varlink import INTERFACE, VarlinkError
from upgrader.protocol.varlink_client import watch
from upgrader.protocol.varlink_types import Migration

#: Seconds in which the next phase must come.
_PHASE = 30.0


class Interference:
    """One upgrade, watched from before it is asked for."""

    def __init__(self, stage: Stage) -> None:
        """Raises DemoError if the source does not answer."""
        self._stage = stage
        self._fds: dict[str, Fd] = {}
        self._sock = connect(stage.machine, SERVICE)
        self._sock.settimeout(_PHASE)
        self._phases = self._watch()
        self._loaded = inside(stage.machine, f"/run/{SERVICE.removesuffix('.service')}/{LOADED}")
        self._loaded.unlink(missing_ok=True)
        try:
            self._hold("source", int(stage.show("MainPID")))
            next(self._phases)  # what was before; the source listens now
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        # A phase lasts for milliseconds: this thread must run as soon as it hears of it.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(2))
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        self._close()

    def wait_for(self, phase: Phase) -> None:
        """Wait for `phase`, and return at once when it comes; raises DemoError if it never does.

        The source announces LOADING before it sends the image, so for this one wait until the new
        version says that it has everything.
        """
        for migration in self._phases:
            if migration.phase is Phase.SETUP:
                # Now, because later there is no time: each is held until it is needed.
                self._hold("destination", migration.pid)
                self._hold("takeover", int(self._stage.show("ControlPID")))
            if migration.phase is phase:
                if phase is Phase.LOADING:
                    self._wait_until_loaded()
                return
            if migration.phase.ended:
                reason = migration.reason or migration.phase
                raise DemoError(f"the upgrade ended before it was {phase}: {reason}")
        raise DemoError(f"the upgrade never was {phase}")

    def kill(self, who: str) -> None:
        """Send SIGKILL to the source, the destination or takeover; it may have ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fds[who].fileno(), signal.SIGKILL)

    def systemctl(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run systemctl meanwhile, and wait for its end."""
        return self._stage.machine.run(["systemctl", *words], check=False)

    def _close(self) -> None:
        self._sock.close()
        for fd in self._fds.values():
            fd.close()

    def _wait_until_loaded(self) -> None:
        deadline = time.monotonic() + _PHASE
        while not self._loaded.exists():
            if time.monotonic() > deadline:
                raise DemoError("the new version has never loaded the image")
            time.sleep(0.001)

    def _watch(self) -> Iterator[Migration]:
        with contextlib.suppress(OSError, VarlinkError):  # the source has ended
            for answer in watch(self._sock, f"{INTERFACE}.QueryMigration"):
                yield msgspec.convert(answer.get("migration"), Migration)

    def _hold(self, who: str, pid: int) -> None:
        outside = processes(self._stage.machine, SERVICE).get(pid)
        if outside is None:
            raise DemoError(f"the {who} (process {pid} inside) is gone too early")
        self._fds[who] = Fd(os.pidfd_open(outside))
