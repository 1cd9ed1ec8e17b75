# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk of a storage daemon goes from one process to the next with requests in flight: each is answered
once, and the daemon learns nothing of it."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.process.disks import STORAGE, Daemon, Storage, User, binary, own, running, using
from tests.support import eventually
from tests.tables import publish
from upgrader.lab.vhost_user import SLOTS
from upgrader.protocol.status_text import Origin
from upgrader.testing import ServiceError


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
