# SPDX-License-Identifier: LGPL-2.1-or-later
"""The asyncio face: an instance that freezes its handlers instead of cancelling them.

Frozen handlers are neither resumed nor cancelled: the process ends without running them.
"""

from upgrader.protocol.later import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from upgrader.aio.adapter import Adapter
    from upgrader.aio.instance import Instance
    from upgrader.aio.peer import Peer
    from upgrader.aio.runtime import Task
    from upgrader.aio.streams import Server, start_server, start_unix_server
else:
    __getattr__ = names(
        "upgrader.aio",
        {
            "adapter": ("Adapter",),
            "instance": ("Instance",),
            "peer": ("Peer",),
            "runtime": ("Task",),
            "streams": ("Server", "start_server", "start_unix_server"),
        },
    )

__all__ = ["Adapter", "Instance", "Peer", "Server", "Task", "start_server", "start_unix_server"]


def __dir__() -> list[str]:
    return [*globals(), *__all__]
