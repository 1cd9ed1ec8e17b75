# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backends of all kinds in a running service: they move in every mode, and what fails changes nothing."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process.chat import Client
from tests.support import cannot_run, eventually
from upgrader.codes import Code
from upgrader.protocol.status_text import Origin
from upgrader.testing import Service, ServiceError

PROGRAM = Path(__file__).with_name("holder.py")
MEMORY = {"cache": ["memory", [4096], {}]}
#: A name of this process's own: all tests of a machine share its network.
DEVICE = f"up{os.getpid() % 10**8}"
AIO = pytest.mark.parametrize("face", ["aio"])
BLOCKING = pytest.mark.parametrize("face", ["blocking"])
TAP = {"tap": ["tap", [DEVICE], {"header": 12}]}


class Holder:
    """The program, with what it declares from version to version."""

    def __init__(self, face: str, directory: Path) -> None:
        self.face = face
        self.path = directory / "socket"
        self.service = Service()

    def command(self, **options: Any) -> list[str]:
        options = {"face": self.face, "bind": f"unix:{self.path}", **options}
        return [sys.executable, str(PROGRAM), json.dumps(options)]

    def ask(self, text: str) -> str:
        with Client(self.path) as client:
            return client.ask(text)

    def backend(self, name: str) -> dict[str, Any]:
        """What the instance says of one of its backends."""
        return next(b for b in self.service.describe()["backends"] if b["name"] == name)

    @property
    def stored(self) -> set[str]:
        return {name for name, _ in self.service.store}


@pytest.fixture
def holder(face: str, tmp_path: Path) -> Iterator[Holder]:
    holder = Holder(face, tmp_path)
    with holder.service:
        yield holder


@pytest.fixture
def tap(holder: Holder) -> Holder:
    """A holder that may make a device."""
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK) or os.geteuid() != 0:
        cannot_run("a TAP device needs /dev/net/tun and CAP_NET_ADMIN")
    return holder


def test_memory_moves_in_every_mode(holder: Holder) -> None:
    """Live, by exec, by restart, and over a crash it is the same memory; a stop lets it go."""
    command = holder.command(backends=MEMORY)
    service = holder.service
    service.start(command)
    assert "1" == holder.ask("do cache add")
    before = holder.ask("facts cache")
    assert [] == holder.backend("cache")["verified"]
    for count, upgrade in enumerate((service.live, service.execute, service.upgrade), start=2):
        upgrade(command)
        assert str(count) == holder.ask("do cache add")
        assert before == holder.ask("facts cache")
        said = holder.backend("cache")
        assert ("memory", 4096, True) == (said["kind"], said["size"], said["transfer"])
        assert ["device", "inode", "seals", "size"] == said["verified"]
        assert "upgrader-entry-memory.cache" in holder.stored
    service.kill()
    assert Origin.COLD is service.start(command).origin
    assert "5" == holder.ask("do cache add")
    service.stop(for_good=True)
    assert set() == holder.stored


@BLOCKING
def test_sealed_memory_is_sealed_for_the_next_one(holder: Holder) -> None:
    """Nobody can write to it again, and it is mapped as it is."""
    command = holder.command(backends=MEMORY)
    holder.service.start(command)
    holder.ask("do cache add")
    assert "1" == holder.ask("do cache seal")
    holder.service.live(command)
    assert ["grow", "shrink", "write"] == json.loads(holder.ask("facts cache"))[0]["seals"]


@AIO
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"backends": {}}, "memory 'cache' is not declared by the new version"),
        ({"backends": {"cache": TAP["tap"]}}, "memory 'cache' is declared as tap"),
        (
            {"backends": {"cache": ["memory", [8192], {}]}},
            "it has 4096 bytes, and 8192 are declared",
        ),
    ],
    ids=["undeclared", "another-kind", "another-size"],
)
def test_a_version_that_cannot_take_it_is_refused(
    holder: Holder, options: dict[str, Any], why: str
) -> None:
    """By name; the running one serves on, and the next good one has it all."""
    command = holder.command(backends=MEMORY)
    holder.service.start(command)
    assert "1" == holder.ask("do cache add")
    with pytest.raises(ServiceError, match=why):
        holder.service.live(holder.command(**options))
    assert "2" == holder.ask("do cache add")
    holder.service.live(command)
    assert "3" == holder.ask("do cache add")


