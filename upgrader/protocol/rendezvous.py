# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where two processes of a unit find each other: variables that one sets for the next, and sockets."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

#: Tells a new process that it is a destination: `FD:ADJUSTMENT:PATH`, its line to takeover, the
#: oom_score_adj of the unit, and the path of the running instance's socket.
TAKEOVER = "UPGRADER_TAKEOVER"
#: Tells it, and a program after an execve(2), which upgrade it is started for: 32 hexadecimal digits.
#: A destination is told with it, after a colon, what PID 1 would make a main process from now.
UPGRADE = "UPGRADER_UPGRADE"
#: Tells a destination, and its author's code, that it will be given nothing to keep; version 0.1.0
#: has the second name, which programs know.
PREFLIGHT = "UPGRADER_PREFLIGHT"
PREFLIGHT_1 = "UPGRADER_REHEARSAL"
#: Tells a program after an execve(2) that it goes on with an image: `FD:NAME`, the channel's.
EXECUTED = "UPGRADER_EXECUTED"
#: With it, what PID 1 would pass to a start besides: pairs of FDNAME and FD, in JSON.
EXECUTED_PASSED = "UPGRADER_EXECUTED_PASSED"
#: Where PID 1 is asked, in place of its own sockets: `upgrader.testing` answers there.
BUS = "UPGRADER_BUS"
#: Before the name of an option of a runner, in capitals: the variable that says the same.
RUNNER = "UPGRADER_RUN_"
#: The socket of an instance, in the first RuntimeDirectory= of its unit.
SOCKET = "upgrader.sock"
#: Beside it, for everybody: what may be known of the instance, and no call that changes anything.
STATUS_SOCKET = "status.sock"
#: Beside them, of an instance that was replaced and still drains; by generation.
DRAINING = "draining-{}.sock"


def socket_name(invocation: str) -> str:
    """Where an instance of a unit without RuntimeDirectory= listens: an abstract name, to which
    anybody may connect, but which nobody could have taken before."""
    return f"\0upgrader-{invocation}"


def socket_path(environment: Mapping[str, str]) -> str | None:
    """Where an instance listens: in its RuntimeDirectory=; None if the unit has none."""
    first = environment.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return f"{first}/{SOCKET}" if first else None
