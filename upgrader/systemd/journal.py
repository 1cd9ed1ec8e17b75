# SPDX-License-Identifier: LGPL-2.1-or-later
"""Outcomes for the journal, with structured fields, over its native protocol.

Our own twenty lines, because python-systemd would be one more package that needs a compiler.
Protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/
"""

from __future__ import annotations

import contextlib
import socket
from enum import StrEnum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

SOCKET = "/run/systemd/journal/socket"
#: Identifies the outcome of a migration, for `journalctl MESSAGE_ID=...`.
MESSAGE_ID = "6a0c1d9c1a5e4f0c9f2c5d1a7b8e3f64"
#: Identifies a state that could not be saved, were an upgrade to come now.
UNSAVABLE_ID = "999426b71d4a480c9a31435d03df86c4"


class JournalOutcome(StrEnum):
    """How a phase of a migration ended."""

    DONE = "done"
    FAILED = "failed"


class Priority(StrEnum):
    """Journal priorities, as in syslog(3)."""

    ERR = "3"
    WARNING = "4"
    INFO = "6"


_LEVELS = {Priority.ERR: 40, Priority.WARNING: 30, Priority.INFO: 20}


def reachable() -> bool:
    """Whether this process can write to the journal."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(SOCKET)
        return True
    return False


def report(
    message: str,
    priority: Priority,
    *,
    unit: str,
    generation: int,
    side: str,
    phase: str,
    outcome: JournalOutcome,
    details: Mapping[str, str] | None = None,
    message_id: str = MESSAGE_ID,
    identifier: str = "",
) -> None:
    """Tell the journal; where it cannot be told, the author's logging is. `details` become fields
    of their own, with UPGRADER_ before the name. `identifier`: under which PID 1 has the unit's other
    lines; if it is not known, journald says the name of the process, which is mostly the same."""
    fields = {
        "MESSAGE": message,
        "MESSAGE_ID": message_id,
        "PRIORITY": priority,
        "UPGRADER_UNIT": unit,
        "UPGRADER_GENERATION": str(generation),
        "UPGRADER_SIDE": side,
        "UPGRADER_PHASE": phase,
        "UPGRADER_OUTCOME": outcome,
        **{f"UPGRADER_{name}": value for name, value in (details or {}).items()},
    }
    if unit:
        # journald looks up the unit of a sender when it gets to the entry, and finds none for one that
        # has ended. Of root, `journalctl -u` takes this word as well.
        fields["OBJECT_SYSTEMD_UNIT"] = unit
    if identifier:
        fields["SYSLOG_IDENTIFIER"] = identifier
    if not _send(fields):
        import logging

        logging.getLogger("upgrader").log(_LEVELS[priority], "%s", message)


def _send(fields: Mapping[str, str]) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(SOCKET)
        sock.send(
            b"".join(_field(name, value.encode(errors="replace")) for name, value in fields.items())
        )
        return True
    return False


def _field(name: str, value: bytes) -> bytes:
    if b"\n" not in value:
        return name.encode() + b"=" + value + b"\n"
    return name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
