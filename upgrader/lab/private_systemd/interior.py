# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turn the calling process into the PID 1 of a private systemd: namespaces, mounts, root, exec."""

import os
import shutil
import signal
import socket
import stat
import sys
import uuid
from pathlib import Path
from typing import NoReturn

from upgrader.lab.private_systemd import linux
from upgrader.lab.private_systemd.linux import Mount, Namespace
from upgrader.lab.private_systemd.plan import Plan

#: Where PID 1 says READY=1: /run/host is the container interface's place for what the outside gives.
NOTIFY_SOCKET = "/run/host/notify"
TARGET = "private.target"

# Built below /sys: nothing that a root tree or a Python lives in can be hidden by it.
_WORK = "/sys"
_ROOT = f"{_WORK}/root"

_DEVICES = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
    "net/tun": (10, 200),
}
_DEVICE_LINKS = {
    "ptmx": "pts/ptmx",
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}

_UNIT_DIRECTORIES = (
    "/etc/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
)
_GENERATOR_DIRECTORIES = tuple(
    f"{place}/systemd/system-generators" for place in ("/etc", "/usr/local/lib", "/usr/lib")
)
# The only units that a boot pulls in. Whatever else a tree wants, by `systemctl enable` or as
# shipped, is cut: a database must not start twice, and nothing may write to the machine's kernel.
_WANTED = {
    "sysinit.target": ("systemd-journald.service", "systemd-tmpfiles-setup.service"),
    "sockets.target": (
        "dbus.socket",
        "systemd-journald.socket",
        "systemd-journald-dev-log.socket",
    ),
}
# Reached through dependencies of services as well, and host-wide in what they do.
_MASKED = (
    "systemd-sysctl.service",
    "systemd-modules-load.service",
    "systemd-binfmt.service",
    "proc-sys-fs-binfmt_misc.automount",
    "systemd-udevd.service",
    "systemd-udev-trigger.service",
    "systemd-random-seed.service",
    "systemd-timesyncd.service",
    "systemd-journald-audit.socket",
)
_TARGET_TEXT = """\
[Unit]
Description=Private systemd of upgrader
Requires=basic.target dbus.socket
Wants=dbus.service
After=basic.target dbus.socket dbus.service
AllowIsolate=yes
"""
# What the outside mounted stays through a soft-reboot: nothing inside could mount it again.
_MOUNT_TEXT = """\
[Unit]
DefaultDependencies=no
"""
_JOURNALD_TEXT = """\
[Journal]
Storage=volatile
RateLimitIntervalSec=0
ForwardToSyslog=no
Audit=no
"""


def become(plan: Plan, console: str, notify: socket.socket) -> NoReturn:
    """Become the PID 1 of `plan`; `console` is the terminal it writes to, `notify` is bound for it.

    Call it in a process that was just forked into a new PID namespace and its own cgroup. Does not
    return; raises OSError.
    """
    linux.unshare(
        Namespace.MOUNT | Namespace.CGROUP | Namespace.UTS | Namespace.IPC | Namespace.NET
    )
    linux.mount(None, "/", flags=Mount.RECURSIVE | Mount.PRIVATE)
    _stack(plan)
    _system_mounts(console)
    linux.pivot_into(_ROOT)
    linux.loopback_up()
    socket.sethostname("private")
    machine_id = _dress(plan)
    notify.bind(NOTIFY_SOCKET)
    _execute(machine_id)


def _overlay(source: str, number: int, target: str) -> None:
    upper, work = f"{_WORK}/layers/{number}/upper", f"{_WORK}/layers/{number}/work"
    os.makedirs(upper)
    os.makedirs(work)
    # The upper directory becomes the owner and mode of the place itself.
    there = os.stat(source)
    os.chmod(upper, stat.S_IMODE(there.st_mode))
    os.chown(upper, there.st_uid, there.st_gid)
    # By way of ".": a path with a colon or a comma would have to be escaped.
    os.chdir(source)
    linux.mount("overlay", target, data=f"lowerdir=.,upperdir={upper},workdir={work}")
    os.chdir("/")


def _stack(plan: Plan) -> None:
    linux.mount("tmpfs", _WORK, data="mode=0755")
    os.mkdir(_ROOT)
    os.mkdir(f"{_WORK}/package")
    if plan.package is not None:
        linux.bind(plan.package[0], f"{_WORK}/package", Mount.READ_ONLY)
    _overlay(plan.root, 0, _ROOT)
    for place, mode in (("run", "0755"), ("tmp", "1777")):
        os.makedirs(f"{_ROOT}/{place}", exist_ok=True)
        linux.mount(
            "tmpfs", f"{_ROOT}/{place}", flags=Mount.NO_SUID | Mount.NO_DEV, data=f"mode={mode}"
        )
    for number, layer in enumerate(plan.layers, start=1):
        target = _ROOT + layer
        os.makedirs(target, exist_ok=True)
        _overlay(layer, number, target)
    if plan.package is not None:
        shutil.copytree(
            f"{_WORK}/package",
            _ROOT + plan.package[1],
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,
        )


