# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every kind of backend, in one service, through every mode and a crash: what goes on, and what is verified."""

import array
import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.process.chat import Client
from tests.support import cannot_run
from tests.tables import publish
from upgrader.protocol.status_text import Origin
from upgrader.testing import Service, ServiceError

PROGRAM = Path(__file__).with_name("holder.py")
DEVICE = f"ev{os.getpid() % 10**8}"
#: How a service is replaced, in the order in which that is tried.
MODES = ["start", "refused", "killed", "live", "exec", "restart", "fd-store", "crash"]
#: What the check of a version does that does not take over.
BREAKS = {"refused": "refuse", "killed": "die"}
#: Of one interface whose frames are counted.
LOOPBACK = "lo"


@dataclass
class Player:
    """The service with all kinds, and the programs at the other ends."""

    directory: Path
    service: Service
    peer: socket.socket
    far: socket.socket

    def ask(self, text: str) -> str:
        with Client(self.directory / "socket") as client:
            return client.ask(text)

    def before(self, step: int) -> None:
        """What comes while nobody reads."""
        (self.directory / "watched" / f"file{step}").touch()
        memfd = os.memfd_create("flight")
        os.write(memfd, f"flight{step}".encode())
        with os.fdopen(memfd):
            self.far.sendmsg([b"x"], [(1, 1, array.array("i", [memfd]))])


@dataclass(frozen=True)
class Member:
    """A kind in the table: how it is declared, what it is used for, and what is seen after each step.

    `lost`: what is seen after a crash, if that is something else, and why.
    """

    name: str
    declared: Callable[[Path], list[Any]]
    use: str
    seen: Callable[[Path, int], str]
    goes_on: str
    lost: tuple[Callable[[int], str], str] | None = None


def counted(directory: Path, step: int) -> str:
    return str(step + 1)


MEMBERS = [
    Member("memory", lambda d: ["memory", [4096], {}], "add", counted, "what was written"),
    Member(
        "tap", lambda d: ["tap", [DEVICE], {"header": 12}], "header", lambda d, n: "12",
        "the device, its vnet header",
    ),
    Member(
        "file", lambda d: ["file", [str(d / "log")], {}], "append", counted,
        "offset and flock, which nobody else can take",
    ),
    Member("pipe", lambda d: ["pipe", [], {}], "carry", counted, "what nobody has read"),
    Member(
        "fifo", lambda d: ["pipe", [str(d / "fifo")], {}], "carry", counted, "what nobody has read"
    ),
    Member("eventfd", lambda d: ["eventfd", [], {}], "count", counted, "the count"),
    Member(
        "timerfd", lambda d: ["timerfd", [0.001], {}], "expired", lambda d, n: "", "expirations"
    ),
    Member(
        "inotify", lambda d: ["inotify", [], {}], "created",
        lambda d, n: f"{d / 'watched'}/file{n}", "events, and the paths of watches",
        (lambda n: f"/file{n}", "events go on; which path a watch is of, nobody has said"),
    ),
    Member("child", lambda d: ["child", [["sleep", "1000"]], {}], "pid", lambda d, n: "", "it runs"),
    Member("pty", lambda d: ["pty", [], {}], "echo", lambda d, n: "x", "the terminal"),
    Member(
        "packet", lambda d: ["packet", [LOOPBACK], {}], "frames", lambda d, n: str(n > 0),
        "frames that nobody has read",
    ),
    Member(
        "netlink", lambda d: ["netlink", [0], {"groups": [1, 5]}], "sequence", counted,
        "groups, sequence number",
        (lambda n: "1", "groups go on; the sequence number begins anew"),
    ),
    Member(
        "unix", lambda d: ["unix", [str(d / "peer")], {}], "in_flight", lambda d, n: f"flight{n}",
        "what is under way, FDs as well",
    ),
    Member(
        "opaque", lambda d: ["namespace", [], {}], "number",
        lambda d, n: str(os.stat("/proc/self/ns/net").st_ino), "it is open",
    ),
]  # fmt: skip


@pytest.fixture
def player(tmp_path: Path) -> Iterator[Player]:
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK) or os.geteuid() != 0:
        cannot_run("devices and raw sockets need CAP_NET_ADMIN and CAP_NET_RAW")
    (tmp_path / "watched").mkdir()
    with ExitStack() as owned:
        peer = owned.enter_context(socket.socket(socket.AF_UNIX))
        peer.bind(str(tmp_path / "peer"))
        peer.listen()
        service = owned.enter_context(Service())
        yield Player(tmp_path, service, peer, owned.enter_context(socket.socket(socket.AF_UNIX)))


def play(player: Player) -> dict[str, list[str]]:
    """All steps with all kinds; returns what was verified of each, and what went on."""
    directory, service = player.directory, player.service
    options = {
        "face": "aio",
        "bind": f"unix:{directory}/socket",
        "directory": str(directory / "watched"),
        "backends": {each.name: each.declared(directory) for each in MEMBERS},
    }

    def program(**more: str) -> list[str]:
        return [sys.executable, str(PROGRAM), json.dumps({**options, **more})]

    command = program()
    upgrades = {
        "live": service.live,
        "exec": service.execute,
        "restart": service.upgrade,
        "fd-store": service.upgrade,
    }
    service.start(command)
    player.far.close()
    player.far = player.peer.accept()[0]
    player.ask("do inotify watch")
    verified: dict[str, list[str]] = {}
    pids = set()
    try:
        for step, mode in enumerate(MODES):
            player.before(step)
            if mode in BREAKS:
                with pytest.raises(ServiceError):
                    service.live(program(**{"break": BREAKS[mode]}))
            elif mode in upgrades:
                if mode == "fd-store":
                    service.environment["UPGRADER_BACKEND_TRANSFER_MECHANISM"] = mode
                    service.upgrade(command)  # from here on
                assert mode in (upgrades[mode](command).origin, "fd-store")
                told = {each["name"]: each for each in service.describe()["backends"]}
                verified = {each.name: told[each.name]["verified"] for each in MEMBERS}
                assert all(verified.values()), verified
            elif mode == "crash":
                service.kill()
                assert Origin.COLD is service.start(command).origin
            for each in MEMBERS:
                seen = player.ask(f"do {each.name} {each.use}")
                wanted = each.seen(directory, step)
                if mode == "crash" and each.lost:
                    wanted = each.lost[0](step)
                if each.name == "timerfd":
                    assert int(seen) > 0
                elif each.name == "child":
                    assert seen.endswith(" False None")
                    pids.add(int(seen.split()[0]))
                else:
                    assert wanted == seen, (each.name, mode)
            with (directory / "log").open("rb") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert 1 == len(pids)
    finally:
        player.far.close()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    service.stop(for_good=True)
    assert [] == service.store
    assert not Path(f"/sys/class/net/{DEVICE}").exists()
    return verified


def test_every_kind_in_every_mode(player: Player) -> None:
    """What nobody has read, held, counted or locked goes on; a stop lets go of all of it."""
    play(player)


@pytest.mark.matrix
def test_the_table_of_kinds(player: Player) -> None:
    """The same, written down."""
    verified = play(player)
    rows = [
        [
            each.name, each.goes_on, *["yes"] * 4, each.lost[1] if each.lost else "yes",
            ", ".join(verified[each.name]),
        ]
        for each in MEMBERS
    ]  # fmt: skip
    head = [
        "backend",
        "what goes on",
        "failed upgrade",
        "live",
        "restart",
        "exec",
        "crash",
        "verified",
    ]
    publish("kinds", head, rows)
