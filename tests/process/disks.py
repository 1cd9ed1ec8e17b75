# SPDX-License-Identifier: LGPL-2.1-or-later
"""Storage daemons with a disk, and a service that uses it; asserts what holds of every request."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.process.chat import Client
from tests.process.disk_user import BLOCK, content
from tests.support import cannot_run, eventually
from upgrader.lab.private_systemd.errors import TreeError
from upgrader.lab.private_systemd.suites import fetch
from upgrader.testing import Service

HERE = Path(__file__).parent
STORAGE = "qemu-storage-daemon"
DISK = 16 << 20  # bytes
#: Requests a second: so few that as many as can be are in flight all the time.
SPEED = 500
#: Between two upgrades, requests that are answered at least.
MORE = 30


class Daemon:
    """A storage daemon on `disk.sock` of a directory; `command` runs it."""

    def __init__(self, directory: Path, command: list[str]) -> None:
        self.path, self.file = directory / "disk.sock", directory / "disk.raw"
        self.log = directory / "log"
        self._command = command
        if not self.file.exists():
            with self.file.open("wb") as file:
                file.truncate(DISK)
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )

    def ready(self) -> None:
        """Wait until it listens."""
        assert self.process.stdout
        assert "listening\n" == self.process.stdout.readline()

    def sockets(self) -> set[str]:
        """All that it has open: the connection is one of them."""
        place = f"/proc/{self.process.pid}/fd"
        found = {os.readlink(f"{place}/{number}") for number in os.listdir(place)}
        return {each for each in found if each.startswith("socket:")}

    def lines(self, word: str) -> list[str]:
        """What the log has of a word."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(word)]

    def holds(self, count: int) -> bool:
        """Whether so many requests come in all that are not answered."""
        return eventually(lambda: count == len(self.lines("held")))

    def kill(self) -> None:
        """End it, whatever it is at."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


class Storage(Daemon):
    """qemu-storage-daemon of a suite."""

    def __init__(self, directory: Path, suite: str) -> None:
        export = f"type=vhost-user-blk,id=e,node-name=slow,writable=on,addr.type=unix,addr.path={directory}/disk.sock"
        super().__init__(directory, [
            *binary(suite),
            *("--object", f"throttle-group,id=group,x-iops-total={SPEED}"),
            *("--blockdev", f"driver=file,node-name=file,filename={directory}/disk.raw"),
            *("--blockdev", "driver=raw,node-name=raw,file=file"),
            *("--blockdev", "driver=throttle,node-name=slow,throttle-group=group,file=raw"),
            *("--export", export),
        ])  # fmt: skip

    def ready(self) -> None:
        assert eventually(lambda: self.path.exists() or self.process.poll() is not None)
        assert self.process.poll() is None


def binary(suite: str) -> list[str]:
    """Of the host, or of the tree of a suite, with the libraries there."""
    if suite == "host":
        found = shutil.which(STORAGE)
        if not found:
            cannot_run(f"{STORAGE} is not installed: packaging/bootstrap test")
        return [found]
    try:
        tree = fetch(suite, print, ("qemu-utils",))
    except TreeError as error:
        cannot_run(str(error))
    libraries = f"{tree}/usr/lib/x86_64-linux-gnu"
    loader = f"{tree}/lib64/ld-linux-x86-64.so.2"
    return [loader, "--library-path", libraries, f"{tree}/usr/bin/{STORAGE}"]


@contextmanager
def running(daemon: Daemon) -> Iterator[Daemon]:
    try:
        daemon.ready()
        yield daemon
    finally:
        daemon.kill()


@contextmanager
def own(directory: Path, **options: Any) -> Iterator[Daemon]:
    """The daemon of the tests, block_daemon.py."""
    places = {"path": "disk.sock", "file": "disk.raw", "log": "log"}
    said = {name: str(directory / place) for name, place in places.items()}
    command = [sys.executable, str(HERE / "block_daemon.py"), json.dumps({**said, **options})]
    with running(Daemon(directory, command)) as daemon:
        yield daemon


def asked(path: Path, what: str = "figures") -> dict[str, Any]:
    """What the service of disk_user.py answers."""
    with Client(path) as client:
        return dict(json.loads(client.ask(what)))


def flowing(path: Path) -> bool:
    """Whether requests are answered."""
    wanted = asked(path)["answered"] + MORE
    return eventually(lambda: asked(path)["answered"] >= wanted)


def require_all(figures: Mapping[str, Any], file: Path) -> None:
    """Assert that each request was answered once, and that the disk has what was written."""
    assert [] == figures["wrong"]
    assert 0 == figures["now"]
    assert figures["asked"] == figures["answered"]
    found = file.read_bytes()
    for block, tag in figures["written"].items():
        place = int(block) * BLOCK
        assert content(tag) == found[place : place + BLOCK], block


class User:
    """The service of disk_user.py on that disk."""

    def __init__(self, directory: Path, service: Service) -> None:
        self.directory, self.service = directory, service
        self.service.start(self.command())

    def command(self, **more: Any) -> list[str]:
        options = {
            "path": str(self.directory / "disk.sock"),
            "bind": f"unix:{self.directory}/questions",
            **more,
        }
        return [sys.executable, str(HERE / "disk_user.py"), json.dumps(options)]

    def ask(self, what: str = "figures") -> dict[str, Any]:
        return asked(self.directory / "questions", what)

    def flows(self) -> bool:
        return flowing(self.directory / "questions")

    def finish(self) -> dict[str, Any]:
        """Let it come to rest; its figures, after what is asserted of each one."""
        figures = self.ask("finish")
        require_all(figures, self.directory / "disk.raw")
        return figures


@contextmanager
def using(directory: Path) -> Iterator[User]:
    with Service() as service:
        yield User(directory, service)
