# SPDX-License-Identifier: LGPL-2.1-or-later
"""What moves: one module a kind of backend. Identities and the state of a connection are `protocol`'s.

An FD is recognised by what it is, never by its number or its place in a list. Authors import the names
from here; each is loaded when it is first asked for.
"""

from upgrader.protocol.later import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from upgrader.backends.eventfd import EventFd
    from upgrader.backends.file import OpenFile
    from upgrader.backends.fuse import Fuse
    from upgrader.backends.inotify import Inotify
    from upgrader.backends.kind import BackendKind
    from upgrader.backends.memory import Memory
    from upgrader.backends.netlink import NetlinkSocket
    from upgrader.backends.opaque import Opaque
    from upgrader.backends.packet import PacketSocket
    from upgrader.backends.pidfd import Child
    from upgrader.backends.pipe import Pipe
    from upgrader.backends.pty import Pty
    from upgrader.backends.tap import Tap
    from upgrader.backends.timerfd import TimerFd
    from upgrader.backends.unix import UnixSocket

_PLACES = {
    "eventfd": ("EventFd",),
    "file": ("OpenFile",),
    "fuse": ("Fuse",),
    "inotify": ("Inotify",),
    "kind": ("BackendKind",),
    "memory": ("Memory",),
    "netlink": ("NetlinkSocket",),
    "opaque": ("Opaque",),
    "packet": ("PacketSocket",),
    "pidfd": ("Child",),
    "pipe": ("Pipe",),
    "pty": ("Pty",),
    "tap": ("Tap",),
    "timerfd": ("TimerFd",),
    "unix": ("UnixSocket",),
}

__all__ = [
    "BackendKind",
    "Child",
    "EventFd",
    "Fuse",
    "Inotify",
    "Memory",
    "NetlinkSocket",
    "Opaque",
    "OpenFile",
    "PacketSocket",
    "Pipe",
    "Pty",
    "Tap",
    "TimerFd",
    "UnixSocket",
]

if not TYPE_CHECKING:
    __getattr__ = names("upgrader.backends", _PLACES)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
