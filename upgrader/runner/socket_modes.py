# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may connect to a UNIX listener: the mode and the owner of its file, where the program would set
them if it made the file itself."""

import grp
import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from upgrader.errors import VerifyError
from upgrader.runner.passing import Given

_MOST = 0o777


@dataclass(frozen=True, slots=True)
class SocketMode:
    """That of the listeners of one name. `user`, `group`: as names or numbers; empty for what they are."""

    name: str
    mode: int
    user: str = ""
    group: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read NAME=MODE[:USER[:GROUP]]; raises ValueError."""
        name, _, more = text.partition("=")
        digits, *owner = more.split(":")
        mode = int(digits, 8)
        if not name or not 0 <= mode <= _MOST or len(owner) > 2:
            raise ValueError(text)
        return cls(name, mode, *owner)

    def set(self, path: str) -> None:
        """Give a file this mode and owner; raises OSError and KeyError."""
        os.chmod(path, self.mode)
        if self.user or self.group:
            os.chown(path, _user(self.user), _group(self.group))


def _user(name: str) -> int:
    """-1 is for what stays as it is."""
    return int(name or -1) if not name or name.isdecimal() else pwd.getpwnam(name).pw_uid


def _group(name: str) -> int:
    return int(name or -1) if not name or name.isdecimal() else grp.getgrnam(name).gr_gid


def set_modes(modes: Sequence[SocketMode], listeners: Sequence[Given]) -> None:
    """Give the files of listeners the modes that are wanted; raises VerifyError."""
    for each in modes:
        for given in listeners:
            path = given.address
            if given.name == each.name and isinstance(path, str) and path.startswith("/"):
                try:
                    each.set(path)
                except (OSError, KeyError) as error:
                    raise VerifyError(f"--socket-mode {each.name}: {path}: {error}") from error
