# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program with `start_server`, upgraded live and restarted under load by a real systemd."""

import threading

from tests.support import eventually
from tests.system.reloading import live, reload
from tests.system.serving import Client, Install
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.status_text import Origin

#: Two interpreters on a busy CI machine are slow; what is waited for is not longer than otherwise.
PATIENT = "Environment=UPGRADER_DOWNTIME_LIMIT=5s"
CLIENTS = 8
RELOADS = 5


class Talker(threading.Thread):
    """Asks one thing after the other on one connection, until it is told to stop."""

    def __init__(self, client: Client, number: int) -> None:
        super().__init__()
        self._client = client
        self._number = number
        self.over = threading.Event()
        self.asked = 0
        self.answers: list[str] = []

    def run(self) -> None:
        while not self.over.is_set():
            self.asked += 1
            self.answers.append(self._client.ask(f"{self._number}-{self.asked}"))

    @property
    def lost(self) -> list[int]:
        """Questions without an answer of their own."""
        got = {answer.split()[1] for answer in self.answers if answer}
        return [n for n in range(1, self.asked + 1) if f"{self._number}-{n}" not in got]


def test_reloads_and_a_restart(any_machine: PrivateSystemd, install: Install) -> None:
    """Nobody's connection breaks, no line is lost or answered twice, half a line moves along."""
    service = install(any_machine, "streams", "streams", *live(any_machine, "streams"), PATIENT)
    with service.clients(CLIENTS) as clients:
        clients[0].send("ha")
        talkers = [Talker(client, n) for n, client in enumerate(clients[1:])]
        for talker in talkers:
            talker.start()
        try:
            for number in range(1, RELOADS + 1):
                assert eventually(service.answers)
                service.environment(ROUND=str(number))
                assert reload(service), service.messages()
            assert Origin.LIVE is service.status.origin
            service.restart()
        finally:
            for talker in talkers:
                talker.over.set()
            for talker in talkers:
                talker.join()
        clients[0].send("lf\n")
        assert f"{RELOADS} half" == clients[0].line()
    broken = [talker.asked for talker in talkers if talker.lost or "" in talker.answers]
    repeated = [t for t in talkers if len(t.answers) != t.asked]
    assert ([], []) == (broken, repeated), service.messages()
    assert RELOADS + 2 == service.status.generation
