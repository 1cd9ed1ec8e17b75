# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restarts and failed upgrades under load, of a service that would notice being cancelled."""

import contextlib
import itertools
import threading
from collections.abc import Iterator

from tests.system.serving import Client, Install, Service
from upgrader.lab.private_systemd import PrivateSystemd

MEMBERS = 20
RESTARTS = 20
FAILURES = 20


class _Member(threading.Thread):
    """Sends the next number as soon as the last one has come back."""

    def __init__(self, client: Client, over: threading.Event) -> None:
        super().__init__()
        self.client = client
        self.over = over
        self.answered = 0
        self.wrong = ""

    def run(self) -> None:
        for number in itertools.count(1):
            if self.over.is_set():
                return
            try:
                answer = self.client.ask(str(number))
            except (OSError, AssertionError) as error:
                answer = str(error) or type(error).__name__
            if answer != str(number):
                self.wrong = f"{answer!r} to message {number}"
                return
            self.answered = number


@contextlib.contextmanager
def _talking(service: Service, members: list[_Member]) -> Iterator[None]:
    over = threading.Event()
    with service.clients(MEMBERS) as clients:
        members += [_Member(client, over) for client in clients]
        for member in members:
            member.start()
        try:
            yield
        finally:
            over.set()
            for member in members:
                member.join()


def test_twenty_restarts_and_twenty_failures(any_machine: PrivateSystemd, install: Install) -> None:
    """Nobody is told goodbye, no message is answered twice or never, and the background task
    never runs in two processes at once."""
    service = install(
        any_machine, "chat", "chat", "RestartSec=20ms", "Environment=UPGRADER_LOAD_ATTEMPTS=1000"
    )
    members: list[_Member] = []
    ticks = []
    with _talking(service, members), service.connect() as asking:
        for _ in range(RESTARTS):
            service.restart()
            ticks.append(int(asking.ask("room").split()[3]))
        for mode in itertools.islice(itertools.cycle(["exit", "unreadable", "refusing"]), FAILURES):
            service.environment(MODE=mode)
            assert not service.restart(check=False)
            service.environment()
            service.until(ActiveState="active")
            ticks.append(int(asking.ask("room").split()[3]))
    with service.connect() as asking:
        taken, answered, counted, _ = map(int, asking.ask("room").split())

    talked = [member.answered for member in members]
    print(f"{any_machine.tree.name}: {sum(talked)} messages, {min(talked)} to {max(talked)} each")
    assert [] == [member.wrong for member in members if member.wrong]
    assert {sum(talked)} == {taken, answered, counted}
    assert sorted(ticks) == ticks
    assert not service.inside("/run/chat.twice").exists()
    assert 1 + RESTARTS + FAILURES == service.status.generation
    failures = service.messages("PRIORITY=3", "UPGRADER_PHASE=load")
    assert failures.count("IncompatibleState") >= FAILURES // 3
    assert failures.count("not with me") >= FAILURES // 3
