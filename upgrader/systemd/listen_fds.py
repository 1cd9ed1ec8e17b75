# SPDX-License-Identifier: LGPL-2.1-or-later
"""FDs that PID 1 passed at start, by name: sockets of `.socket` units and the FD store.

The order of the FDs means nothing (it changes with a daemon-reload), names may repeat.
"""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from upgrader.errors import DeclarationError
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import identify
from upgrader.systemd.unit import show_socket

FIRST = 3  # SD_LISTEN_FDS_START


@dataclass(frozen=True, slots=True)
class Passed:
    """One FD that PID 1 passed, and its name (FileDescriptorName= or FDNAME=)."""

    name: str
    fd: Fd

    @property
    def is_socket(self) -> bool:
        """Whether it is a socket, and not a file or a memfd."""
        return bool(identify(self.fd).family)

    def __str__(self) -> str:
        """What a `.socket` unit has passed, in one line: `web=SOCK_STREAM [::]:80`."""
        identity = identify(self.fd)
        return show_socket(self.name, identity.kind_name, identity.address)


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
    if not count.isdecimal():
        raise DeclarationError("LISTEN_FDS", f"is {count!r}, not a number")
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
