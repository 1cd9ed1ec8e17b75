# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes wrong on the bus, turned into the errors of a unit."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from upgrader.systemd.unit import as_text
from upgrader.tool.unit_errors import (
    AccessDenied,
    BusUnreachable,
    JobConflict,
    JobRefused,
    NoSuchUnit,
    UnitError,
)


def bus_errors() -> type[Exception]:
    """What pystemd raises for all of them."""
    from pystemd.dbusexc import DBusBaseError

    error: type[Exception] = DBusBaseError
    return error


@contextlib.contextmanager
def translated(unit: str, operation: str) -> Iterator[None]:
    """Turn errors of the bus into ours; `operation` completes "systemd does not allow you to"."""
    try:
        yield
    except bus_errors() as error:
        raise _translate(unit, operation, error) from error


def _translate(unit: str, operation: str, error: Any) -> UnitError:
    # pystemd gives known D-Bus errors a class each, and the others a name.
    kind = type(error).__name__
    name = as_text(error.err_name).rpartition(".")[2]
    words = as_text(error.err_message).rstrip(".") or os.strerror(abs(int(error.errno)))
    if kind in ("DBusAccessDeniedError", "DBusInteractiveAuthorizationRequiredError"):
        return AccessDenied(unit, operation)
    if kind == "DBusNoSuchUnitError":
        return NoSuchUnit(unit)
    if name in ("TransactionIsDestructive", "ShuttingDown"):
        return JobConflict(unit, words)
    # An error without a name does not come from the other end of the bus.
    if operation == "connect" or (not name and kind == "DBusBaseError"):
        return BusUnreachable(unit, os.strerror(abs(int(error.errno))))
    if kind in _UNREACHABLE or name in ("ECONNRESET", "ENOTCONN", "EPIPE"):
        return BusUnreachable(unit, words)
    return JobRefused(unit, operation, words)


_UNREACHABLE = frozenset(
    f"DBus{name}Error"
    for name in (
        "ServiceUnknown", "NameHasNoOwner", "NoReply", "IOError", "BadAddress", "AuthFailed",
        "NoServer", "Timeout", "TimedOut", "NoNetwork", "Disconnected", "FileNotFound",
        "ConnectionRefused",
    )
)  # fmt: skip
