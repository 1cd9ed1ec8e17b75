# SPDX-License-Identifier: LGPL-2.1-or-later
"""The whole story under apt, in a booted Debian 13: packages of a service, installed one over the other under load."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import cannot_run
from tests.system import packages
from tests.system.packages import UNIT
from upgrader.demo.loading import LoadProcess
from upgrader.demo.orders import Begin, End, Ready, Result, Start, Stop, Window
from upgrader.private_systemd import PrivateSystemd, TreeError

_APT = ["apt-get", "-y", "--allow-downgrades", "-o", "Dpkg::Use-Pty=0"]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSystemd]:
    """A machine with our own packages installed and nothing else of the project."""
    try:
        tree = packages.packaging("trees").fetch("trixie", lambda text: None)
    except TreeError as error:
        cannot_run(str(error))
    debs = packages.own_packages("trixie", tmp_path_factory.getbasetemp())
    with PrivateSystemd.boot(tree) as machine:
        machine.run(["rm", "-r", "/usr/lib/python3/dist-packages/upgrader", "/usr/bin/upgrader"])
        for deb in debs.glob("*.deb"):
            machine.copy_in(deb, f"/debs/{deb.name}")
        own = [f"/debs/{deb.name}" for deb in debs.glob("*.deb")]
        machine.run([*_APT, "install", *own], env=_QUIET, timeout=120)
        for version in "01234":
            packages.service_package(machine, version)
        yield machine


_QUIET = {"DEBIAN_FRONTEND": "noninteractive"}


@pytest.fixture
def web(machine: PrivateSystemd) -> Iterator["Web"]:
    """The package of the service; purged after the test."""
    web = Web(machine)
    yield web
    web.apt("purge", "web")


class Web:
    """The package `web` in a machine."""

    def __init__(self, machine: PrivateSystemd) -> None:
        self.machine = machine

    def apt(self, *arguments: str) -> str:
        """Run apt-get; what it said. An exit code other than 0 is an error."""
        done = self.machine.run([*_APT, *arguments], env=_QUIET, timeout=120)
        return done.stdout + done.stderr

    def install(self, version: str) -> str:
        return self.apt("install", f"/debs/web_{version}_all.deb")

    def show(self, name: str) -> str:
        return self.machine.run(["systemctl", "show", "-P", name, UNIT]).stdout.strip()

    @property
    def environment(self) -> str:
        """Of the main process."""
        pid = self.show("MainPID")
        return Path(f"/proc/{self.machine.pid}/root/proc/{pid}/environ").read_text()


class Clients:
    """Load on the service, judged from one installation to the next."""

    def __init__(self, web: Web) -> None:
        self.web = web
        self.load = LoadProcess(web.machine)
        self._number = 0

    def __enter__(self) -> "Clients":
        self.load.__enter__()
        start = Start(host="127.0.0.1", port=8080, rate=100, held=20, streams=4)
        ready = self.load.ask(start, Ready)
        assert "1" == ready.version
        return self

    def __exit__(self, *of_error: object) -> None:
        self.load.__exit__(None, None, None)

    def during(self, version: str) -> tuple[Window, str]:
        """Install a version; what the clients saw, and what apt said."""
        self._number += 1
        self.load.tell(Begin(upgrade=self._number, at=time.monotonic()))
        said = self.web.install(version)
        return self.load.ask(End(sample=20), Window), said

    def end(self) -> Result:
        return self.load.ask(Stop(), Result)


def lost(seen: Window | Result) -> dict[str, int]:
    """What clients lost, by kind."""
    names = ("failed_requests", "failed_keepalive", "failed_split", "broken_streams")
    names += ("connections_lost", "state_errors")
    return {name: count for name in names if (count := getattr(seen, name))}


def test_upgrades_by_apt_lose_nothing(web: Web) -> None:
    """A new version, a broken one, its repair and a downgrade: no client notices, apt succeeds."""
    web.install("1")
    with Clients(web) as clients:
        window, said = clients.during("2")
        assert {} == lost(window)
        assert "2" == window.version, said
        assert f"upgrader: {UNIT}: upgraded" in said
        assert "PACKAGED=2" in web.environment

        window, said = clients.during("1")
        assert {} == lost(window)
        assert "1" == window.version, said
        result = clients.end()

    assert {} == lost(result)
