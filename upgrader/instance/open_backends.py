# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding the FDs of a declared backend that is no socket: in the image, in the FD store, or by opening
it anew. What is in the image is verified; what PID 1 kept over a crash has to fit what is declared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upgrader.errors import UnclaimedError

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from upgrader.instance.commit import LoadedInstance
    from upgrader.instance.declarations import Declarations
    from upgrader.instance.declared_backend import DeclaredBackend
    from upgrader.instance.interfaces import Closeable
    from upgrader.protocol import image
    from upgrader.protocol.fd import Fd
    from upgrader.systemd.fdstore import StoreName


class Received:
    """The FDs of one backend as they came, with their entries."""

    def __init__(self) -> None:
        self.entries: list[image.ManifestEntry] = []
        self.fds: list[Fd] = []

    def add(self, entry: image.ManifestEntry, fd: Fd) -> None:
        """One more."""
        self.entries.append(entry)
        self.fds.append(fd)


def check_declared(declarations: Declarations, entry: image.ManifestEntry) -> bool:
    """Whether this program declares the backend of an entry, as of that kind."""
    declared = declarations.backends.get(entry.backend)
    return declared is not None and declared.kind.kind == entry.kind


def load_received(declared: DeclaredBackend, received: Received, manifest: image.Manifest) -> str:
    """Verify what came of a backend, and use it; returns why it is of no use any more, if so. Raises a
    RefusedError that names it, and nothing has changed."""
    described = (manifest.backends or {}).get(declared.name)
    if described is None:
        raise UnclaimedError([f"{declared.item}, of which nothing is said"])
    declared.verify(received.entries, received.fds, described)
    if why := declared.stale(received.fds):
        return why
    declared.adopt()
    declared.use(received.fds)
    return ""


def open_backend(
    declared: DeclaredBackend,
    stored: MutableMapping[StoreName, Fd],
    loaded: LoadedInstance,
    opened: list[Closeable],
    *,
    transfers: bool,
) -> None:
    """Open a backend unless it has come in the image, and see to it that PID 1 keeps it.

    `transfers`: it may be what another instance had; then it is taken from `stored`. `opened` gets
    what must be closed should the instance refuse to load. Raises BackendError.
    """
    kept = _take_stored(declared, stored)
    fds = list(kept.values())
    whole = declared.stored_name(len(kept)) not in loaded.unwanted  # else one of them was set aside
    if not declared.fds and kept and whole and transfers and not declared.stale(fds):
        opened += fds
        declared.require(fds)
        declared.use(fds)
    elif not declared.fds:
        for fd in fds:
            fd.close()  # before it is opened anew: it may be there only once
        loaded.unwanted += kept
        kept = {}
        fds = declared.open()
        opened += fds
        declared.use(fds)
    else:
        for fd in fds:
            fd.close()
    if declared.kind.persistent and transfers:
        names = declared.stored_names
        loaded.unwanted += [name for name in kept if name not in names]
        loaded.persistent += [
            (name, fd)
            for name, fd in zip(names, declared.fds, strict=True)
            if name not in kept or name in loaded.unwanted
        ]


def _take_stored(
    declared: DeclaredBackend, stored: MutableMapping[StoreName, Fd]
) -> dict[StoreName, Fd]:
    """What PID 1 has kept of a backend, in its order."""
    found: dict[StoreName, Fd] = {}
    while (name := declared.stored_name(len(found))) in stored:
        found[name] = stored.pop(name)
    return found
