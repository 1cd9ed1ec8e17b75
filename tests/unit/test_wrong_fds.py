# SPDX-License-Identifier: LGPL-2.1-or-later
"""A wrong FD in the place of another one is refused by the name of the backend, for every kind; and what
cannot move is refused where it is opened."""

import ctypes
import fcntl
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import cannot_run
from tests.tables import publish
from upgrader.backends import (
    BackendKind,
    Child,
    EventFd,
    Inotify,
    Memory,
    NetlinkSocket,
    Opaque,
    OpenFile,
    PacketSocket,
    Pipe,
    Pty,
    Tap,
    TimerFd,
    UnixSocket,
)
from upgrader.backends.libc import call
from upgrader.errors import BackendError, MismatchError
from upgrader.instance.declared_backend import DeclaredBackend
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import identify
from upgrader.protocol.image import ManifestEntry
from upgrader.systemd.subreaper import adopt_orphans

DEVICES = [f"wf{os.getpid() % 10**6}{end}" for end in "ab"]


@dataclass(frozen=True)
class Pair:
    """A backend, and another one of the same kind that must not be taken for it."""

    name: str
    make: Callable[[Path], tuple[BackendKind, BackendKind]]
    why: str
    root: bool = False


def replaced_file(directory: Path) -> tuple[BackendKind, BackendKind]:
    """The same name, and another file under it by the time that the second one is opened."""

    class Later(OpenFile):
        def open(self) -> int:
            os.rename(directory / "new", directory / "file")
            return super().open()

    (directory / "new").touch()
    return OpenFile(directory / "file"), Later(directory / "file")


def same_file(directory: Path) -> tuple[BackendKind, BackendKind]:
    return OpenFile(directory / "file"), OpenFile(directory / "file", os.O_RDONLY)


def watching(directory: Path) -> tuple[BackendKind, BackendKind]:
    class Watching(Inotify):
        def __init__(self, path: Path) -> None:
            super().__init__()
            self._path = path

        def open(self) -> int:
            fd = super().open()
            call("inotify_add_watch", fd, os.fsencode(self._path), 0x100)
            return fd

    (directory / "other").mkdir()
    return Watching(directory), Watching(directory / "other")


def connected(directory: Path) -> tuple[BackendKind, BackendKind]:
    class Ours(UnixSocket):
        def open(self) -> int:
            return socket.socket(socket.AF_UNIX).detach()

    return Ours("x"), Ours("x")


PAIRS = [
    Pair("memory", lambda d: (Memory(4096), Memory(4096)), "inode="),
    Pair("file-replaced", replaced_file, "inode="),
    Pair("file-opened-otherwise", same_file, "flags="),
    Pair("file-of-another-name", lambda d: (OpenFile(d / "a"), OpenFile(d / "b")), "inode="),
    Pair("pipe", lambda d: (Pipe(), Pipe()), "inode="),
    Pair("fifo", lambda d: (Pipe(d / "a"), Pipe(d / "b")), "inode="),
    Pair("eventfd", lambda d: (EventFd(), EventFd()), "id="),
    Pair("timerfd", lambda d: (TimerFd(1), TimerFd(2)), "interval="),
    Pair("inotify", watching, "ino:"),
    Pair("child", lambda d: (Child(["sleep", "9"]), Child(["sleep", "9"])), "process"),
    Pair("pty", lambda d: (Pty(), Pty()), "index="),
    Pair("unix", connected, "inode="),
    Pair("netlink", lambda d: (NetlinkSocket(0), NetlinkSocket(0, [1])), "inode="),
    Pair("packet", lambda d: (PacketSocket("lo"), PacketSocket("lo")), "inode=", root=True),
    Pair("tap", lambda d: (Tap(DEVICES[0]), Tap(DEVICES[1])), "device=", root=True),
    Pair("tap-with-header", lambda d: (Tap(DEVICES[0]), Tap(DEVICES[1], header=12)), "device=", root=True),
    Pair("opaque", lambda d: (Opaque(lambda: os.open("/", os.O_PATH)), Opaque(lambda: os.open(d, os.O_PATH))), "opened="),
]  # fmt: skip


@pytest.fixture
def owned() -> Iterator[ExitStack]:
    with ExitStack() as owned:
        yield owned


def opened(owned: ExitStack, kind: BackendKind) -> DeclaredBackend:
    declared = DeclaredBackend("it", kind)
    declared.use(declared.open())
    owned.callback(declared.undo)
    owned.callback(declared.close)
    return declared


@pytest.mark.parametrize("pair", PAIRS, ids=[pair.name for pair in PAIRS])
def test_another_one_is_refused(pair: Pair, owned: ExitStack, tmp_path: Path) -> None:
    """Though its entry says whatever would make it the right one; and the right one is taken."""
    assert pair.why in refusal(pair, owned, tmp_path)


def refusal(pair: Pair, owned: ExitStack, directory: Path) -> str:
    """What is said of the wrong one, after the name of the backend."""
    if pair.root and os.geteuid() != 0:
        cannot_run("devices and raw sockets need root")
    right, wrong = (opened(owned, kind) for kind in pair.make(directory))
    said = right.describe()
    entries = [ManifestEntry("it", right.kind.kind, identify(fd)) for fd in right.fds]
    right.verify(entries, right.fds, said)
    entries = [ManifestEntry("it", right.kind.kind, identify(fd)) for fd in wrong.fds]
    with pytest.raises((MismatchError, BackendError)) as caught:
        right.verify(entries, wrong.fds, said)
    item, _, why = str(caught.value).partition(": ")
    assert right.item == item
    return why


