# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong if PID 1 is asked about a unit, or to do something with it; and names of units.

UpgradeError
└── UnitError            PID 1 could not be asked about a unit, or refused        .unit
    ├── InvalidUnitName  this cannot be the name of a service unit
    ├── NoSuchUnit       no unit file of that name                                .similar
    ├── NoMatchingUnit   no service that runs matches a pattern
    ├── AccessDenied     not allowed to this user                                 .operation
    ├── BusUnreachable   no bus, no PID 1 on it, or the connection was lost       .reason
    ├── JobConflict      another job is in the way                                .reason
    ├── JobRefused       PID 1 refused, in its own words                          .operation .reason
    ├── WaitTimeout      the time given for waiting is over                       .seconds
    └── MissingPackage   the command line needs a package that is not installed   .package
"""

import re

from upgrader.errors import UpgradeError

_UNIT_NAME = r"[A-Za-z0-9:_.\\@-]{1,255}"
_OTHER_KINDS = frozenset(
    ("socket", "target", "timer", "mount", "automount", "path", "slice", "scope", "device", "swap")
)


class UnitError(UpgradeError):
    """PID 1 could not be asked about `unit`, or refused; the root of this module's errors."""

    def __init__(self, unit: str, message: str, *, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.unit = unit

    def __str__(self) -> str:
        return f"{self.unit}: {super().__str__()}" if self.unit else super().__str__()


class InvalidUnitName(UnitError):
    """`unit` cannot be the name of a service unit."""


class NoSuchUnit(UnitError):
    """PID 1 finds no unit file of that name; `similar` holds names that exist and look like it."""

    def __init__(self, unit: str, similar: tuple[str, ...] = ()) -> None:
        meant = f"did you mean {' or '.join(similar)}? " if similar else ""
        super().__init__(
            unit,
            "there is no such unit",
            remedy=f"{meant}after adding a unit file: systemctl daemon-reload",
        )
        self.similar = similar


class NoMatchingUnit(UnitError):
    """No service that runs matches the pattern `unit`."""

    def __init__(self, unit: str) -> None:
        super().__init__(
            unit,
            "no service that runs matches this pattern",
            remedy=f"see: systemctl list-units --all '{unit}'",
        )


class AccessDenied(UnitError):
    """PID 1 does not allow `operation` to this user."""

    def __init__(self, unit: str, operation: str) -> None:
        super().__init__(
            unit,
            f"systemd does not allow you to {operation}",
            remedy="run the command as root, with sudo for instance, or have polkit allow it: see"
            " /usr/share/upgrader/polkit/50-upgrader.rules",
        )
        self.operation = operation


class BusUnreachable(UnitError):
    """The system bus, or PID 1 on it, cannot be reached, or the connection was lost."""

    def __init__(self, unit: str, reason: str, *, remedy: str = "") -> None:
        usual = "see whether the bus runs: systemctl status dbus.socket dbus.service"
        super().__init__(
            unit, f"systemd cannot be reached over D-Bus: {reason}", remedy=remedy or usual
        )
        self.reason = reason


class JobConflict(UnitError):
    """Another job is in the way, and it is not replaced; try again when it is done."""

    def __init__(self, unit: str, reason: str) -> None:
        super().__init__(
            unit,
            f"busy: {reason}",
            remedy="wait for it, then try again; see: systemctl list-jobs",
        )
        self.reason = reason


class JobRefused(UnitError):
    """PID 1 refused to do `operation`; `reason` holds its own words."""

    def __init__(self, unit: str, operation: str, reason: str) -> None:
        super().__init__(
            unit,
            f"systemd refused to {operation}: {reason}",
            remedy=f"see: systemctl status {unit}",
        )
        self.operation = operation
        self.reason = reason


class WaitTimeout(UnitError):
    """The time given for waiting, `seconds`, is over; what was asked of PID 1 goes on."""

    def __init__(self, unit: str, seconds: float) -> None:
        super().__init__(
            unit,
            f"not settled after {seconds:g} s",
            remedy=f"the job goes on; see: systemctl status {unit}",
        )
        self.seconds = seconds


class MissingPackage(UnitError):
    """A package that the command line needs, and the library does not, is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(
            "",
            f"the Python package {package} is missing",
            remedy="install it: pip install 'upgrader[cli]'",
        )
        self.package = package


def unit_name(text: str) -> str:
    """The full name of a service unit; `.service` may be left out, as with systemctl."""
    if not re.fullmatch(_UNIT_NAME, text):
        raise InvalidUnitName(
            text, "this is not the name of a unit", remedy="give a name such as web.service"
        )
    kind = text.rpartition(".")[2] if "." in text else ""
    if kind == "service":
        return text
    if kind in _OTHER_KINDS:
        raise InvalidUnitName(
            text,
            f"this is a {kind} unit, and only services are upgraded",
            remedy=f"name the service: {text.removesuffix(kind)}service",
        )
    return text + ".service"
