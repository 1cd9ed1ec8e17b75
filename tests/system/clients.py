# SPDX-License-Identifier: LGPL-2.1-or-later
"""Load on the example service while something is done; counts what clients lost, and asserts nothing."""

import time
from collections.abc import Callable

from upgrader.lab.demo.load_process import LoadProcess
from upgrader.lab.demo.orders import (
    Begin,
    EndOrder,
    ReadyEvent,
    ResultEvent,
    Start,
    StopOrder,
    Window,
)
from upgrader.lab.private_systemd import PrivateSystemd


class Clients:
    """Load on the service, judged for each thing that is done under it."""

    def __init__(self, machine: PrivateSystemd) -> None:
        self.load = LoadProcess(machine)

    def __enter__(self) -> "Clients":
        self.load.__enter__()
        start = Start(host="127.0.0.1", port=8080, rate=100, held=20, streams=4)
        try:
            self.load.ask(start, ReadyEvent)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *of_error: object) -> None:
        self.load.__exit__(None, None, None)

    def watch(self, work: Callable[[], str], *, upgraded: bool = True) -> tuple[Window, str]:
        """Do something that ends with an upgrade, or does not; what clients saw, and what it said."""
        self.load.tell(Begin(at=time.monotonic()))
        said = work()
        return self.load.ask(EndOrder(upgraded=upgraded, sample=20), Window), said

    def end(self) -> ResultEvent:
        return self.load.ask(StopOrder(), ResultEvent)


def lost(seen: Window | ResultEvent) -> dict[str, int]:
    """What clients lost, by kind."""
    names = ("failed_requests", "failed_keepalive", "failed_split", "broken_streams")
    names += ("connections_lost", "state_errors")
    return {name: count for name in names if (count := getattr(seen, name))}
