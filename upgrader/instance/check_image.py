# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether an image fits its stream and the declarations of the program, before anything of it is touched."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from upgrader.errors import ImageError, UnclaimedError
from upgrader.instance.open_backends import check_declared
from upgrader.protocol.kinds import KIND_NAME, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from upgrader.instance.declarations import Declarations
    from upgrader.protocol import image
    from upgrader.protocol.channel import ReceivedImage


def check(
    declared: Declarations,
    manifest: image.Manifest,
    stream: ReceivedImage,
    single: Sequence[image.ManifestEntry],
) -> None:
    """Raise for a manifest that does not fit the stream or the declarations. `single`: the
    entries that are no connections."""
    if manifest.generation != stream.generation:
        raise ImageError("image", f"generation {manifest.generation}, not {stream.generation}")
    if manifest.service != declared.service:
        raise ImageError("image", f"of service {manifest.service!r}, this is {declared.service!r}")
    if manifest.count != stream.announced:
        raise ImageError("image", f"{manifest.count} entries, {stream.announced} FDs")
    for crowd in manifest.crowds or ():
        crowd.check()
        if len(stream.fds) < manifest.count:
            raise ImageError(str(crowd), f"are cut off after {len(stream.fds)} FDs")
    _check_unique([f"state {saved.name!r}" for saved in manifest.states])
    moved = {e.backend: e for e in manifest.entries if e.connection is not None}
    own = [e for e in single if e.kind not in (Kind.PASSED, Kind.SECRETS, Kind.TABLE)]
    _check_unique([str(entry) for entry in own if not entry.is_declared_by_kind])
    unclaimed = {  # what it is called in messages: the name it is declared under
        f"state {saved.name!r}": saved.name
        for saved in manifest.states
        if saved.name not in declared.states
    }
    for entry in own:
        if entry.is_declared_by_kind:
            if not re.fullmatch(KIND_NAME, entry.kind):
                raise ImageError(str(entry), "is of no kind that can be")
            known = check_declared(declared, entry)
        else:
            bound = declared.sockets.get(entry.backend)
            known = bound is not None and bound.kind == entry.kind
        if not known:
            unclaimed[str(entry)] = entry.backend
    for item in (*moved.values(), *(manifest.crowds or ())):  # one stands for all of a listener
        if item.backend not in declared.connections | declared.protocols:
            unclaimed[str(item)] = item.backend
    for backend, saved in manifest.sessions.items():
        connections = declared.connections.get(backend)
        if connections is not None and connections.session is None:
            unclaimed[f"state {saved.name!r} of connections of {backend!r}"] = saved.name
    left = sorted(item for item, name in unclaimed.items() if name not in declared.dropped)
    if left:
        raise UnclaimedError(left)


def _check_unique(items: Sequence[str]) -> None:
    for item, times in Counter(items).items():
        if times > 1:
            raise ImageError(item, f"is in the image {times} times")
