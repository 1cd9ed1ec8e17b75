# SPDX-License-Identifier: LGPL-2.1-or-later
"""PHP-FPM behind a runner: requests that take long are answered by the program that has accepted them."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fastcgi import ask
from tests.process.runner_service import RunnerService
from tests.support import SETTLE, cannot_run, eventually, php_fpm, runs

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
        self.master = service.master(str(self._name))

    def answered_by(self) -> int:
        self._name.with_suffix(".go").touch()
        self._thread.join(SETTLE)
        return self.master


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
