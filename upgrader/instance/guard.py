# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keep devices as they are while another process holds them as well: a program that is started on one sets
it as it likes, and the source serves on."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import Self

from upgrader.errors import UpgradeError
from upgrader.instance.declared_backend import DeclaredBackend

_FIRST = -20  # nice(2)
_OFTEN = 0.0002  # seconds between two looks: a packet that comes in between may be lost


class Guard:
    """Sets again, in a thread, whatever is set otherwise; as long as a `with` lasts, or until `stop`."""

    def __init__(self, restore: Callable[[], bool]) -> None:
        """`restore` sets everything again, and says whether there is anything left to watch."""
        self._restore = restore
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upgrader-guard", daemon=True)

    def __enter__(self) -> Self:
        if self._restore():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Set nothing any more, once this has returned."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        # It must not wait for its turn: before all others if that is allowed, or before most.
        try:
            os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        except OSError:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _FIRST)
        while not self._over.wait(_OFTEN) and self._restore():
            pass


def guard_of(backends: Sequence[DeclaredBackend]) -> Guard:
    """A guard of backends, as they are now. Stop it at the freeze: from then on, a destination may soon
    own them."""
    said = {}
    for backend in backends:
        with contextlib.suppress(UpgradeError):
            if backend.guarded:
                said[backend] = backend.describe()

    def restore() -> bool:
        for backend, described in list(said.items()):
            if not backend.serve_on(described):
                del said[backend]
        return bool(said)

    return Guard(restore)
