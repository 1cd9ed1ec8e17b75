# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU: a virtual machine goes on in another QEMU, with its memory, devices and network, and notices a
pause. `python -m upgrader.run --adapter qemu -- qemu-system-x86_64 ...`; docs/qemu.md.
"""

from upgrader.programs.qemu.adapter import QemuAdapter
from upgrader.programs.qemu.machine import Machine, NetworkDevice, Placing, difference
from upgrader.programs.qemu.monitor import Monitor, QemuError

#: For `--adapter qemu`.
ADAPTER = QemuAdapter

__all__ = [
    "ADAPTER",
    "Machine",
    "Monitor",
    "NetworkDevice",
    "Placing",
    "QemuAdapter",
    "QemuError",
    "difference",
]
