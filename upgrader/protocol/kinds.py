# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words for what moves and for what an instance is doing, and how an address is written; on the
wire."""

import os
from enum import StrEnum

#: Key of the metadata of a field of a state: the version from which on it is saved.
SINCE = "upgrader.since"


class Kind(StrEnum):
    """What a backend's FD is for."""

    LISTENER = "listener"
    DATAGRAMS = "datagrams"
    CONNECTION = "connection"
    #: What PID 1 would pass to a start besides the image, by its FDNAME; only live, and only to a
    #: destination that says that it knows this kind.
    PASSED = "passed"
    #: The secrets of the TLS connections of an image; only live, and only to a destination that says
    #: for which listeners it takes those.
    SECRETS = "secrets"
    #: A piece of a table, in a sealed memfd; only in an insurance.
    TABLE = "table"


#: The names of other kinds: ours have no dot, those of others have one. They are part of an FDNAME.
KIND_NAME = r"[a-z][a-z0-9-]{0,30}(\.[a-z][a-z0-9-]{0,30})?"


class Waiting(StrEnum):
    """Where the handler of a connection stood when it was frozen."""

    MESSAGE = "message"  #: for the next message, with nothing in hand
    SAFE = "safe"  #: inside `peer.safe()`: the state says where it stands
    CLOSING = "closing"  #: the handler is done, unsent bytes are left


class Standing(StrEnum):
    """What an instance is doing."""

    SERVING = "serving"
    MIGRATING = "migrating"
    DRAINING = "draining"  #: replaced; it ends what could not move
    STOPPING = "stopping"


def show_address(name: object) -> str:
    """A socket address as people write it: `[::1]:80`, `127.0.0.1:80`, `/run/x`, `@abstract`."""
    if isinstance(name, tuple) and len(name) >= 2:
        host = str(name[0])  # a number in some families, AF_VSOCK for one
        return f"[{host}]:{name[1]}" if ":" in host else f"{host}:{name[1]}"
    if isinstance(name, bytes):
        return "@" + name[1:].decode(errors="replace")
    # A path need not be UTF-8, what travels in an image must be.
    return os.fsencode(str(name)).decode(errors="replace") if name else ""
