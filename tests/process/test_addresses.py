# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a service listens: hosts with several addresses, and another address on the same port."""

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from upgrader.testing import Service, ServiceError

PROGRAM = """
import json, sys, upgrader
options = json.loads(sys.argv[1])
with upgrader.attach("addresses") as instance:
    door = instance.listener("door", bind=options["bind"])

    @upgrader.state("count")
    class Count:
        count: int = 0

    instance.state(Count)

    @instance.connections(door)
    def talk(peer, count: Count):
        for line in peer.lines():
            count.count += 1
            peer.write(b"%d\\n" % count.count)

    @instance.verify
    def check(count: Count):
        if options.get("refuse"):
            raise ValueError("as told")

    for _ in instance.serve():
        pass
"""


def free_port() -> int:
    """A port on which nobody listens, in either family."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as sock:
        return int(sock.getsockname()[1])


class Addresses:
    """The program, bound as a test wants it, on one port."""

    def __init__(self, directory: Path) -> None:
        self.program = directory / "addresses.py"
        self.program.write_text(PROGRAM)
        self.port = free_port()
        self.service = Service()

    def command(self, host: str, **options: Any) -> list[str]:
        text = json.dumps({"bind": f"{host}:{self.port}", **options})
        return [sys.executable, str(self.program), text]

    def connect(self, host: str) -> socket.socket:
        return socket.create_connection((host, self.port), timeout=30)

    def ask(self, host: str) -> int:
        with self.connect(host) as sock:
            return ask(sock)

    def refuses(self, host: str) -> bool:
        try:
            self.connect(host).close()
        except ConnectionRefusedError:
            return True
        return False


def ask(sock: socket.socket) -> int:
    sock.sendall(b"x\n")
    return int(sock.makefile("rb").readline())


@pytest.fixture
def addresses(tmp_path: Path) -> Iterator[Addresses]:
    addresses = Addresses(tmp_path)
    with addresses.service:
        yield addresses


V4, V6, ELSEWHERE = "127.0.0.1", "::1", "127.0.0.2"
#: What it is on this machine; not every one has it in both families.
LOCALHOST = [
    str(each[4][0]) for each in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
]


@pytest.mark.parametrize(
    ("host", "answer", "refuse"),
    [
        ("localhost", LOCALHOST, [ELSEWHERE]),
        ("", [V4, V6, ELSEWHERE], []),
        ("0.0.0.0", [V4, ELSEWHERE], [V6]),
        ("[::]", [V6], [V4]),
        ("127.0.0.1", [V4], [V6, ELSEWHERE]),
    ],
)
def test_u12_a_host_is_what_it_is_for_any_server(
    host: str, answer: list[str], refuse: list[str], addresses: Addresses
) -> None:
    """At a start, in a restart, and after a crash, when PID 1 has all of its sockets."""
    addresses.service.start(addresses.command(host))
    seen = [addresses.ask(each) for each in answer]
    addresses.service.restart(addresses.command(host))
    seen += [addresses.ask(each) for each in answer]
    assert list(range(1, 2 * len(answer) + 1)) == seen
    addresses.service.kill()
    waiting = [addresses.connect(each) for each in answer]
    addresses.service.start(addresses.command(host))
    assert list(range(1, len(answer) + 1)) == [ask(sock) for sock in waiting]
    assert all(addresses.refuses(each) for each in refuse)
    for sock in waiting:
        sock.close()


HOSTS = ["127.0.0.1", "0.0.0.0", "localhost", "[::]", "", "[::1]"]
REACHED = {
    "127.0.0.1": [V4], "0.0.0.0": [V4, ELSEWHERE], "localhost": LOCALHOST, "[::]": [V6],
    "": [V4, V6], "[::1]": [V6],
}  # fmt: skip


@pytest.mark.parametrize("before", HOSTS)
def test_u2_the_address_changes_and_the_port_stays(before: str, addresses: Addresses) -> None:
    """To every other one: who was connected or waited is served, and a crash brings all back."""
    for after in HOSTS:
        addresses.service.start(addresses.command(before))
        with addresses.connect(REACHED[before][0]) as client:
            assert 1 == ask(client)
            addresses.service.stop()
            with addresses.connect(REACHED[before][0]) as waiting:
                addresses.service.start(addresses.command(after))
                assert [2, 3] == sorted([ask(client), ask(waiting)]), after
        for host in REACHED[after]:
            assert addresses.ask(host) > 3
        for host in (
            {V4, V6, ELSEWHERE} - set(REACHED[after]) - ({ELSEWHERE} if not after else set())
        ):
            assert addresses.refuses(host), (after, host)
        addresses.service.kill()
        addresses.service.start(addresses.command(after))
        assert 1 == addresses.ask(REACHED[after][0])
        addresses.service.kill()
        addresses.service.store.clear()


def test_u2_an_address_that_cannot_be_had_leaves_the_old_one(addresses: Addresses) -> None:
    """Somebody else has it, or a check refuses: the version before goes on where it was."""
    addresses.service.start(addresses.command("127.0.0.1"))
    with addresses.connect(V4) as client:
        assert 1 == ask(client)
        addresses.service.stop()
        for options in ({"refuse": True}, {}):
            taken = socket.create_server((ELSEWHERE, addresses.port))
            with taken, pytest.raises(ServiceError) as failed:
                addresses.service.start(addresses.command("0.0.0.0", **options))
            expected = "as told" if options else "cannot bind 0.0.0.0"
            assert expected in failed.value.stderr
            with addresses.connect(V4) as waiting:
                addresses.service.start(addresses.command("127.0.0.1"))
                assert ask(waiting) < ask(client)
            addresses.service.stop()


def test_u2_a_listener_that_was_released_listens_again(addresses: Addresses) -> None:
    """A version that wanted another address was killed between its release and its commit."""
    addresses.service.start(addresses.command("127.0.0.1"))
    with addresses.connect(V4) as client:
        assert 1 == ask(client)
        addresses.service.stop()
        for name, fd in addresses.service.store:
            if name.startswith("upgrader-listener"):
                with fd.duplicate().socket() as sock:
                    sock.shutdown(socket.SHUT_RD)
        assert addresses.refuses(V4)
        addresses.service.start(addresses.command("127.0.0.1"))
        assert 2 == ask(client)
        assert 3 == addresses.ask(V4)
