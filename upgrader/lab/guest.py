# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small guest for QEMU, put together at run time: Debian's cloud kernel, and busybox with a counter, a
checksum and an address. It says what it does on its first serial line."""

import gzip
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.lab.private_systemd.suites import cache_directory, locked

#: In the order in which they are loaded; what a kernel has built in is not there as a file.
_MODULES = (
    "virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
    "failover", "net_failover", "virtio_net", "virtio_blk",
)  # fmt: skip
_PACKAGE = "linux-image-cloud-amd64"
_CONCRETE = re.compile(r"^(?:linux-image|linux-binary)-[\d.]+.*cloud-amd64$")
_PATIENCE = 300.0  # seconds for a download
_READY = "GUEST-READY"
#: What it says: `tick N` 20 times a second, and each second whether its memory is what it was.
_INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
for m in {" ".join(_MODULES)}; do [ -e /mod/$m.ko ] && insmod /mod/$m.ko; done
ip link set lo up
ip link set eth0 up 2>/dev/null && ip addr add $(sed -n 's/.*guest=\\([^ ]*\\).*/\\1/p' /proc/cmdline) dev eth0
dd if=/dev/urandom of=/tmp/memory bs=1M count=4 2>/dev/null
M=$(md5sum </tmp/memory)
if [ -e /dev/vda ]; then
  ( n=0; while :; do n=$((n+1)); dd if=/dev/urandom of=/tmp/block bs=64k count=4 2>/dev/null
    dd if=/tmp/block of=/dev/vda bs=64k seek=$((n%64*4)) oflag=direct 2>/dev/null || echo "disk bad write $n"
    dd if=/dev/vda of=/tmp/back bs=64k skip=$((n%64*4)) count=4 iflag=direct 2>/dev/null
    cmp -s /tmp/block /tmp/back && echo "disk good $n" || echo "disk bad differs $n"; sleep 1; done ) &
fi
echo {_READY} $(uname -r)
( while :; do sleep 1; [ "$(md5sum </tmp/memory)" = "$M" ] && echo memory good || echo memory bad; done ) &
i=0
while :; do i=$((i+1)); echo "tick $i"; usleep 50000; done
"""


class NoGuestError(Exception):
    """What a guest is made of cannot be had here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Guest:
    """The files of a guest."""

    kernel: Path
    initrd: Path

    def command(
        self, qemu: str, address: str, console: str, *, memory: int, machine: str = "q35"
    ) -> list[str]:
        """A QEMU command line without network and disks; `address` of its network device, with a prefix
        length; `console`: the path of the file that it writes to; `memory` in MiB."""
        return [
            *(qemu, "-accel", "tcg,thread=multi", "-machine", machine, "-m", str(memory)),
            *("-nodefaults", "-no-user-config", "-display", "none", "-kernel", str(self.kernel)),
            *("-initrd", str(self.initrd)),
            *("-append", f"console=ttyS0 quiet panic=-1 guest={address}"),
            *("-chardev", f"file,id=console,path={console},append=on"),
            *("-serial", "chardev:console"),
        ]

    def install(self, machine: PrivateSystemd) -> "Guest":
        """The same in a private systemd."""
        place = Path("/srv/guest")
        inside = Guest(place / "vmlinuz", place / "initrd.gz")
        machine.copy_in(self.kernel, str(inside.kernel))
        machine.copy_in(self.initrd, str(inside.initrd))
        return inside


def network(interface: str) -> list[str]:
    """The options for its network device, by an interface of the host."""
    return [
        *("-netdev", f"tap,id=net,ifname={interface},script=no,downscript=no"),
        *("-device", "virtio-net-pci,netdev=net,romfile="),
    ]


def guest() -> Guest:
    """Make the guest, or take the one in the cache; raises NoGuestError."""
    place = cache_directory().with_name("guest")
    place.mkdir(parents=True, exist_ok=True)
    with locked(place / "lock"):
        return _made(place)


def _made(place: Path) -> Guest:
    made = Guest(place / "vmlinuz", place / "initrd.gz")
    busybox = shutil.which("busybox")
    if busybox is None or _is_dynamic(busybox):
        raise NoGuestError("busybox is not here, or not static (Debian: busybox-static)")
    if not made.kernel.exists():
        with tempfile.TemporaryDirectory(dir=place) as directory:
            _unpack_kernel(Path(directory))
            root = Path(directory, "root")
            for name in _MODULES:
                for path in root.rglob(f"{name}.ko*"):
                    text = path.read_bytes()
                    text = lzma.decompress(text) if path.suffix == ".xz" else text
                    (place / f"{name}.ko").write_bytes(text)
            kernels = [*root.glob("boot/vmlinuz*"), *root.rglob("modules/*/vmlinuz")]
            if not kernels:
                raise NoGuestError("the kernel package has no kernel in it")
            os.rename(kernels[0], made.kernel)
    _write(made.initrd, gzip.compress(b"".join(_archive(Path(busybox), place)), 1, mtime=0))
    return made


def _unpack_kernel(directory: Path) -> None:
    """Download Debian's kernel into a directory, and unpack it below `root`; raises NoGuestError."""
    if shutil.which("apt-get") is None:
        raise NoGuestError("this is no Debian: no kernel for the guest")
    depends = _run(["apt-cache", "depends", _PACKAGE], directory)
    names = [line.split()[-1] for line in depends.splitlines() if "Depends:" in line]
    wanted = [name for name in names if _CONCRETE.match(name)] or names
    if not wanted:
        raise NoGuestError(f"apt knows no {_PACKAGE}: apt-get update")
    _run(["apt-get", "download", "-q", *wanted], directory)
    for package in directory.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(package), "root"], directory)


def _run(words: list[str], directory: Path) -> str:
    try:
        return subprocess.run(
            words, cwd=directory, capture_output=True, text=True, timeout=_PATIENCE, check=True
        ).stdout
    except subprocess.CalledProcessError as error:
        raise NoGuestError(f"{' '.join(words)}: {error.stderr.strip()[-300:]}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise NoGuestError(f"{' '.join(words)}: {error}") from error


def _is_dynamic(path: str) -> bool:
    """Whether a program names an interpreter (PT_INTERP), which the guest does not have."""
    return b"/ld-linux" in Path(path).read_bytes()[:4096]


def _archive(busybox: Path, modules: Path) -> Iterator[bytes]:
    """The files of the guest, in the format of the kernel's initramfs (`newc` of cpio)."""
    directory, program = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755
    for name in ("bin", "mod", "proc", "sys", "dev", "tmp"):
        yield _member(name, directory, b"")
    yield _member("bin/busybox", program, busybox.read_bytes())
    yield _member("init", program, _INIT.encode())
    for path in sorted(modules.glob("*.ko")):
        yield _member(f"mod/{path.name}", program, path.read_bytes())
    yield _member("TRAILER!!!", 0, b"")


def _member(name: str, mode: int, data: bytes) -> bytes:
    """One file: a header of 13 hexadecimal numbers, its name and its data, each a multiple of 4 bytes."""
    encoded = name.encode() + b"\0"
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + encoded
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def _write(path: Path, data: bytes) -> None:
    """Write a file that others may be reading."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.chmod(file.name, 0o644)
    os.rename(file.name, path)
