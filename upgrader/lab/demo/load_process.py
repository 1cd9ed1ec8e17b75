# SPDX-License-Identifier: LGPL-2.1-or-later
"""Start the load client, give it orders, and wait for its events."""

import os
import select
import subprocess
import sys
import time
from typing import Self, TypeVar

from upgrader.lab.demo.options import DemoError
from upgrader.lab.demo.orders import Fatal, Order, OrderEvent, event_decoder, line
from upgrader.lab.private_systemd import PrivateSystemd

E = TypeVar("E", bound=OrderEvent)

#: Seconds for any answer; thousands of connections on a slow machine need many.
ANSWER_TIMEOUT = 180.0


class LoadProcess:
    """A load client that runs outside, with this Python, and sees only the network inside."""

    def __init__(self, machine: PrivateSystemd) -> None:
        self._errors = os.fdopen(os.memfd_create("load-client"), "w+b")
        self._process = machine.popen(
            [sys.executable, "-m", f"{__package__}.load_client"],
            network_only=True,
            env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def tell(self, order: Order) -> None:
        """Give an order that has no answer; raises DemoError if nobody is there."""
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), line(order))
        except BrokenPipeError:
            raise self._gone() from None

    def ask(self, order: Order, answer: type[E]) -> E:
        """Give an order and wait for its answer; raises DemoError if there is another one or none."""
        self.tell(order)
        event = event_decoder.decode(self._line())
        if isinstance(event, Fatal):
            raise DemoError(f"the load client cannot do its work: {event.message}")
        if not isinstance(event, answer):
            raise DemoError(f"the load client answered {event}")
        return event

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while b"\n" not in self._buffer:
            ready, _, _ = select.select(
                [self._process.stdout], [], [], max(0.0, deadline - time.monotonic())
            )
            if not ready:
                raise DemoError(f"the load client said nothing for {ANSWER_TIMEOUT:g} s")
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                raise self._gone()
            self._buffer += data
        found, _, self._buffer = self._buffer.partition(b"\n")
        return found

    def _gone(self) -> DemoError:
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return DemoError(f"the load client has ended: {said[-1] if said else 'without a word'}")
