# SPDX-License-Identifier: LGPL-2.1-or-later
"""PHP-FPM behind a runner: requests that take long are answered by the program that has accepted them."""

import contextlib
import ctypes
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fastcgi import ask
from tests.process.runner_service import RunnerService
from tests.support import SETTLE, cannot_run, descendants, eventually, php_fpm, runs, started
from upgrader.protocol.fd import Fd
from upgrader.runner.processes import parent
from upgrader.testing import ServiceError

_CONFIGURATION = """\
[global]
error_log = {place}/log
[www]
listen = {path}
{user}
pm = dynamic
pm.max_children = 6
pm.start_servers = 2
pm.min_spare_servers = 2
pm.max_spare_servers = 4
"""
#: Says who answers; with a query, it has begun, and goes on once it is told to.
_SCRIPT = r"""<?php
if ($name = $_SERVER["QUERY_STRING"]) {
  touch("$name.begun");
  while (!file_exists("$name.go")) { usleep(10000); clearstatcache(); }
}
preg_match("/PPid:\s+(\d+)/", file_get_contents("/proc/self/status"), $found);
echo $found[1];
"""


class PhpService(RunnerService):
    """A unit that runs PHP-FPM, with its defaults."""

    def __init__(self, directory: Path, binary: str) -> None:
        super().__init__(directory)
        self.place, self.binary = directory, binary
        user = "user = root\ngroup = root" if os.geteuid() == 0 else ""
        text = _CONFIGURATION.format(place=directory, path=self.path, user=user)
        (directory / "fpm.conf").write_text(text)
        (directory / "index.php").write_text(_SCRIPT)

    def command(self, *options: str) -> list[str]:
        listen = ("--listen", f"main=unix:{self.path}")
        configuration = ("--fpm-config", str(self.place / "fpm.conf"))
        program = (self.binary, "--nodaemonize", "--allow-to-run-as-root", *configuration)
        return [sys.executable, "-m", "upgrader.run", *listen, *options, "--", *program]

    def master(self, query: str = "") -> int:
        """The master whose worker answers."""
        return int(ask(str(self.path), str(self.place / "index.php"), query))

    def another(self, *old: int) -> int:
        """The one that answers beside these, which may for a moment more."""
        seen: list[int] = []

        def answers() -> bool:
            seen.append(self.master())
            return seen[-1] not in old

        assert eventually(answers)
        return seen[-1]


class Slow:
    """A request that is under way until it is told to go on."""

    def __init__(self, service: PhpService, name: str) -> None:
        self._name = service.place / name
        self.master = 0
        self._thread = threading.Thread(target=self._ask, args=(service,))
        self._thread.start()
        assert eventually(self._name.with_suffix(".begun").exists)

    def _ask(self, service: PhpService) -> None:
        with contextlib.suppress(OSError, ValueError):  # cut
            self.master = service.master(str(self._name))

    def answered_by(self) -> int:
        self._name.with_suffix(".go").touch()
        self._thread.join(SETTLE)
        return self.master


def workers(master: int) -> int:
    """How many of its workers live."""
    return len([pid for pid, line in descendants().items() if line and parent(pid) == master])


class Removals:
    """How often a file is removed, by inotify(7)."""

    def __init__(self, path: Path) -> None:
        self._name = path.name.encode()
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        in_delete = 0x200
        assert libc.inotify_add_watch(self._fd, bytes(path.parent), in_delete) >= 0

    def close(self) -> int:
        """The number of them until now."""
        event, names = struct.Struct("iIII"), []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._fd, 65536):
                while data:
                    length = event.unpack_from(data)[3]
                    names.append(data[event.size : event.size + length].rstrip(b"\0"))
                    data = data[event.size + length :]
        os.close(self._fd)
        return names.count(self._name)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PhpService]:
    if not (binary := php_fpm()):
        cannot_run("php-fpm is not installed: packaging/bootstrap test")
    with PhpService(tmp_path, binary) as service:
        yield service
        if service.process:
            service.stop(for_good=True)


def test_what_workers_are_at_is_answered(service: PhpService) -> None:
    """After a live upgrade, after a restart of the runner that drains, and at a stop."""
    service.start(service.command())
    first = service.master()
    slow = [Slow(service, "first"), Slow(service, "second")]
    service.live(service.command())
    second = service.another(first)
    assert first == slow[0].answered_by()

    service.stop()
    service.start(service.command())
    third = service.another(first, second)
    assert first == slow[1].answered_by()
    assert eventually(lambda: not runs(first))
    assert eventually(lambda: not runs(second))

    last = Slow(service, "last")
    ending = threading.Thread(target=service.stop, kwargs={"for_good": True})
    ending.start()
    assert third == last.answered_by()
    ending.join(SETTLE)
    assert not runs(third)


def test_one_of_three_that_drain_is_ended(service: PhpService) -> None:
    """Its master removes no path, which the others have: nobody would put it back between two runners."""
    service.start(service.command())
    masters, slow = [service.master()], []
    removals = Removals(service.path)
    for number in range(3):
        slow.append(Slow(service, f"slow{number}"))
        service.restart(service.command())
        masters.append(service.another(*masters))
        if number < 2:  # else the next one may be accepted by an old worker
            assert eventually(lambda old=masters[number]: workers(old) == 1)  # type: ignore[misc]
    assert eventually(lambda: not runs(masters[0]))

    assert 0 == removals.close()
    assert [0, *masters[1:3]] == [each.answered_by() for each in slow]
    assert eventually(lambda: masters[3] == service.master())


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_one_that_is_refused(service: PhpService, killed: bool) -> None:
    """Its master removes no path, whoever ends it: its runner, or that of the one that serves."""
    service.start(service.command())
    first, removals = service.master(), Removals(service.path)
    upgrade = service.begin_live(service.command("--check", "sleep 617" if killed else "false"))
    if killed:
        assert eventually(lambda: started("617"))
        os.kill(parent(started("617")[0]), signal.SIGKILL)
    with pytest.raises(ServiceError):
        upgrade.wait()

    assert 0 == removals.close()
    assert {first} == {service.master() for _ in range(5)}


def test_a_stop_beside_a_socket_unit(service: PhpService) -> None:
    """What the .socket unit listens on stays at its path."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(service.path))
        listener.listen()
        service.store.append(("main", Fd(os.dup(listener.fileno()))))
        service.start([each.partition("=unix")[0] for each in service.command()])
        first, inode = service.master(), service.path.stat().st_ino

        service.stop(for_good=True)

        assert not runs(first)
        assert inode == service.path.stat().st_ino
        assert not [*service.place.glob(".*")]


def test_another_listener(service: PhpService) -> None:
    """A restart adds it beside the old program, which has it not."""
    service.start(service.command())
    first = service.master()
    other = service.path.with_name("other")
    pool = (
        f"[other]\nlisten = {other}\nuser = root\ngroup = root\npm = static\npm.max_children = 1\n"
    )
    with (service.place / "fpm.conf").open("a") as file:
        file.write(pool)

    service.restart(service.command("--listen", f"other=unix:{other}"))

    assert service.another(first) == int(ask(str(other), str(service.place / "index.php")))