def _system_mounts(console: str) -> None:
    quiet = Mount.NO_SUID | Mount.NO_DEV | Mount.NO_EXEC
    for place in ("proc", "sys", "dev"):
        os.makedirs(f"{_ROOT}/{place}", exist_ok=True)
    linux.mount("proc", f"{_ROOT}/proc", flags=quiet)
    # The kernel's settings are the machine's, except those of the new network namespace.
    settings = f"{_ROOT}/proc/sys"
    linux.bind(settings, settings)
    linux.bind(f"{settings}/net", f"{settings}/net")
    linux.mount(None, settings, flags=Mount.BIND | Mount.REMOUNT | Mount.READ_ONLY | quiet)
    if os.path.exists(f"{_ROOT}/proc/sysrq-trigger"):
        linux.bind(f"{_ROOT}/proc/sysrq-trigger", f"{_ROOT}/proc/sysrq-trigger", Mount.READ_ONLY)
    linux.mount("sysfs", f"{_ROOT}/sys", flags=quiet | Mount.READ_ONLY)
    linux.mount("cgroup2", f"{_ROOT}/sys/fs/cgroup", flags=quiet)
    _devices(f"{_ROOT}/dev", console)


def _devices(dev: str, console: str) -> None:
    linux.mount("tmpfs", dev, flags=Mount.NO_SUID, data="mode=0755")
    mask = os.umask(0)
    for name in ("pts", "shm", "net"):
        os.mkdir(f"{dev}/{name}", 0o755)
    for name, (major, minor) in _DEVICES.items():
        os.mknod(f"{dev}/{name}", 0o666 | stat.S_IFCHR, os.makedev(major, minor))
    os.umask(mask)
    for name, destination in _DEVICE_LINKS.items():
        os.symlink(destination, f"{dev}/{name}")
    linux.mount(
        "devpts",
        f"{dev}/pts",
        flags=Mount.NO_SUID | Mount.NO_EXEC,
        data="newinstance,ptmxmode=0666,mode=0620,gid=5",
    )
    linux.mount("tmpfs", f"{dev}/shm", flags=Mount.NO_SUID | Mount.NO_DEV, data="mode=1777")
    Path(f"{dev}/console").touch(0o600)
    linux.bind(console, f"{dev}/console")


def _replace(path: str, text: str, mode: int = 0o644) -> None:
    """Write a file at `path` in place of whatever is there, even a symbolic link."""
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.write_text(text)
    place.chmod(mode)


def _link(path: str, destination: str) -> None:
    place = Path(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(destination)


def _dress(plan: Plan) -> str:
    """Give the root its own machine ID, host name and units; return the machine ID."""
    machine_id = uuid.uuid4().hex
    _replace("/etc/machine-id", machine_id + "\n", 0o444)
    if os.path.exists("/var/lib/dbus"):
        _link("/var/lib/dbus/machine-id", "/etc/machine-id")
    _replace("/etc/fstab", "# Nothing of the machine's own is mounted in a private systemd.\n")
    _replace("/etc/hostname", "private\n")
    for directory in _GENERATOR_DIRECTORIES:
        shutil.rmtree(directory, ignore_errors=True)
    _cut_wants()
    units = _UNIT_DIRECTORIES[0]
    _replace(f"{units}/{TARGET}", _TARGET_TEXT)
    _link(f"{units}/default.target", TARGET)
    for unit in _MASKED:
        _link(f"{units}/{unit}", "/dev/null")
    for target, wanted in _WANTED.items():
        for unit in wanted:
            _link(f"{units}/{target}.wants/{unit}", f"/usr/lib/systemd/system/{unit}")
    _replace(f"{units}/mount.d/private.conf", _MOUNT_TEXT)
    _replace("/run/systemd/journald.conf.d/private.conf", _JOURNALD_TEXT)
    os.makedirs(os.path.dirname(NOTIFY_SOCKET), exist_ok=True)
    for file in plan.files:
        _replace(file.path, file.text, file.mode)
    for path in plan.reachable:
        _open_way(path)
    for tree in plan.readable:
        _open_files(tree)
    return machine_id


def _cut_wants() -> None:
    for directory in _UNIT_DIRECTORIES:
        for suffix in ("wants", "requires", "upholds"):
            for place in Path(directory).glob(f"*.target.{suffix}"):
                if place.is_symlink():
                    place.unlink()
                else:
                    shutil.rmtree(place)


def _open_way(path: str) -> None:
    """Let every user search the directories that lead to `path`; change nothing below it."""
    place = Path(os.path.realpath(path))
    for directory in (place, *place.parents):
        if directory.is_dir():
            mode = stat.S_IMODE(directory.stat().st_mode)
            if mode & 0o011 != 0o011:
                directory.chmod(mode | 0o011)


def _open_files(tree: str) -> None:
    """Let every user read `tree`, because services of other users need it even if a umask of 077 made it."""
    for directory, _, names in os.walk(tree):
        for path in (Path(directory), *(Path(directory, name) for name in names)):
            mode = stat.S_IMODE(path.lstat().st_mode)
            wanted = mode | 0o044 | (0o011 if mode & 0o100 else 0)
            if mode != wanted and not path.is_symlink():
                path.chmod(wanted)


def _execute(machine_id: str) -> NoReturn:
    init = next(
        (
            path
            for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
            if os.path.exists(path)
        ),
        None,
    )
    if init is None:
        raise FileNotFoundError(2, "no systemd in this tree: /usr/lib/systemd/systemd is missing")
    console = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    for fd in range(3):
        os.dup2(console, fd)
    # Python ignores SIGPIPE, and an ignored signal stays ignored across an exec.
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_DFL)
        except OSError:
            continue
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
        "LANG": "C.UTF-8",
        "TERM": "dumb",
        "container": "private",
        "container_uuid": str(uuid.UUID(machine_id)),
        "NOTIFY_SOCKET": NOTIFY_SOCKET,
    }
    sys.stdout.flush()
    os.execve(init, [init, "--show-status=auto"], environment)
