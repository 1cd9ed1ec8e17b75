# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host behind a TAP device answers 1,000 pings a second, and all of them through upgrades of every kind."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from tests.pages import ROOT
from tests.support import SETTLE, cannot_run, eventually
from tests.tables import publish
from upgrader.lab.private_systemd.linux import Namespace, unshare
from upgrader.testing import Service, ServiceError

PROGRAM = Path(__file__).with_name("responder.py")
DEVICE, OURS, THEIRS = "tap0", "10.98.0.1", "10.98.0.2"
#: Pings that are under way at any time.
FEW = 100


class Pinger:
    """The process that pings, as long as a `with` lasts."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.process.pinger", THEIRS]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def flows(self) -> bool:
        """Whether pings are answered, and hardly any are under way."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("?\n")
        self._process.stdin.flush()
        sent, answered = map(int, self._process.stdout.readline().split())
        return answered > 0 and sent - answered < FEW

    def result(self) -> dict[str, Any]:
        """Stop; what it says in the end."""
        said, _ = self._process.communicate(timeout=SETTLE)
        return dict(json.loads(said))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def in_network(play: Callable[[], object]) -> None:
    """Play in a thread that has a network of its own, and so has whatever it starts."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            unshare(Namespace.NET)
            play()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="network")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


@contextmanager
def answering() -> Iterator[tuple[Service, list[str]]]:
    """A service that answers pings, and its command."""
    command = [sys.executable, str(PROGRAM), DEVICE]
    with Service() as service:
        service.start(command)
        for line in (f"address add {OURS}/24 dev {DEVICE}", f"link set {DEVICE} up"):
            subprocess.run(["ip", *line.split()], check=True)
        yield service, command


def play(mode: str, upgrades: int) -> list[str]:
    """Upgrade while pings come; returns the row of the table."""
    row: list[str] = []

    def run() -> None:
        pauses: list[float] = []
        with answering() as (service, command), Pinger() as pinger:
            assert eventually(pinger.flows)  # until the address is resolved, the kernel keeps few
            for _ in range(upgrades):
                if mode == "refused":
                    service.environment["SPOIL"] = "1"
                    with pytest.raises(ServiceError):
                        service.live(command)
                    del service.environment["SPOIL"]
                else:
                    status = {"live": service.live, "restart": service.upgrade}[mode](command)
                    pauses.append(status.pause or 0)
                # What the kernel has kept in the pause is answered before the next one.
                assert eventually(pinger.flows)
            said = pinger.result()
            row[:] = [
                mode, str(upgrades), str(said["sent"]), str(said["lost"]),
                f"{said['longest'] * 1000:.0f} ms",
                f"{max(pauses) * 1000:.0f} ms" if pauses else "-",
            ]  # fmt: skip
            assert 0 == said["twice"]
            # The kernel keeps 4,000 frames, so a longer wait may lose some.
            assert 0 == said["lost"] or said["longest"] > 3.5, row

    in_network(run)
    return row


@pytest.fixture(autouse=True)
def _may_make_devices() -> None:
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK) or os.geteuid() != 0:
        cannot_run("a TAP device needs /dev/net/tun and CAP_NET_ADMIN")


@pytest.mark.parametrize("mode", ["live", "restart", "refused"])
def test_no_ping_is_lost(mode: str) -> None:
    """Nor by a version that spoils the device and then does not take over."""
    play(mode, 2)


@pytest.mark.matrix
def test_the_table_of_pings() -> None:
    """Ten upgrades of each."""
    rows = [play(mode, 10) for mode in ("live", "restart", "refused")]
    publish("pings", ["mode", "upgrades", "pings", "lost", "longest wait", "longest pause"], rows)
