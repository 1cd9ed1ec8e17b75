# SPDX-License-Identifier: LGPL-2.1-or-later
"""In-place upgrades of systemd services that nobody notices: what authors import."""

from typing import TYPE_CHECKING, Any

from upgrader.attach import attach
from upgrader.blocking import Instance
from upgrader.declarations import Datagrams, Declared, Listener
from upgrader.errors import (
    ChannelError,
    DeclarationError,
    IncompatibleState,
    Retired,
    UnclaimedError,
    UpgradeError,
    VerifyError,
)
from upgrader.inbox import Frame, MessageTooLong
from upgrader.instance import Ended
from upgrader.state import convert, convert_back, since, state

if TYPE_CHECKING:
    from upgrader.aio import Peer

__version__ = "0.1.0"

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
    "Retired",
    "UnclaimedError",
    "UpgradeError",
    "VerifyError",
    "attach",
    "convert",
    "convert_back",
    "since",
    "state",
]


def __getattr__(name: str) -> Any:
    # `upgrader.Peer` is the asyncio one; asyncio is loaded only by those who use it.
    if name == "Peer":
        from upgrader.aio import Peer

        return Peer
    raise AttributeError(f"module 'upgrader' has no attribute {name!r}")
