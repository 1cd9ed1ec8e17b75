# SPDX-License-Identifier: LGPL-2.1-or-later
"""The TLS connections of an image: their secrets are taken from the memory in which they have crossed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from upgrader.errors import ImageError, MismatchError
from upgrader.instance.declarations import Declarations
from upgrader.protocol import image
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import identify
from upgrader.protocol.kinds import Kind
from upgrader.protocol.tls_state import TlsSecrets


def take(manifest: image.Manifest, fds: Sequence[Fd], here: Declarations) -> dict[int, Any]:
    """The TLS connections (each a `tls.moved.Moved`) by the places of their entries; the secrets are
    gone from where they were, and that is closed. `fds` are those of the manifest's entries, in its order.

    Raises ImageError if states, secrets and connections do not fit each other, or a listener that takes
    no TLS connections has one; MismatchError for another file.
    """
    states = manifest.tls or {}
    secrets: dict[int, TlsSecrets] = {}
    takes = here.moving_tls()
    for entry, fd in zip(manifest.entries, fds, strict=False):
        if entry.kind != Kind.SECRETS or not takes:
            continue
        if identify(fd) != entry.identity:
            raise MismatchError(str(entry), entry.identity, identify(fd))
        from upgrader.protocol import secret_memory  # there since TLS was declared

        secrets = secret_memory.take(fd)
    if states.keys() != secrets.keys():
        raise ImageError("secrets", f"of {len(secrets)} connections, and {len(states)} speak TLS")
    for place in states:
        if not 0 <= place < len(manifest.entries) or not manifest.entries[place].connection:
            raise ImageError("secrets", f"of entry {place}, which is no connection")
        entry = manifest.entries[place]
        if entry.backend not in takes and entry.backend not in here.dropped:
            raise ImageError(str(entry), "speaks TLS, and none is taken there")
    return {
        place: takes[manifest.entries[place].backend].load(state, secrets[place])
        for place, state in states.items()
        if manifest.entries[place].backend in takes
    }
