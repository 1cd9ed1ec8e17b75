# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keeper of a machine, as whoever boots one has it: started, heard and ended."""

import contextlib
import os
import select
import subprocess
import sys
import time

import msgspec

from upgrader.lab.private_systemd import trees
from upgrader.lab.private_systemd.errors import PrivateSystemdError
from upgrader.lab.private_systemd.plan import Gone, MachineEvent, Plan


class KeeperProcess:
    """A running `keeper` of the machine that `plan` describes; ends with this process, or by `end`."""

    def __init__(self, plan: Plan) -> None:
        self.gone: Gone | None = None  #: the last that it says, once it has said it
        self._buffer = bytearray()
        # A file, not a pipe: nobody has to read it for the keeper to go on.
        self._errors = os.fdopen(os.memfd_create("keeper-stderr"), "w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": str(trees.PACKAGE.parent)},
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._send(msgspec.json.encode(plan) + b"\n")

    @property
    def pid(self) -> int:
        """Its PID."""
        return self._process.pid

    @property
    def closed(self) -> bool:
        """Whether it was told to end."""
        return self._stdin.closed

    def has_ended(self) -> bool:
        """Whether its process has ended."""
        return self._process.poll() is not None

    @property
    def last_words(self) -> str:
        """The console of the machine at its end, or else what the keeper wrote to stderr."""
        words = self.gone.console if self.gone else ""
        if not words and not self._errors.closed:
            self._errors.seek(0)
            words = self._errors.read().decode(errors="replace")
        return words

    def next_event(self, deadline: float) -> MachineEvent | None:
        """Return its next event; None at the deadline, or if no more can come."""
        while b"\n" not in self._buffer:
            wait = max(0.0, deadline - time.monotonic())
            if not select.select([self._stdout], [], [], wait)[0]:
                return None
            piece = os.read(self._stdout.fileno(), 65536)
            if not piece:
                return None
            self._buffer += piece
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer[:] = rest
        event: MachineEvent = msgspec.json.decode(line, type=MachineEvent)
        if isinstance(event, Gone):
            self.gone = event
        return event

    def drop_events(self, timeout: float = 0.0) -> None:
        """Hear all that comes in `timeout` seconds, or until no more can come."""
        deadline = time.monotonic() + timeout
        while self.next_event(deadline) is not None:
            pass

    def end(self, timeout: float) -> None:
        """Have it end the machine, and wait; raises PrivateSystemdError after `timeout` seconds."""
        # Say it, do not only close the pipe: a forked copy of this process may hold it open.
        self._send(b"end\n")
        self._stdin.close()
        deadline = time.monotonic() + timeout
        self.drop_events(timeout)
        try:
            self._process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise PrivateSystemdError(
                f"the keeper of the machine (process {self.pid}) does not end",
                remedy="look at what it waits for; killing it kills the machine",
            ) from None
        finally:
            self._stdout.close()
            self._errors.close()

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
            while view:
                view = view[self._stdin.write(view) :]
