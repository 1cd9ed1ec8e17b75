# SPDX-License-Identifier: LGPL-2.1-or-later
"""/dev/fuse: the connection of a file system to the program that serves it. Who uses the file system waits
while nobody reads, and never learns that another process does. fuse(4), include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import ctypes
import os
import re
import stat
import struct
from typing import TYPE_CHECKING, TypedDict

from upgrader.backends.fdinfo import number
from upgrader.backends.kind import BackendKind
from upgrader.backends.libc import call
from upgrader.errors import DeclarationError

if TYPE_CHECKING:
    from collections.abc import Iterator

_DEVICE = os.makedev(10, 229)
_RESEND = 7  # FUSE_NOTIFY_RESEND, Linux 6.9
_NO_SUID, _NO_DEV, _DETACH = 2, 4, 2  # MS_NOSUID, MS_NODEV, MNT_DETACH
_NOTIFICATION = struct.Struct("IiQ")  # struct fuse_out_header: length, code, 0


class FuseFacts(TypedDict):
    """`connection` is the kernel's number of it, as in /sys/fs/fuse/connections; 0 if the kernel does not
    say (before 6.15). `mountpoint` is what the program has mounted it on."""

    connection: int
    mountpoint: str


class Fuse(BackendKind, name="fuse"):
    """A file system on `mountpoint`, mounted at a cold start: it takes CAP_SYS_ADMIN. Its FD is
    non-blocking; each read gives one request of the kernel's protocol, each write answers one.

    What the program has answered to FUSE_INIT and which node is which belongs into a state. Answer what
    you have read before you wait for anything else, or take a turn until then: nobody else can.
    """

    facts = FuseFacts

    def __init__(self, mountpoint: str, *, source: str = "upgrader", options: str = "") -> None:
        """`source`: what mount(8) shows; `options`: more for mount(2), such as `allow_other`. Raises
        DeclarationError for a path that is not absolute."""
        if not os.path.isabs(mountpoint):
            raise DeclarationError(f"Fuse({mountpoint!r})", "a path has to be absolute")
        self.mountpoint = os.path.normpath(mountpoint)
        self._source = source
        self._options = options

    def open(self) -> int:
        """Mount it, in place of one there that nobody serves any more."""
        if list(self._mounts()):
            self.unmount()
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            data = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
            data += f",{self._options}" if self._options else ""
            place = os.fsencode(self.mountpoint)
            flags = ctypes.c_ulong(_NO_SUID | _NO_DEV)
            call("mount", self._source.encode(), place, b"fuse", flags, data.encode())
        except BaseException:
            os.close(fd)
            raise
        return fd

    def refuse(self, fd: int) -> str:
        """Why it is no connection of a file system."""
        found = os.fstat(fd)
        if not stat.S_ISCHR(found.st_mode) or found.st_rdev != _DEVICE:
            return "it is not /dev/fuse"
        known = list(self._mounts())
        if not known:
            return f"nothing of it is mounted on {self.mountpoint}"
        connection = _connection(fd)
        if connection and connection not in known:
            return f"it is connection {connection}, and {known[0]} is on {self.mountpoint}"
        return ""

    def describe(self, fd: int) -> FuseFacts:
        """Which connection it is."""
        return {"connection": _connection(fd), "mountpoint": self.mountpoint}

    def size(self, fd: int) -> int:
        """Nothing is behind it."""
        return 0

    def show(self, fd: int) -> str:
        """Where it is mounted."""
        return self.mountpoint

    def resend(self) -> bool:
        """Have the kernel give again what was read and never answered, as after a crash: those who
        wait for it would wait for ever. False if the kernel cannot (before 6.9). Raises as `fileno`."""
        try:
            os.write(self.fileno(), _NOTIFICATION.pack(_NOTIFICATION.size, _RESEND, 0))
        except OSError:
            return False
        return True

    def unmount(self) -> None:
        """Take it away, for those who have files open on it once they close them. Raises OSError."""
        call("umount2", os.fsencode(self.mountpoint), _DETACH)

    def _mounts(self) -> Iterator[int]:
        """The connections that are mounted there. Nothing asks the file system: this process may be
        the one that has to answer."""
        with open("/proc/self/mountinfo", "rb") as file:
            for line in file:
                fields, _, rest = line.partition(b" - ")
                _, _, device, _, place, *_ = fields.split()
                if rest.startswith(b"fuse ") and _unescape(place) == os.fsencode(self.mountpoint):
                    yield int(device.partition(b":")[2])


def _connection(fd: int) -> int:
    """The number of the connection of an FD; 0 if the kernel does not say."""
    try:
        return number(fd, "fuse_connection")
    except OSError:
        return 0


def _unescape(path: bytes) -> bytes:
    """A path as proc(5) writes it: blanks and the like in octal."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), path)
