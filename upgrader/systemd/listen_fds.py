# SPDX-License-Identifier: LGPL-2.1-or-later
"""FDs that PID 1 passed at start, by name: sockets of `.socket` units and the FD store.

The order of the FDs means nothing (it changes with a daemon-reload), names may repeat.
"""

from __future__ import annotations

import os

from upgrader.errors import DeclarationError
from upgrader.protocol.fd import Fd
from upgrader.protocol.later import later
from upgrader.protocol.values import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from upgrader.protocol import identity
    from upgrader.systemd import unit
else:
    identity = later("upgrader.protocol.identity")
    unit = later("upgrader.systemd.unit")

FIRST = 3  # SD_LISTEN_FDS_START


class Passed(Value):
    """One FD that PID 1 passed, and its name (FileDescriptorName= or FDNAME=)."""

    name: str
    fd: Fd

    @property
    def is_socket(self) -> bool:
        """Whether it is a socket, and not a file or a memfd."""
        return bool(identity.identify(self.fd).family)

    def __str__(self) -> str:
        """What a `.socket` unit has passed, in one line: `web=SOCK_STREAM [::]:80`."""
        found = identity.identify(self.fd)
        return unit.show_socket(self.name, found.kind_name, found.address)


def own_number(environment: Mapping[str, str]) -> str:
    """This process as PID 1 numbers it: with PrivatePIDs= it is process 1 only in here."""
    number = str(os.getpid())
    return environment.get("SYSTEMD_EXEC_PID", number) if number == "1" else number


def take(environment: MutableMapping[str, str]) -> list[Passed]:
    """Take ownership of the passed FDs (CLOEXEC from now on) and unset the LISTEN_ variables.

    FDs meant for another process (LISTEN_PID) are not touched. Raises DeclarationError for
    variables that make no sense.
    """
    if environment.get("LISTEN_PID", "") != own_number(environment):
        return []
    count = environment.get("LISTEN_FDS", "")
    listed = environment.get("LISTEN_FDNAMES")
    forget(environment)
    if not (count.isascii() and count.isdecimal() and len(count) < 19):
        raise DeclarationError("LISTEN_FDS", f"is {count[:20]!r}, not a number")
    fds = []
    for number in range(FIRST, FIRST + int(count)):
        try:
            os.set_inheritable(number, False)
        except OSError as error:
            why = f"says {count}, but FD {number} is not open: {error.strerror}"
            raise DeclarationError("LISTEN_FDS", why) from error
        fds.append(Fd(number))
    names = [] if listed is None else listed.split(":")
    names += ["unknown"] * (len(fds) - len(names))  # sd_listen_fds_with_names(3)
    return [Passed(name, fd) for name, fd in zip(names, fds, strict=False)]


def forget(environment: MutableMapping[str, str]) -> None:
    """Unset the LISTEN_ variables."""
    for variable in ("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environment.pop(variable, None)
