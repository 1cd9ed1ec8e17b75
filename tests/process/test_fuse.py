# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file system whose program is replaced while it is read: nobody who uses it learns of that."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import cannot_run, eventually
from upgrader.backends import Fuse
from upgrader.errors import MismatchError
from upgrader.testing import Service, ServiceError

HERE = Path(__file__).parent
CONTENT = "content"
BETWEEN = 50  # times that it is read between two upgrades
PATIENCE = 20  # seconds for what uses it: a process that waits for it hangs if nobody serves


class MemoryFiles:
    """The service of memfs.py, on a directory."""

    def __init__(self, mountpoint: Path) -> None:
        mountpoint.mkdir()
        self.mountpoint = mountpoint
        self.command = [sys.executable, str(HERE / "memfs.py")]
        self.service = Service(environment={"MOUNTPOINT": str(mountpoint)})

    def run(self, script: str) -> str:
        """What a shell says that is there. This process, which plays PID 1, must never wait for it."""
        script = f"cd {self.mountpoint} && {script}"
        command = ["timeout", "-s", "KILL", str(PATIENCE), "sh", "-c", script]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        assert 0 == done.returncode, script
        return done.stdout.strip()

    @property
    def mounts(self) -> list[str]:
        """The numbers of the connections that are mounted there."""
        lines = map(str.split, Path("/proc/self/mountinfo").read_text().splitlines())
        return [fields[2] for fields in lines if fields[4] == str(self.mountpoint)]

    @contextlib.contextmanager
    def read(self) -> Iterator[Callable[[], list[int]]]:
        """Read all the time, about 100 times a second; yields what says how often it went well, how
        often not, and the longest wait in ms."""
        command = [sys.executable, str(HERE / "reading.py"), f"{self.mountpoint}/file", CONTENT]
        with subprocess.Popen(
            ["timeout", "-s", "KILL", "200", *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as reading:  # fmt: skip
            assert reading.stdin is not None
            assert reading.stdout is not None
            asked, says = reading.stdin, reading.stdout
            assert "reading\n" == says.readline()

            def figures() -> list[int]:
                print(file=asked, flush=True)
                return [int(figure) for figure in says.readline().split()]

            yield figures
            asked.close()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[MemoryFiles]:
    """A file system with one file."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or os.geteuid() != 0:
        cannot_run("a file system needs /dev/fuse and CAP_SYS_ADMIN")
    files = MemoryFiles(tmp_path / "files")
    try:
        with files.service:
            files.service.start(files.command)
            files.run(f"printf {CONTENT} > file")
            yield files
    finally:
        for _ in files.mounts:
            Fuse(str(files.mountpoint)).unmount()


@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.matrix)])
def test_the_program_is_replaced(files: MemoryFiles, count: int) -> None:
    """Live, by a restart and by exec, while it is read and stat'ed: nothing fails, what is written is
    there, and the kernel has the same connection throughout."""
    connection = files.mounts
    service = files.service
    modes = {"live": service.live, "restart": service.upgrade, "exec": service.execute}
    for mode, upgrade in modes.items():
        with files.read() as figures:
            for _ in range(count):
                upgrade(files.command)
                until = figures()[0] + BETWEEN
                assert eventually(lambda: figures()[0] >= until)  # noqa: B023
                assert CONTENT == files.run("cat file")
            done, failed, longest = figures()
        print(f"{mode}: {done} times, longest wait {longest} ms")
        assert failed == 0
        files.run(f"printf {mode} > {mode}")
    assert "content live restart exec" == files.run(
        "echo $(cat file) $(cat live) $(cat restart) $(cat exec)"
    )
    assert "exec file live restart" == files.run("echo $(ls)")
    assert connection == files.mounts
    (backend,) = service.describe()["backends"]
    assert ["connection", "mountpoint"] == backend["verified"]
    service.stop(for_good=True)
    assert not files.mounts


def test_a_version_that_mounts_another_place(files: MemoryFiles, tmp_path: Path) -> None:
    """It is refused with what is wrong, and the one before serves on."""
    files.service.environment["MOUNTPOINT"] = str(tmp_path / "other")
    with files.read() as figures:
        with pytest.raises(ServiceError, match="mountpoint="):
            files.service.live(files.command)
        assert 0 == figures()[1]
    files.service.environment["MOUNTPOINT"] = str(files.mountpoint)

    files.service.live(files.command)
    assert CONTENT == files.run("cat file")


def test_a_crash(files: MemoryFiles, tmp_path: Path) -> None:
    """The file system is there all the time: who uses it waits until the next process has come."""
    stop = tmp_path / "stop"
    script = f"while [ ! -e {stop} ]; do ls {files.mountpoint} >&2 || exit 1; done"
    with subprocess.Popen(
        ["timeout", "-s", "KILL", str(PATIENCE), "sh", "-c", script], stderr=subprocess.DEVNULL
    ) as using:
        files.service.kill()
        files.service.start(files.command)
        stop.touch()
        assert 0 == using.wait()
    files.run("printf again > file")
    assert "again" == files.run("cat file")
    assert 1 == len(files.mounts)


def test_another_connection_in_its_place(files: MemoryFiles, tmp_path: Path) -> None:
    """Two connections are told apart, and what is no connection is refused by name."""
    other = tmp_path / "other"
    other.mkdir()
    kind = Fuse(str(other))
    fd = kind.open()
    try:
        described = kind.describe(fd)
        kind.verify(fd, described)
        assert "" == kind.refuse(fd)
        (number,) = (text.partition(":")[2] for text in files.mounts)
        with pytest.raises(MismatchError, match=f"connection={number}"):
            kind.verify(fd, {**described, "connection": int(number)})
        assert "is on" in Fuse(str(files.mountpoint)).refuse(fd)
        with open(os.devnull) as null:
            assert "it is not /dev/fuse" == kind.refuse(null.fileno())
    finally:
        kind.unmount()
        os.close(fd)
    assert eventually(lambda: "nothing of it is mounted" in _refusal(kind))


def _refusal(kind: Fuse) -> str:
    fd = os.open("/dev/fuse", os.O_RDWR)
    try:
        return kind.refuse(fd)
    finally:
        os.close(fd)