@BLOCKING
def test_a_restart_into_such_a_version_keeps_it(holder: Holder) -> None:
    """It fails by name, and the image waits for a good one."""
    command = holder.command(backends=MEMORY)
    holder.service.start(command)
    assert "1" == holder.ask("do cache add")
    with pytest.raises(ServiceError) as caught:
        holder.service.restart(holder.command())
    assert "memory of 'cache': in the image, but not declared" in caught.value.stderr
    assert Origin.RESTART is holder.service.start(command).origin
    assert "2" == holder.ask("do cache add")


@AIO
@pytest.mark.parametrize("mode", ["live", "upgrade"])
def test_what_is_dropped_is_let_go(holder: Holder, mode: str) -> None:
    """An image with it is accepted, and PID 1 keeps it no longer."""
    holder.service.start(holder.command(backends=MEMORY))
    getattr(holder.service, mode)(holder.command(drop=["cache"]))
    holder.service.stop()
    assert not any("memory" in name for name in holder.stored)


@AIO
@pytest.mark.parametrize("mode", ["live", "upgrade"])
def test_without_backend_transfer_a_new_one_is_opened(holder: Holder, mode: str) -> None:
    """Said on either side."""
    command = holder.command(backends=MEMORY)
    holder.service.start(command)
    assert "1" == holder.ask("do cache add")
    holder.service.environment["UPGRADER_BACKEND_TRANSFER"] = "cache=no"
    status = getattr(holder.service, mode)(command)
    assert 1 == status.left_behind or mode == "live"
    assert "1" == holder.ask("do cache add")
    assert not holder.backend("cache")["transfer"]
    del holder.service.environment["UPGRADER_BACKEND_TRANSFER"]
    getattr(holder.service, mode)(command)
    assert "1" == holder.ask("do cache add")


@AIO
def test_after_a_crash_of_the_new_version_the_insurance_has_it(holder: Holder) -> None:
    """Memory as it was described, and watches, of which what was said held only once."""
    (holder.path.parent / "watched").mkdir()
    backends = {**MEMORY, "files": ["inotify", [], {}], "hits": ["eventfd", [], {}]}
    command = holder.command(backends=backends, directory=str(holder.path.parent / "watched"))
    service = holder.service
    service.start(command)
    holder.ask("do files watch")
    assert ("1", "1") == (holder.ask("do cache add"), holder.ask("do hits count"))
    service.live(command)
    assert ("2", "2") == (holder.ask("do cache add"), holder.ask("do hits count"))
    assert eventually(lambda: any("insurance" in name for name in holder.stored))
    service.kill()
    assert Origin.INSURANCE is service.start(command).origin
    assert ("3", "3") == (holder.ask("do cache add"), holder.ask("do hits count"))
    assert ["id"] == holder.backend("hits")["verified"]
    assert [] == holder.backend("files")["verified"]
    (holder.path.parent / "watched" / "file").touch()
    assert "/file" == holder.ask("do files created")


@AIO
def test_an_exec_gives_up_the_insurance(holder: Holder) -> None:
    """Of a live upgrade just before; after a crash one day, an instance would go back to that."""
    command = holder.command()
    holder.service.start(command)
    holder.service.live(command)
    assert eventually(lambda: any("insurance" in name for name in holder.stored))
    holder.service.execute(command)

    assert eventually(lambda: not any("insurance" in name for name in holder.stored))


@AIO
def test_who_is_replaced_reads_no_more(holder: Holder) -> None:
    """While it drains a busy connection, all that comes is the new instance's; if the new one is
    refused, all that comes is its own again."""
    fifo = holder.path.with_name("fifo")
    options = {"backends": {"jobs": ["pipe", [str(fifo)], {}]}, "reads": "jobs"}
    command = holder.command(**options)
    holder.service.start(command)
    with Client(holder.path) as busy, open(fifo, "wb", buffering=0) as writer:
        with pytest.raises(ServiceError):
            holder.service.live(holder.command(**options, **{"break": "refuse"}))
        writer.write(b"one\n" * 10)
        assert eventually(lambda: holder.ask("do jobs heard") == "10")
        busy.send("hold\n")
        assert "holding" == busy.line()
        holder.service.live(command)
        assert 1 == len(holder.service.draining)
        for count in range(1, 101):
            writer.write(b"one\n")
            assert eventually(lambda: holder.ask("do jobs heard") == str(count))  # noqa: B023


