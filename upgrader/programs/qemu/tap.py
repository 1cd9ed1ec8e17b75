# SPDX-License-Identifier: LGPL-2.1-or-later
"""TAP devices that two QEMUs hold at a time, and what the second one must not change.

A QEMU that starts sets the size of the virtio-net header to 10 bytes. That is a setting of the device,
not of its FD, so the guest of the first QEMU, which uses 12, is deaf from then on, and stays so.
"""

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping

from upgrader.backends.tap import Tap, TapFacts
from upgrader.errors import VerifyError
from upgrader.instance.guard import Guard
from upgrader.protocol.fd import Fd

#: A frame for nobody: an EtherType for experiments (IEEE 802), to an address that nobody has; and how
#: many of them: the QEMU that runs its machine reads most of them.
_FRAME, _FRAMES = bytes.fromhex("020000000000 020000000000 88b5").ljust(60, b"\0"), 64
_HEADER = 10  # bytes: with any, the device has headers; how large they are, its guest decides


def open_tap(interface: str) -> Fd:
    """Open a TAP device, or make one that lives as long as somebody holds it. Raises VerifyError."""
    try:
        return Fd(Tap(interface, header=_HEADER).open())
    except OSError as error:
        raise VerifyError(f"{interface} cannot be opened: {error.strerror}") from error


def settings(interface: str, fd: Fd) -> TapFacts:
    """How the device is set now; raises VerifyError if it is gone."""
    try:
        return Tap(interface, header=_HEADER).describe(fd.fileno())
    except OSError as error:
        raise VerifyError(f"{interface} is gone: {error.strerror}") from error


def set_back(fd: Fd, wanted: TapFacts) -> None:
    """Set the device as it was, unless it is gone."""
    with contextlib.suppress(OSError):
        Tap(wanted["device"], header=_HEADER).guard(fd.fileno(), wanted)


def fill(interface: str) -> None:
    """Send frames for nobody: a QEMU whose machine stands still reads one more, which is lost, and then
    leaves all others to the one that goes on. As far as that is allowed: see packet(7)."""
    with contextlib.suppress(OSError):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        # To close one takes the kernel some milliseconds, in which a machine may stand still.
        closing = threading.Thread(target=sock.close, name="upgrader-fill", daemon=True)
        sock.setblocking(False)
        try:
            for _ in range(_FRAMES):
                sock.sendto(_FRAME, (interface, 0))
        finally:
            closing.start()


@contextlib.contextmanager
def guarded(devices: Mapping[Fd, TapFacts]) -> Iterator[None]:
    """Set devices back whenever somebody changes them, from a thread, and once at the end."""

    def restore() -> bool:
        for fd, wanted in devices.items():
            set_back(fd, wanted)
        return bool(devices)

    try:
        with Guard(restore):
            yield
    finally:
        restore()