@pytest.mark.matrix
def test_the_table_of_wrong_fds(tmp_path: Path) -> None:
    """What is said of each."""
    rows = []
    for pair in PAIRS:
        (tmp_path / pair.name).mkdir()
        with ExitStack() as owned:
            why = refusal(pair, owned, tmp_path / pair.name)
        rows.append([pair.name, re.sub(rf"/\S*/{pair.name}", "/place", why)])
    publish("wrong fds", ["in the place of one", "it is refused because"], rows)


@pytest.mark.parametrize(
    "kind",
    [Memory(1), Pipe(), EventFd(), TimerFd(1), Inotify(), Child(["x"]), Pty(), Tap("x"),
     UnixSocket("x"), NetlinkSocket(0), PacketSocket("lo"), OpenFile("/dev/null")],
    ids=lambda kind: kind.kind,
)  # fmt: skip
def test_an_fd_of_another_sort_is_refused(kind: BackendKind) -> None:
    """Where nobody has described it: after a crash, in the FD store."""
    with Fd(os.open("/dev/null", os.O_RDONLY)) as fd:
        assert "it is" in kind.refuse(fd.fileno())
    with socket.socket(socket.AF_INET) as sock:
        assert "it is" in kind.refuse(sock.fileno())


def perf_event() -> int:
    attributes = struct.pack("IIQ", 1, 64, 0).ljust(64, b"\0")  # PERF_TYPE_SOFTWARE, the CPU clock
    return call("syscall", 298, attributes, 0, -1, -1, 0)


def epoll() -> int:
    with select.epoll() as made:
        return os.dup(made.fileno())


def signalfd() -> int:
    mask = ctypes.c_uint64(1 << (signal.SIGUSR1 - 1))
    return call("signalfd", -1, ctypes.byref(mask), 0)


STAYING: dict[str, Callable[[], int]] = {
    "epoll": epoll,
    "signalfd": signalfd,
    "io_uring": lambda: call("syscall", 425, 4, ctypes.create_string_buffer(120)),
    "userfaultfd": lambda: call("syscall", 323, os.O_CLOEXEC),
    "perf event": perf_event,
}


@pytest.mark.parametrize("sort", STAYING)
def test_what_cannot_move_is_refused(sort: str) -> None:
    """When it is opened, with the reason; and nothing is left open."""
    try:
        os.close(STAYING[sort]())
    except OSError as error:
        cannot_run(f"the kernel makes no {sort} here: {error}")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BackendError, match=rf"opaque 'it': .*{sort}"):
        DeclaredBackend("it", Opaque(STAYING[sort])).open()
    assert before == len(os.listdir("/proc/self/fd"))


def test_a_file_declared_by_another_path_is_refused(owned: ExitStack, tmp_path: Path) -> None:
    """The new version would write to what it does not know."""
    source = opened(owned, OpenFile(tmp_path / "a"))
    entries = [ManifestEntry("it", "file", identify(source.fds[0]))]
    with pytest.raises(MismatchError, match="path="):
        DeclaredBackend("it", OpenFile(tmp_path / "b")).verify(
            entries, source.fds, source.describe()
        )


def test_a_posix_lock_keeps_a_file_here(owned: ExitStack, tmp_path: Path) -> None:
    """It would be lost with the process; the locks of the open file move."""
    file = OpenFile(tmp_path / "file")
    declared = opened(owned, file)
    fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    assert ["FLOCK WRITE 0 EOF"] == file.describe(file.fileno())["locks"]
    with file.file("r+") as other:
        fcntl.lockf(other, fcntl.LOCK_EX)
        with pytest.raises(BackendError, match="F_OFD_SETLK or flock"):
            declared.describe()


def test_what_is_of_no_use_is_opened_anew(owned: ExitStack, tmp_path: Path) -> None:
    """A file whose path has another one by now, a process that has ended; not a file without a name."""
    file = OpenFile(tmp_path / "file")
    declared = opened(owned, file)
    assert "" == declared.stale(declared.fds)
    os.unlink(tmp_path / "file")
    assert "" == declared.stale(declared.fds)
    (tmp_path / "file").touch()
    assert "another file is at" in declared.stale(declared.fds)
    child = Child(["true"])
    ended = opened(owned, child)
    select.select([child.fileno()], [], [])
    assert "it has ended" == ended.stale(ended.fds)
    assert (True, 0) == (child.ended, child.exit_code)


def test_a_child_ends_with_an_instance_that_does_not_take_over(owned: ExitStack) -> None:
    """It serves nobody."""
    child = Child(["sleep", "1000"])
    declared = opened(owned, child)
    child.send_signal(0)
    declared.undo()
    select.select([child.fileno()], [], [])
    assert -signal.SIGKILL == child.exit_code


def test_the_end_of_a_child_that_another_instance_has_started(owned: ExitStack) -> None:
    """Its end is known at once, and how it has ended once PID 1 has looked, if the kernel tells that."""
    adopt_orphans()  # as PID 1 does
    start = "import subprocess\nprint(subprocess.Popen(['sh', '-c', 'kill -STOP $$; exit 7'], stdout=subprocess.DEVNULL).pid)"
    pid = int(subprocess.check_output([sys.executable, "-c", start]))
    child = Child(["sh"])
    declared = DeclaredBackend("it", child)
    declared.use([owned.enter_context(Fd(os.pidfd_open(pid)))])
    assert (pid, False, None) == (child.pid, child.ended, child.exit_code)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    child.send_signal(signal.SIGCONT)
    select.select([child.fileno()], [], [])
    assert (True, None) == (child.ended, child.exit_code)
    os.waitpid(pid, 0)
    kernel = tuple(map(int, os.uname().release.split(".")[:2]))
    assert (-1, True, 7 if kernel >= (6, 15) else None) == (
        child.pid,
        child.ended,
        child.exit_code,
    )
