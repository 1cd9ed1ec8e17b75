# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keep devices as they are while a destination that prepares itself holds them as well: a program that is
started on one sets it as it likes, and the source serves on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Self

from upgrader.errors import UpgradeError
from upgrader.instance.declared_backend import DeclaredBackend

_OFTEN = 0.001  # seconds in which frames may be lost


class Guard:
    """Sets again, in a thread, whatever is set otherwise than when it began; as long as a `with` lasts,
    or until `stop`: from the freeze on, a destination may soon own it."""

    def __init__(self, backends: Sequence[DeclaredBackend]) -> None:
        self._said = {}
        for backend in backends:
            with contextlib.suppress(UpgradeError):
                if backend.guarded:
                    self._said[backend] = backend.describe()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upgrader-guard", daemon=True)

    def __enter__(self) -> Self:
        if self._said:
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
        while self._said and not self._over.wait(_OFTEN):
            for backend, described in list(self._said.items()):
                if not backend.serve_on(described):
                    del self._said[backend]
