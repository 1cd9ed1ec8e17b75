# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk of a storage daemon goes from one process to the next with requests in flight: each is answered
once, and the daemon learns nothing of it."""

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.pages import ROOT
from tests.process.chat import Client
from tests.process.disk_user import BLOCK, content
from tests.support import cannot_run, eventually
from tests.tables import publish
from upgrader.errors import BackendError, MismatchError, UpgradeError
from upgrader.instance.declared_backend import DeclaredBackend
from upgrader.lab.private_systemd.errors import TreeError
from upgrader.lab.private_systemd.suites import fetch
from upgrader.lab.vhost_user import SLOTS, RingError, VhostUserDisk
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import identify
from upgrader.protocol.image import ManifestEntry
from upgrader.protocol.status_text import Origin
from upgrader.testing import Service, ServiceError

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
        with Client(self.directory / "questions") as client:
            return dict(json.loads(client.ask(what)))

    def flows(self) -> bool:
        """Whether requests are answered."""
        wanted = self.ask()["answered"] + MORE
        return eventually(lambda: self.ask()["answered"] >= wanted)

    def finish(self) -> dict[str, Any]:
        """Let it come to rest; its figures, after what is asserted of each one."""
        figures = self.ask("finish")
        assert [] == figures["wrong"]
        assert 0 == figures["now"]
        assert figures["asked"] == figures["answered"]
        found = (self.directory / "disk.raw").read_bytes()
        for block, tag in figures["written"].items():
            place = int(block) * BLOCK
            assert content(tag) == found[place : place + BLOCK], block
        return figures


@contextmanager
def using(directory: Path) -> Iterator[User]:
    with Service() as service:
        yield User(directory, service)


def play(daemon: Daemon, directory: Path, mode: str, count: int) -> dict[str, Any]:
    """So many upgrades while requests are in flight, and the daemon has the same sockets; the figures."""
    before = daemon.sockets()
    with using(directory) as user:
        service = user.service
        upgrades = {"live": service.live, "restart": service.upgrade, "exec": service.execute}
        assert user.flows()
        there = daemon.sockets()
        assert 1 == len(there - before)
        in_flight = []
        for _ in range(count):
            in_flight.append(user.ask()["now"])
            if mode in upgrades:
                upgrades[mode](user.command())
            else:
                with pytest.raises(ServiceError):
                    service.live(user.command(**{"break": mode}))
            assert user.flows()
            assert there == daemon.sockets()
        figures = user.finish()
    assert [SLOTS] * (count if mode in upgrades else 0) == figures["moved"]
    return {**figures, "in_flight": in_flight}


@pytest.mark.parametrize("mode", ["live", "die"])
def test_each_request_is_answered_once(mode: str, tmp_path: Path) -> None:
    """By a real storage daemon, which has the same connection throughout, whatever is upgraded and however
    that ends."""
    with running(Storage(tmp_path, "host")) as daemon:
        play(daemon, tmp_path, mode, 2)


def test_the_daemon_is_told_nothing(tmp_path: Path) -> None:
    """All messages come before the first request. With a region of what is in flight, there is one FD more."""
    with own(tmp_path) as daemon, using(tmp_path) as user:
        assert user.flows()
        messages = daemon.lines("message")
        for upgrade in (user.service.live, user.service.upgrade, user.service.execute):
            upgrade(user.command())
            assert user.flows()
        assert messages == daemon.lines("message")
        (backend,) = user.service.describe()["backends"][1:]
        assert "example.vhost-user-blk" == backend["kind"]
        assert {"id", "inode", "part", "path", "seals"} <= set(backend["verified"])
        user.finish()


def test_a_daemon_that_is_killed(tmp_path: Path) -> None:
    """With every request in flight, each second one older than some that are answered; then an upgrade.
    The daemon that comes in its place does all of them, each once, and the program in the place of the
    one that has asked takes the answers."""
    with using_held(tmp_path) as (daemon, user):
        user.service.live(user.command())
        daemon.kill()
        user.service.live(user.command())
        messages = len(daemon.lines("message"))
        with own(tmp_path, lie="close") as ending:  # connects, and has gone again
            assert eventually(lambda: len(ending.lines("message")) > messages + 1)
        with own(tmp_path) as after:
            assert user.flows()
            assert SLOTS == len(after.lines("again"))
            figures = user.finish()
            assert [SLOTS, SLOTS] == figures["moved"]
            assert 1 == figures["reconnected"]
            assert figures["asked"] == len(after.lines("did"))


@contextmanager
def using_held(directory: Path) -> Iterator[tuple[Daemon, User]]:
    """Every request that there can be is in flight, and stays there."""
    with own(directory, hold=50) as daemon, using(directory) as user:
        assert daemon.holds(SLOTS)
        yield daemon, user


@pytest.mark.parametrize(
    "mode",
    ["restart", "refuse", *(pytest.param(m, marks=pytest.mark.matrix) for m in ("exec", "die"))],
)
def test_one_that_is_killed_around_an_upgrade(mode: str, tmp_path: Path) -> None:
    """Whatever becomes of the upgrade, who serves then connects again."""
    with using_held(tmp_path) as (daemon, user):
        daemon.kill()
        service = user.service
        upgrades = {"restart": service.upgrade, "exec": service.execute}
        if mode in upgrades:
            upgrades[mode](user.command())
        else:
            with pytest.raises(ServiceError):
                service.live(user.command(**{"break": mode}))
        with own(tmp_path) as after:
            assert user.flows()
            assert SLOTS == len(after.lines("again"))
            assert user.finish()["asked"] == len(after.lines("did"))


def test_a_daemon_without_a_region_that_is_killed(tmp_path: Path) -> None:
    """Nobody can know what it has done: the program is told so, and what to do."""
    with own(tmp_path, region=False) as daemon, using(tmp_path) as user:
        assert user.flows()
        daemon.kill()
        assert eventually(lambda: bool(user.ask()["wrong"]))
        assert "nobody knows what" in user.ask()["wrong"][0]
        with own(tmp_path, region=False):
            user.service.kill()
            assert Origin.COLD is user.service.start(user.command()).origin
            assert user.flows()
            user.finish()


def test_a_crash(tmp_path: Path) -> None:
    """The disk is connected anew, to the same daemon."""
    with running(Storage(tmp_path, "host")), using(tmp_path) as user:
        assert user.flows()
        user.service.kill()
        assert Origin.COLD is user.service.start(user.command()).origin
        assert user.flows()
        user.finish()


def test_another_connection_in_its_place(tmp_path: Path) -> None:
    """The version that gets it refuses it by name; so does one that wants the disk of another daemon. The
    one before goes on."""
    with own(tmp_path), using(tmp_path) as user:
        service = user.service
        with pytest.raises(ServiceError, match="path='/elsewhere"):
            service.live(user.command(path="/elsewhere"))
        assert user.flows()
        service.live(user.command(lie=True))
        with pytest.raises(ServiceError, match=r"vhost-user-blk 'disk'.*connection: inode="):
            service.live(user.command())
        assert user.flows()
        user.finish()


# One process that plays both


@pytest.fixture
def owned() -> Iterator[ExitStack]:
    with ExitStack() as owned:
        yield owned


def opened(owned: ExitStack, directory: Path, **options: Any) -> DeclaredBackend:
    """A disk of a daemon of its own."""
    directory.mkdir(exist_ok=True)
    owned.enter_context(own(directory, **options))
    declared = DeclaredBackend("disk", VhostUserDisk(str(directory / "disk.sock"), seconds=20))
    declared.use(declared.open())
    owned.callback(declared.close)
    return declared


def disk(declared: DeclaredBackend) -> VhostUserDisk:
    assert isinstance(declared.kind, VhostUserDisk)
    return declared.kind


def test_a_wrong_fd_in_the_place_of_any_part(owned: ExitStack, tmp_path: Path) -> None:
    """Of another disk with the same name, or another part of this one: it is refused by name."""
    right, other = (opened(owned, tmp_path / name) for name in ("a", "b"))
    said, path = right.describe(), disk(right).path

    def refusal(fds: list[Fd]) -> str:
        entries = [ManifestEntry("disk", right.kind.kind, identify(fd)) for fd in fds]
        try:
            loaded = DeclaredBackend("disk", VhostUserDisk(path))
            loaded.verify(entries, fds, said)
            loaded.adopt()
        except (MismatchError, BackendError) as error:
            return str(error)
        return ""

    own_fds = list(right.fds)
    assert "" == refusal(own_fds)
    for place, (part, why) in enumerate([
        ("call", "id="), ("connection", "inode="), ("memory", "inode="), ("kick", "id="),
        ("inflight", "inode="),
    ]):  # fmt: skip
        wrong = [*own_fds[:place], other.fds[place], *own_fds[place + 1 :]]
        assert f"example.vhost-user-blk 'disk': the manifest says {part}: {why}" in refusal(wrong)
    call, *others, kick, region = own_fds
    assert "call: id=" in refusal([kick, *others, call, region])
    assert "call: it is no eventfd" in refusal([region, *others, kick, call])
    with socket.socket(socket.AF_INET) as sock:
        fd = Fd(os.dup(sock.fileno()))
        assert "connection: it is AF_INET" in refusal([call, fd, *own_fds[2:]])
        fd.close()


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("size", "GET_FEATURES, answers 4 bytes in place of 8"),
        ("other", "GET_FEATURES, answers message 2"),
        ("close", "GET_FEATURES, closes the connection"),
        ("old", "GET_FEATURES, lacks 0x100000000"),
        ("refuse", "SET_MEM_TABLE, refuses with 1"),
        ("no fd", "GET_INFLIGHT_FD, sends 0 FDs in place of one"),
        ("region", "GET_INFLIGHT_FD, has 2080 bytes at 0 of a file of 1040"),
    ],
)
def test_a_daemon_that_lies(lie: str, said: str, owned: ExitStack, tmp_path: Path) -> None:
    """The error says what it was asked for, and what is wrong with its answer."""
    with pytest.raises(BackendError, match=f"^example.vhost-user-blk 'disk': .*{said}"):
        opened(owned, tmp_path, lie=lie)


def test_a_daemon_that_does_not_answer(owned: ExitStack, tmp_path: Path) -> None:
    """Nobody waits for ever."""
    owned.enter_context(own(tmp_path, lie="silent"))
    declared = DeclaredBackend("disk", VhostUserDisk(str(tmp_path / "disk.sock"), seconds=0.2))
    with pytest.raises(BackendError, match="GET_FEATURES, does not answer in time"):
        declared.open()


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("twice", "2 answers to 1 requests"),
        ("foreign", "an answer to descriptor 3, which nobody has asked"),
        ("inside", "an answer to descriptor 61"),
        ("no status", "an answer to request 7 with status 255"),
    ],
)
def test_answers_that_nobody_has_asked_for(
    lie: str, said: str, owned: ExitStack, tmp_path: Path
) -> None:
    """They are no answers."""
    held = disk(opened(owned, tmp_path, lie=lie))
    held.read(0, 512, 7)
    select.select([held.fileno()], [], [])
    with pytest.raises(RingError, match=said):
        held.answers()


def test_what_cannot_be_asked_for(owned: ExitStack, tmp_path: Path) -> None:
    """What is not on the disk, too much at a time, and one request too many."""
    held = disk(opened(owned, tmp_path, hold=0))
    assert DISK // 512 == held.capacity
    for sector, length in [(-1, 512), (0, 100), (0, 1 << 20), (held.capacity, 512)]:
        with pytest.raises(ValueError, match="bytes"):
            held.read(sector, length, 1)
    assert SLOTS == held.room
    tag = 0
    while held.room:
        tag += 1
        held.flush(tag)
        if tag % 2 == 0:
            select.select([held.fileno()], [], [])
            assert [tag] == [answer.tag for answer in held.answers()]
    assert [*range(1, 2 * SLOTS, 2)] == sorted(asked.tag for asked in held.in_flight)
    with pytest.raises(BlockingIOError, match=f"{SLOTS} requests are in flight"):
        held.flush(0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"available": 1 << 16}, "its facts do not decode"),
        ({"available": 3}, "3 in flight"),
        ({"asked": {SLOTS: [0, 0, 512, 1]}}, "its facts do not decode"),
        ({"asked": {0: [9, 0, 512, 1]}}, "its facts do not decode"),
        ({"asked": {0: [0, 0, 1 << 20, 1]}}, "its facts do not decode"),
        ({"agreed": [1 << 40, 0, 0, 0, 0]}, "a program that knows less"),
    ],
)
def test_a_ring_that_cannot_be(
    change: dict[str, Any], said: str, owned: ExitStack, tmp_path: Path
) -> None:
    """What another version says of the ring is checked before anything is used."""
    source = opened(owned, tmp_path, region=False)
    described = source.describe()
    memory = msgspec.msgpack.decode(described.facts[2], strict=False)
    memory["ring"] |= change
    facts = [*described.facts[:2], msgspec.msgpack.encode(memory), *described.facts[3:]]
    entries = [ManifestEntry("disk", source.kind.kind, identify(fd)) for fd in source.fds]
    loaded = DeclaredBackend("disk", VhostUserDisk(disk(source).path))
    with pytest.raises(UpgradeError, match=said):
        loaded.verify(entries, source.fds, msgspec.structs.replace(described, facts=facts))


# The table


def row(directory: Path, suite: str, mode: str, count: int) -> list[str]:
    directory.mkdir()
    said = subprocess.run(
        [*binary(suite), "--version"], stdout=subprocess.PIPE, text=True, check=True
    )
    with running(Storage(directory, suite)) as daemon:
        figures = play(daemon, directory, mode, count)
    left = spread(figures["waiting"]) if figures["waiting"] else "-"
    numbers = [str(count), str(figures["answered"]), spread(figures["in_flight"]), left]
    return [f"{STORAGE} {said.stdout.split()[2]}", mode, *numbers, "each once", "the same"]


def spread(numbers: list[int]) -> str:
    """The least and the most of them."""
    least, most = min(numbers), max(numbers)
    return str(most) if least == most else f"{least} to {most}"


def killed(directory: Path, count: int) -> list[str]:
    """Daemons that are killed with all requests in flight, each before an upgrade."""
    directory.mkdir()
    with ExitStack() as owned:
        daemon = owned.enter_context(own(directory, hold=50))
        user = owned.enter_context(using(directory))
        for number in range(1, count + 1):
            assert daemon.holds(SLOTS * number)
            daemon.kill()
            user.service.live(user.command())
            hold = 50 if number < count else None
            daemon = owned.enter_context(own(directory, hold=hold))
        assert user.flows()
        figures = user.finish()
        assert count == figures["reconnected"]
        assert figures["asked"] == len(daemon.lines("did"))
        again = len(daemon.lines("again"))
    assert SLOTS * count == again
    numbers = [str(count), str(figures["answered"]), spread(figures["moved"])]
    left = f"{again} in all, done again"
    name = "one of the tests, killed before each upgrade"
    return [name, "live", *numbers, left, "each once", "a new one each time"]


@pytest.mark.matrix
def test_the_table_of_disks(tmp_path: Path) -> None:
    """Ten upgrades of each sort."""
    rows = [
        row(tmp_path / f"{suite}-{mode}", suite, mode, 10)
        for suite in ("host", "trixie")
        for mode in ("live", "restart", "exec", "refuse", "die")
    ]
    rows.append(killed(tmp_path / "killed", 10))
    version = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(version, capture_output=True, text=True, check=True).stdout.strip()
    rows.append(["date and commit", f"{time.strftime('%Y-%m-%d')}, {commit}", *[""] * 6])
    head = [
        "storage daemon",
        "mode",
        "upgrades",
        "requests",
        "in flight before each",
        "not answered yet after each",
        "answered",
        "its connection",
    ]
    publish("disks", head, rows)
