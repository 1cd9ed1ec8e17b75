# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ask PID 1 by `systemctl show` again and again from inside, and measure how long each answer takes."""

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator

from upgrader.lab.private_systemd import PrivateSystemd

#: Seconds between two questions: often enough for the shortest restart, and next to no load.
PAUSE = 0.02


class Probe:
    """A shell inside that runs `systemctl show` for each line it gets, so that entering is not measured."""

    def __init__(self, machine: PrivateSystemd, unit: str) -> None:
        #: Milliseconds of every answer.
        self.answers: list[float] = []
        loop = 'while read -r _; do systemctl show -p ActiveState "$0" >/dev/null; echo; done'
        self._shell = machine.popen(
            ["sh", "-c", loop, unit], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Ask for as long as the block runs, at least once."""
        over = threading.Event()
        asker = threading.Thread(target=self._ask, args=(over,), daemon=True)
        asker.start()
        try:
            yield
        finally:
            over.set()
            asker.join()

    def close(self) -> None:
        """End the shell."""
        self._shell.kill()
        self._shell.communicate()

    def _ask(self, over: threading.Event) -> None:
        stdin, stdout = self._shell.stdin, self._shell.stdout
        assert stdin is not None
        assert stdout is not None
        while True:
            begin = time.monotonic()
            stdin.write("\n")
            stdin.flush()
            if not stdout.readline():
                return
            self.answers.append((time.monotonic() - begin) * 1000)
            if over.wait(PAUSE):
                return
