# SPDX-License-Identifier: LGPL-2.1-or-later
"""TAP devices that two QEMUs hold at a time, and what the second one must not change.

A QEMU that starts sets the size of the virtio-net header to 10 bytes. That is a setting of the device,
not of its FD, so the guest of the first QEMU, which uses 12, is deaf from then on, and stays so.
"""

import contextlib
from collections.abc import Iterator, Mapping

from upgrader.backends.tap import Tap, TapFacts
from upgrader.errors import VerifyError
from upgrader.instance.guard import Guard
from upgrader.protocol.fd import Fd

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
