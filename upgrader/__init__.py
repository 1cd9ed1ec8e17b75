# SPDX-License-Identifier: LGPL-2.1-or-later
"""In-place upgrades of systemd services that nobody notices: what authors import.

Each name is loaded when it is first asked for: takeover needs none of them, and asyncio is loaded
only by those who use it.
"""

import sys

from upgrader.protocol.later import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from upgrader.aio import Peer
    from upgrader.attach import attach
    from upgrader.blocking.instance import Instance
    from upgrader.errors import (
        ChannelError,
        DeclarationError,
        IncompatibleState,
        Retired,
        UnclaimedError,
        UpgradeError,
        VerifyError,
    )
    from upgrader.instance.base import Ended
    from upgrader.instance.handles import Datagrams, Declared, Listener
    from upgrader.instance.inbox import Frame, MessageTooLong
    from upgrader.instance.peers import Peers
    from upgrader.protocol.state import convert, convert_back, since, state
    from upgrader.protocol.table import Table

__version__ = "0.1.0"

_PLACES = {
    "aio.peer": ("Peer",),
    "attach": ("attach",),
    "blocking.instance": ("Instance",),
    "instance.handles": ("Datagrams", "Declared", "Listener"),
    "errors": (
        "ChannelError",
        "DeclarationError",
        "IncompatibleState",
        "Retired",
        "UnclaimedError",
        "UpgradeError",
        "VerifyError",
    ),
    "instance.inbox": ("Frame", "MessageTooLong"),
    "instance.base": ("Ended",),
    "instance.peers": ("Peers",),
    "protocol.state": ("convert", "convert_back", "since", "state"),
    "protocol.table": ("Table",),
}

__all__ = [
    "ChannelError",
    "Datagrams",
    "DeclarationError",
    "Declared",
    "Ended",
    "Frame",
    "IncompatibleState",
    "Instance",
    "Listener",
    "MessageTooLong",
    "Peer",
    "Peers",
    "Retired",
    "Table",
    "UnclaimedError",
    "UpgradeError",
    "VerifyError",
    "attach",
    "convert",
    "convert_back",
    "since",
    "state",
]


_get = names("upgrader", _PLACES)
if not TYPE_CHECKING:
    __getattr__ = _get


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _Package(type(sys)):  # type: ignore[misc]
    """Keeps a name for what it means here: the import of the module would take it for itself."""

    attach = property(lambda _: _get("attach"), lambda _, module: None)


sys.modules[__name__].__class__ = _Package
