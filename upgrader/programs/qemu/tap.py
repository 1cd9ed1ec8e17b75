# SPDX-License-Identifier: LGPL-2.1-or-later
"""TAP devices that two QEMUs hold at a time, and what the second one must not change.

A QEMU that starts sets the size of the virtio-net header to 10 bytes. That is a setting of the device,
not of its FD, so the guest of the first QEMU, which uses 12, is deaf from then on, and stays so.
TUNSETVNETHDRSZ of linux/if_tun.h.
"""

import contextlib
import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping

from upgrader.errors import VerifyError
from upgrader.protocol.fd import Fd

_TUNSETIFF = 0x400454CA
_TUNGETIFF = 0x800454D2
_TUNGETVNETHDRSZ = 0x800454D7
_TUNSETVNETHDRSZ = 0x400454D8
_TUNGETFEATURES = 0x800454CF
_IFREQ = struct.Struct("16sH22x")
_INT = struct.Struct("i")
_FLAGS = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
_FIRST = -20  # nice(2)
_LOOK = 0.0005  # seconds between two looks: a packet that comes in between may be lost


def open_tap(interface: str) -> Fd:
    """Open a TAP device, or make one that lives as long as somebody holds it; `vm%d` finds a name.
    Raises VerifyError."""
    try:
        number = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fd = Fd(number)
        try:
            fcntl.ioctl(number, _TUNSETIFF, _IFREQ.pack(interface.encode(), _FLAGS))
        except BaseException:
            fd.close()
            raise
    except OSError as error:
        raise VerifyError(f"{interface} cannot be opened: {error.strerror}") from error
    return fd


def name(fd: Fd) -> str:
    """The interface behind an FD as it is called now; raises OSError for another file."""
    found = fcntl.ioctl(fd.fileno(), _TUNGETIFF, bytes(_IFREQ.size))
    return str(_IFREQ.unpack(found)[0].rstrip(b"\0").decode())


def header_size(fd: Fd) -> int:
    """Bytes before each packet."""
    return int(_INT.unpack(fcntl.ioctl(fd.fileno(), _TUNGETVNETHDRSZ, bytes(_INT.size)))[0])


def set_header_size(fd: Fd, size: int) -> None:
    """Have so many bytes stand before each packet."""
    fcntl.ioctl(fd.fileno(), _TUNSETVNETHDRSZ, _INT.pack(size))


@contextlib.contextmanager
def guarded(sizes: Mapping[Fd, int]) -> Iterator[None]:
    """Set the header sizes back whenever somebody changes them, from a thread, and once at the end."""
    done = threading.Event()

    def restore() -> None:
        for fd, size in sizes.items():
            with contextlib.suppress(OSError):
                if header_size(fd) != size:
                    set_header_size(fd, size)

    def watch() -> None:
        with contextlib.suppress(OSError):  # where that is allowed: it must not wait for its turn
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _FIRST)
        while not done.is_set():
            restore()
            time.sleep(_LOOK)

    thread = threading.Thread(target=watch, name="upgrader-tap", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        restore()
