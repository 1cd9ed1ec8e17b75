# SPDX-License-Identifier: LGPL-2.1-or-later
"""TUN and TAP devices, as QEMU passes them on: the device stays, its queues are other FDs of the same
open files. Linux: Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h.

Most settings belong to the device, not to an FD: any process that holds one can change them for all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, TypedDict

from upgrader.backends.kind import BackendKind
from upgrader.errors import DeclarationError, MismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def _request(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | ord("T") << 8 | number


_SET_IFF, _GET_IFF = _request(1, 202, 4), _request(2, 210, 4)
_SET_OFFLOAD = _request(1, 208, 4)
_GET_SNDBUF, _SET_SNDBUF = _request(2, 211, 4), _request(1, 212, 4)
_GET_HEADER, _SET_HEADER = _request(2, 215, 4), _request(1, 216, 4)
_GET_FILTER = _request(2, 219, 16)
_SET_LITTLE, _GET_LITTLE = _request(1, 220, 4), _request(2, 221, 4)
_SET_CARRIER, _GET_NETNS = _request(1, 226, 4), _request(0, 227, 0)
_GET_QUEUE_LENGTH, _SET_QUEUE_LENGTH = 0x8942, 0x8943  # SIOCGIFTXQLEN, SIOCSIFTXQLEN
_ETHTOOL, _GET_LINK = 0x8946, 0x0A  # SIOCETHTOOL, ETHTOOL_GLINK
_GET_CSUM, _GET_TSO = 0x16, 0x1E  # ETHTOOL_GTXCSUM, ETHTOOL_GTSO
_GET_FLAGS, _UP = 0x8913, 0x0001  # SIOCGIFFLAGS, IFF_UP
_IFREQ = struct.Struct("16sH22x")
_NUMBER = struct.Struct("i")
_CSUM, _TSO = 0x01, 0x02 | 0x04  # TUN_F_CSUM, TUN_F_TSO4 and 6
_LONGEST = 15  # bytes of a name: IFNAMSIZ without its end

_TUN, _TAP = 0x0001, 0x0002
_NO_PI, _HEADER, _QUEUES, _DETACHED = 0x1000, 0x4000, 0x0100, 0x0400
#: What describes the device; the others are of one queue, or set by the kernel for itself.
_FLAGS = _TUN | _TAP | _NO_PI | _HEADER | _QUEUES | 0x0010 | 0x0020  # IFF_NAPI, IFF_NAPI_FRAGS


class TapFacts(TypedDict):
    """What a queue belongs to, and how the device is set: `device` is its name; `netns` the inode of
    its network namespace; `flags` are IFF_*; `header` is the size of the vnet header in bytes, 0 for
    none; `sndbuf` in bytes; `filter`: how many instructions are attached; `offloads`: TUN_F_* as this
    program has set them, because no kernel tells; `features`: what came of them, and `carrier`, as ethtool
    shows them, -1 where it cannot be asked."""

    device: str
    netns: int
    flags: int
    detached: bool
    header: int
    little_endian: int
    sndbuf: int
    filter: int
    offloads: int
    features: int
    carrier: int


class Tap(BackendKind, name="tap"):
    """A TAP device (`tun=True`: TUN), made if there is none of that name. Its FDs are non-blocking,
    one for each queue; each read gives one frame, after a vnet header if there is one."""

    facts = TapFacts
    #: Settings of the device, which `guard` puts right; identity are name, namespace, flags, queue.
    changing = frozenset(TapFacts.__annotations__) - {"device", "netns", "flags", "detached"}

    def __init__(
        self,
        device: str,
        *,
        tun: bool = False,
        queues: int = 1,
        packet_info: bool = False,
        header: int = 0,
        sndbuf: int = 0,
        offloads: int = 0,
        queue_length: int = 0,
    ) -> None:
        """`queues`: more than one make a multi-queue device; `header`: bytes of the vnet header (10 or
        12), 0 for none; `sndbuf`: bytes, 0 leaves it to the kernel; `offloads`: TUN_F_*;
        `queue_length`: frames that the kernel keeps while nobody reads, as in a restart (txqueuelen),
        0 leaves it as it is. Raises DeclarationError.
        """
        if not 0 < len(os.fsencode(device)) <= _LONGEST or "/" in device or "%" in device:
            raise DeclarationError(
                f"Tap({device!r})", f"a name has 1 to {_LONGEST} bytes, no / or %"
            )
        if not 0 < queues <= 256 or header not in (0, 10, 12, 20):
            raise DeclarationError(f"Tap({device!r})", f"{queues=}, {header=}")
        self.device = device
        self._queues = queues
        self._flags = _TUN if tun else _TAP
        self._flags |= (_HEADER if header else 0) | (_QUEUES if queues > 1 else 0)
        self._flags |= 0 if packet_info else _NO_PI
        self._header = header
        self._sndbuf = sndbuf
        self._offloads = offloads
        self._queue_length = queue_length

    def set_offloads(self, offloads: int) -> None:
        """Say which offloads the program does itself (TUN_F_*): no kernel tells them, so this object must
        know. Raises OSError, and as `fileno`."""
        fcntl.ioctl(self.fileno(), _SET_OFFLOAD, offloads)
        self._offloads = offloads

    def open(self) -> int:
        """Attach to the device, which is made for that where there is none."""
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _SET_IFF, _IFREQ.pack(os.fsencode(self.device), self._flags))
        except OSError as error:
            os.close(fd)
            raise OSError(error.errno, f"{self.device}: {error.strerror}") from error
        return fd

    @property
    def count(self) -> int:
        """One for each queue."""
        return self._queues

    def open_all(self) -> Sequence[int]:
        """Open all queues, and make the settings of the device."""
        fds: list[int] = []
        try:
            for _ in range(self._queues):
                fds.append(self.open())
            if self._header:
                fcntl.ioctl(fds[0], _SET_HEADER, _NUMBER.pack(self._header))
            if self._sndbuf:
                fcntl.ioctl(fds[0], _SET_SNDBUF, _NUMBER.pack(self._sndbuf))
            if self._offloads:
                fcntl.ioctl(fds[0], _SET_OFFLOAD, self._offloads)
            if self._queue_length:
                _set_queue_length(self.device, self._queue_length)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def refuse(self, fd: int) -> str:
        """Say why it is no queue of this device."""
        try:
            device, flags = _interface(fd)
        except OSError:
            return "it is attached to no device (any more)"
        if device != self.device:
            return f"it is {device}, and {self.device} is declared"
        if flags & _FLAGS != self._flags & _FLAGS:
            return f"its flags are {flags & _FLAGS:#x}, and {self._flags & _FLAGS:#x} are declared"
        return ""

    def stale(self, fd: int) -> str:
        """Say if the device was removed."""
        try:
            _interface(fd)
        except OSError as error:
            return f"{self.device} was removed" if error.errno == errno.EBADFD else ""
        return ""

    def describe(self, fd: int) -> TapFacts:
        """Give all that the ioctls of the device read; raises OSError for a device that is gone."""
        device, flags = _interface(fd)
        return {
            "device": device,
            "netns": _namespace(fd),
            "flags": flags & _FLAGS,
            "detached": bool(flags & _DETACHED),
            "header": _number(fd, _GET_HEADER) if flags & _HEADER else 0,
            "little_endian": _number(fd, _GET_LITTLE),
            "sndbuf": _number(fd, _GET_SNDBUF),
            "filter": _filter(fd) if flags & _TAP else 0,
            "offloads": self._offloads,
            "features": _features(fd, device),
            "carrier": _carrier(fd, device),
        }

    def verify(self, fd: int, said: Mapping[str, Any]) -> None:
        """Raise MismatchError for another device or queue, or if this program reads another vnet header.
        The namespace counts if both may ask for it."""
        if self._header not in (0, said["header"]):
            declared = f"declared with header={self._header}"
            raise MismatchError(self._item, f"header={said['header']}", declared)
        found = _namespace(fd)
        known = found and said["netns"]
        super().verify(fd, said if known else {**said, "netns": found})

    def show(self, fd: int) -> str:
        """Show the name of the device."""
        return self.device if self._queues == 1 else f"{self.device}, {self._queues} queues"

    def adopt(self, said: Mapping[str, Any]) -> None:
        """Know the offloads as what the program before has set."""
        self._offloads = said["offloads"]

    def guard(self, fd: int, said: Mapping[str, Any]) -> None:
        """Set what differs by now: another process has opened the same queue for itself. It is cheap
        enough to be called every millisecond while a process is started that holds the FD."""
        if said["flags"] & _HEADER:
            _set_if_other(fd, _GET_HEADER, _SET_HEADER, said["header"])
        _set_if_other(fd, _GET_LITTLE, _SET_LITTLE, said["little_endian"])
        _set_if_other(fd, _GET_SNDBUF, _SET_SNDBUF, said["sndbuf"])
        features = said["features"]
        if _features(fd, said["device"]) not in (-1, features) and features >= 0:
            # What the program has not said is guessed: no kernel tells more.
            guessed = (_CSUM if features & 1 else 0) | (_TSO if features & 2 else 0)
            fcntl.ioctl(fd, _SET_OFFLOAD, said["offloads"] or guessed)
        # While it is down, or was, nobody has said what its carrier shall be.
        if said["carrier"] >= 0 and _carrier(fd, said["device"]) not in (-1, said["carrier"]):
            fcntl.ioctl(fd, _SET_CARRIER, _NUMBER.pack(said["carrier"]))


def _interface(fd: int) -> tuple[str, int]:
    """The name of the device, and the flags of a queue."""
    name, flags = _IFREQ.unpack(fcntl.ioctl(fd, _GET_IFF, bytes(_IFREQ.size)))
    return os.fsdecode(name.rstrip(b"\0")), flags


def _number(fd: int, request: int) -> int:
    return int(_NUMBER.unpack(fcntl.ioctl(fd, request, bytes(_NUMBER.size)))[0])


def _set_if_other(fd: int, get: int, set_: int, wanted: int) -> None:
    if _number(fd, get) != wanted:
        fcntl.ioctl(fd, set_, _NUMBER.pack(wanted))


def _namespace(fd: int) -> int:
    """The inode of the network namespace of the device; 0 where that may not be asked for: it takes
    CAP_NET_ADMIN there."""
    try:
        number = fcntl.ioctl(fd, _GET_NETNS)
    except OSError:
        return 0
    try:
        return os.fstat(number).st_ino
    finally:
        os.close(number)


def _filter(fd: int) -> int:
    """How many instructions the filter of a TAP device has."""
    with contextlib.suppress(OSError):
        return int(struct.unpack("Hxxxxxxxxxxxxxx", fcntl.ioctl(fd, _GET_FILTER, bytes(16)))[0])
    return 0


@contextlib.contextmanager
def _asking(fd: int) -> Iterator[socket.socket]:
    """A socket to ask for a device by its name; raises OSError if that is in another namespace."""
    if _namespace(fd) not in (0, os.stat("/proc/self/ns/net").st_ino):
        raise OSError(errno.ENODEV, "the device is in another network namespace")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        yield sock


def _features(fd: int, device: str) -> int:
    """Whether the device computes checksums (1) and cuts segments (2), for the program; -1 if that is not
    known."""
    with contextlib.suppress(OSError), _asking(fd) as sock:
        return _ethtool(sock, device, _GET_CSUM) + 2 * _ethtool(sock, device, _GET_TSO)
    return -1


def _carrier(fd: int, device: str) -> int:
    """Whether the device has a carrier, 0 or 1; -1 if that is not known: while it is down, and if it is in
    another network namespace than this process, where its name means nothing."""
    with contextlib.suppress(OSError), _asking(fd) as sock:
        found = fcntl.ioctl(sock, _GET_FLAGS, _IFREQ.pack(os.fsencode(device), 0))
        if _IFREQ.unpack(found)[1] & _UP:
            return _ethtool(sock, device, _GET_LINK)
    return -1


def _ethtool(sock: socket.socket, device: str, command: int) -> int:
    import ctypes

    value = ctypes.create_string_buffer(struct.pack("II", command, 0), 8)
    request = struct.pack("16sP16x", os.fsencode(device), ctypes.addressof(value))
    fcntl.ioctl(sock, _ETHTOOL, request)
    return int(struct.unpack("II", value.raw)[1])


def _set_queue_length(device: str, wanted: int) -> None:
    """Raise what the kernel keeps for a device to `wanted` frames; what is larger stays."""
    name = os.fsencode(device)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        found = fcntl.ioctl(sock, _GET_QUEUE_LENGTH, struct.pack("16si20x", name, 0))
        if struct.unpack("16si20x", found)[1] < wanted:
            fcntl.ioctl(sock, _SET_QUEUE_LENGTH, struct.pack("16si20x", name, wanted))
