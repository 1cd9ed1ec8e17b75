# SPDX-License-Identifier: LGPL-2.1-or-later
"""Call the system calls for namespaces and mounts that Python 3.11 does not have."""

import ctypes
import enum
import fcntl
import os
import socket
import struct

_libc = ctypes.CDLL(None, use_errno=True)


class Namespace(enum.IntFlag):
    """Flags of unshare(2)."""

    MOUNT = 0x00020000
    CGROUP = 0x02000000
    UTS = 0x04000000
    IPC = 0x08000000
    PID = 0x20000000
    NET = 0x40000000


class Mount(enum.IntFlag):
    """Flags of mount(2)."""

    READ_ONLY = 1
    NO_SUID = 2
    NO_DEV = 4
    NO_EXEC = 8
    REMOUNT = 32
    BIND = 4096
    RECURSIVE = 16384
    PRIVATE = 1 << 18


NO_FLAGS = Mount(0)
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
_PF_EXITING = 4  # in the flags of proc_pid_stat(5), as include/linux/sched.h has it
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: Namespace) -> None:
    """Leave the given namespaces for new ones, as unshare(2); raises OSError."""
    _checked(_libc.unshare(ctypes.c_int(flags)), f"unshare {flags!r}")


def mount(
    kind: str | None, target: str, *, source: str = "none", flags: Mount = NO_FLAGS, data: str = ""
) -> None:
    """Mount file system `kind` on `target`, as mount(2); raises OSError that names the target."""
    _checked(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            None if kind is None else kind.encode(),
            ctypes.c_ulong(flags),
            data.encode(),
        ),
        f"mount {kind or flags!r} on {target}",
    )


def bind(source: str, target: str, flags: Mount = NO_FLAGS) -> None:
    """Show `source` at `target` as well; `flags` such as READ_ONLY apply to the new place only."""
    mount(None, target, source=source, flags=Mount.BIND)
    if flags:
        # mount(2) ignores every other flag on the bind itself, so it takes a second call.
        mount(None, target, flags=Mount.BIND | Mount.REMOUNT | flags)


def unmount(target: str) -> None:
    """Take the mount on `target` away from this namespace, even if it is in use; raises OSError."""
    _checked(_libc.umount2(os.fsencode(target), MNT_DETACH), f"umount of {target}")


def pivot_into(root: str) -> None:
    """Make the mount point `root` the root directory, and detach the old one."""
    os.chdir(root)
    # Both arguments the same: the old root is stacked on the new one, so no directory is needed for it.
    _checked(_libc.pivot_root(b".", b"."), f"pivot_root {root}")
    unmount(".")
    os.chdir("/")


def die_with_starter(signal: int) -> None:
    """Have the kernel send `signal` to this process when the thread that forked it ends."""
    _checked(_libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal), 0, 0, 0), "prctl PDEATHSIG")


def loopback_up() -> None:
    """Bring the loopback interface of this network namespace up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(control, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


def is_exiting(pid: int) -> bool:
    """Return whether process `pid` has begun to exit, or is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return bool(int(file.read().rpartition(b")")[2].split()[6]) & _PF_EXITING)
    except (FileNotFoundError, ProcessLookupError):
        return True