@BLOCKING
def test_a_lock_that_would_be_lost_refuses(holder: Holder) -> None:
    """Live, before anything is given away; the reason names the file."""
    command = holder.command(backends={"log": ["file", [str(holder.path) + ".log"], {}]})
    holder.service.start(command)
    assert "1" == holder.ask("do log append")
    holder.ask("do log posix")
    with pytest.raises(ServiceError, match=r"file 'log': cannot be described: .*F_OFD_SETLK"):
        holder.service.live(command)
    assert "2" == holder.ask("do log append")


@BLOCKING
def test_what_cannot_move_ends_the_start(holder: Holder) -> None:
    """An epoll instance, which is of no use to the next one."""
    with pytest.raises(ServiceError) as caught:
        holder.service.start(holder.command(backends={"loop": ["epoll", [], {}]}))
    assert "opaque 'loop': an epoll instance watches the files" in caught.value.stderr


@AIO
def test_what_does_not_move_stays_its_owners(holder: Holder) -> None:
    """While the old instance drains, it has its own still, and so has the new one."""
    go = holder.path.with_name("go")
    command = holder.command(backends={"jobs": ["pipe", [], {}]}, reads="jobs", go=str(go))
    holder.service.start(command)
    with Client(holder.path) as busy:
        busy.send("linger\n")
        assert "holding" == busy.line()
        holder.service.environment["UPGRADER_BACKEND_TRANSFER"] = "jobs=no"
        holder.service.live(command)
        assert 1 == len(holder.service.draining)
        go.touch()
        assert "heard" == busy.line()
    assert "0" == holder.ask("do jobs heard")


@AIO
def test_a_tap_moves_in_every_mode(tap: Holder) -> None:
    """The device is the same one throughout, with its vnet header; a stop removes it."""
    command = tap.command(backends=TAP)
    service = tap.service
    service.start(command)
    index = Path(f"/sys/class/net/{DEVICE}/ifindex").read_text()
    before = json.loads(tap.ask("facts tap"))
    assert 12 == before[0]["header"]
    for upgrade in (service.live, service.execute, service.upgrade):
        upgrade(command)
        assert before == json.loads(tap.ask("facts tap"))
        assert index == Path(f"/sys/class/net/{DEVICE}/ifindex").read_text()
        assert ["detached", "device", "flags", "netns"] == tap.backend("tap")["verified"]
    service.kill()
    service.start(command)
    assert index == Path(f"/sys/class/net/{DEVICE}/ifindex").read_text()
    service.stop(for_good=True)
    assert not Path(f"/sys/class/net/{DEVICE}").exists()


def test_a_device_is_guarded_while_a_version_prepares_itself(tap: Holder) -> None:
    """It is lent, and whatever is started on it there spoils it only for milliseconds here."""
    tap.service.start(tap.command(backends=TAP))
    tap.service.live(tap.command(backends=TAP, prepare=True))
    assert "12" == tap.ask("do tap header")
    with pytest.raises(ServiceError):
        tap.service.live(tap.command(backends=TAP, prepare=True, **{"break": "header"}))
    assert "12" == tap.ask("do tap header")


@BLOCKING
def test_a_failed_upgrade_leaves_a_tap_as_it_was(tap: Holder) -> None:
    """Whoever starts QEMU on it sets its vnet header anew: until that is undone, no frame is read."""
    command = tap.command(backends=TAP)
    tap.service.start(command)
    with pytest.raises(ServiceError) as refused:
        tap.service.live(tap.command(backends=TAP, **{"break": "header"}))
    assert Code.VERIFY_FAILED is refused.value.code
    assert "12" == tap.ask("do tap header")
