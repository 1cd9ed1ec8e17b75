# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listeners and datagram sockets: over kills, lost paths, new addresses, and from .socket units."""

import os
import shlex
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.process.chat import DEADLINE, Chat, Client
from tests.support import eventually
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import identify
from upgrader.protocol.status_text import Origin
from upgrader.testing import Service, ServiceError

INBOX = """
import os, sys, upgrader
@upgrader.state("seen")
class Seen:
    count: int = 0
with upgrader.attach("inbox") as instance:
    seen = instance.state(Seen)
    inbox = instance.datagrams("inbox", bind=sys.argv[1])
    for backend in instance.serve(inbox):
        data, _ = backend.recvfrom()
        seen.value.count += 1
        with open(sys.argv[2], "ab") as file:
            file.write(b"%d %s\\n" % (seen.value.count, data))
"""
ACCEPT = """
import sys, upgrader
with upgrader.attach("accepting") as instance:
    door = instance.listener("door", bind=sys.argv[1])
    for backend in instance.serve(door):
        sock, _ = backend.accept()
        sock.sendall(b"hello\\n")
        sock.close()
"""


def test_a_listener_survives_a_kill(chat: Chat) -> None:
    """The FD store holds it: who connects meanwhile is served by the next instance."""
    chat.start()
    inode = os.stat(chat.path).st_ino
    chat.service.kill()
    with chat.connect() as client:
        client.send("echo x\n")
        assert Origin.COLD is chat.start().origin

        assert "x" == client.line()
    assert inode == os.stat(chat.path).st_ino


def test_a_client_in_the_backlog(chat: Chat) -> None:
    """Who connects between two instances is served by the second."""
    chat.start()
    chat.stop()
    with chat.connect() as client:
        client.send("add\n")
        chat.start()

        assert "1 1" == client.line()


def test_a_path_that_has_vanished(chat: Chat) -> None:
    """It is bound anew, and who waited on the old one is served, too."""
    chat.start()
    chat.stop()
    clients = [chat.connect() for _ in range(3)]
    os.unlink(chat.path)
    chat.start()
    clients.append(chat.connect())
    for client in clients:
        assert "x" == client.ask("echo x")
        client.close()
    assert ["upgrader-listener-chat"] == chat.stored
    with chat.connect() as client:
        chat.restart()
        assert "x" == client.ask("echo x")


def test_a_path_that_has_vanished_after_a_kill(chat: Chat) -> None:
    """The same for what only the FD store held."""
    chat.start()
    chat.service.kill()
    with chat.connect() as waiting:
        os.unlink(chat.path)
        chat.start()
        with chat.connect() as client:
            assert ["x", "x"] == [waiting.ask("echo x"), client.ask("echo x")]


def test_a_path_that_another_one_has_taken(chat: Chat) -> None:
    """It is not taken back by force: the error names it, and the image stays."""
    chat.start()
    with chat.connect() as client:
        chat.stop()
        os.unlink(chat.path)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(chat.path))
            other.listen()
            assert f"cannot bind unix:{chat.path}: Address already in use" in chat.fails()
        chat.start()

        assert "x" == client.ask("echo x")


def test_a_new_address(chat: Chat, tmp_path: Path) -> None:
    """The next version binds elsewhere; who is connected or waited is served, the old is gone."""
    chat.start()
    with chat.connect() as client:
        chat.stop()
        with chat.connect() as waiting:
            chat.start(bind=f"unix:{tmp_path}/new")
            with Client(tmp_path / "new") as newcomer:
                for each in (client, waiting, newcomer):
                    assert "x" == each.ask("echo x")
    with pytest.raises(ConnectionRefusedError):
        chat.connect()
    assert ["upgrader-listener-chat"] == chat.stored


def activated(chat: Chat, name: str, sock: socket.socket) -> Any:
    """PID 1 passes a socket of a .socket unit at each start, beside what is in the FD store."""
    item = (name, Fd(os.dup(sock.fileno())))
    chat.service.store.append(item)
    return item


def test_a_socket_unit_goes_first(chat: Chat) -> None:
    """What PID 1 passes by name is used, and the one that was bound leaves the FD store."""
    with socket.socket(socket.AF_UNIX) as sock:
        chat.start()
        chat.service.kill()
        sock.bind(str(chat.path) + ".unit")
        sock.listen()
        activated(chat, "chat", sock)
        chat.start()

        with Client(Path(f"{chat.path}.unit")) as client:
            assert "x" == client.ask("echo x")
            chat.restart()
            assert "x" == client.ask("echo x")
        assert ["chat"] == chat.stored


def test_a_socket_unit_that_appears(chat: Chat) -> None:
    """From a restart on there is a .socket unit: connections cross, and its listener is used."""
    chat.start()
    with socket.socket(socket.AF_UNIX) as sock, chat.connect() as client:
        sock.bind(str(chat.path) + ".unit")
        sock.listen()
        chat.stop()
        activated(chat, "chat", sock)
        chat.start()

        assert "x" == client.ask("echo x")
        with Client(Path(f"{chat.path}.unit")) as newcomer:
            assert "x" == newcomer.ask("echo x")
    assert ["chat"] == chat.stored


def test_a_socket_of_another_type(chat: Chat) -> None:
    """A datagram socket is no listener: refused by name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        activated(chat, "chat", sock)
        assert "listener 'chat': the manifest says SOCK_STREAM" in chat.fails()


def test_a_passed_socket_that_nobody_wants(chat: Chat) -> None:
    """Clients of it would hang: it is named."""
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as other:
        activated(chat, "chat", sock)
        activated(chat, "other", other)
        for each, path in ((sock, chat.path), (other, f"{chat.path}.other")):
            each.bind(str(path))
            each.listen()
        chat.start()

        assert "other" in chat.service.stderr


# Datagrams


@pytest.fixture
def inbox(tmp_path: Path) -> Any:
    (tmp_path / "inbox.py").write_text(INBOX)
    chat = Chat("blocking", tmp_path)

    def command(bind: str = f"unix:{tmp_path}/inbox") -> list[str]:
        return [sys.executable, str(tmp_path / "inbox.py"), bind, str(tmp_path / "seen")]

    with chat.service:
        yield chat.service, command, tmp_path


def send(path: Path, *texts: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        for text in texts:
            sock.sendto(text.encode(), str(path))


def seen(path: Path, count: int) -> list[str]:
    assert eventually(lambda: path.exists() and len(path.read_text().splitlines()) >= count)
    return path.read_text().splitlines()


def test_queued_datagrams_stay(inbox: Any) -> None:
    """What is sent between two instances, or to a killed one, is received by the next."""
    service, command, path = inbox
    service.start(command())
    send(path / "inbox", "a")
    seen(path / "seen", 1)
    service.stop()
    send(path / "inbox", "b", "c")
    service.start(command())
    assert ["1 a", "2 b", "3 c"] == seen(path / "seen", 3)
    service.kill()
    send(path / "inbox", "d")
    service.start(command())

    assert "1 d" == seen(path / "seen", 4)[3]


def test_datagrams_of_a_replaced_socket(inbox: Any) -> None:
    """The path is gone, or the address is another one: what was queued is received first."""
    service, command, path = inbox
    service.start(command())
    service.stop()
    send(path / "inbox", "a", "b")
    os.unlink(path / "inbox")
    service.start(command())
    assert ["1 a", "2 b"] == seen(path / "seen", 2)
    service.stop()
    send(path / "inbox", "c")
    service.start(command(f"unix:{path}/other"))
    send(path / "other", "d")

    assert ["3 c", "4 d"] == seen(path / "seen", 4)[2:]


@pytest.fixture
def udp(tmp_path: Path) -> Iterator[tuple[Service, Callable[[int], list[str]], int, Path]]:
    """A service on a UDP port, its command with a receive buffer, the port, and what it has seen."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    program, path = tmp_path / "inbox.py", tmp_path / "seen"
    sized = INBOX.replace("bind=sys.argv[1]", "bind=sys.argv[1], receive_buffer=int(sys.argv[3])")
    program.write_text(sized)

    def command(size: int) -> list[str]:
        return [sys.executable, str(program), f"127.0.0.1:{port}", str(path), str(size)]

    with Service(timeout=DEADLINE) as service:
        yield service, command, port, path


def flood(port: int, count: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(count):
            sock.sendto(b"x" * 500, ("127.0.0.1", port))


def test_p8_datagrams_that_are_lost_in_a_restart_are_counted(udp: Any) -> None:
    """Those that did not fit into the receive buffer, to the last one; not those of before."""
    service, command, port, path = udp
    service.start(command(10_000))
    assert service.process is not None
    for _ in range(2):
        path.unlink(missing_ok=True)
        service.stop()
        flood(port, 5000)

        lost = service.start(command(10_000)).datagrams_lost

        assert 0 < lost < 5000
        assert 5000 - lost == len(seen(path, 5000 - lost))
    assert lost == service.describe()["loaded"]["datagrams_lost"]
    floods = (
        "import sys; from tests.process.test_listeners import flood; flood(int(sys.argv[1]), 5000)"
    )
    first = shlex.join([sys.executable, "-c", floods, str(port)])
    with pytest.raises(ServiceError, match="datagrams"):
        service.upgrade(["sh", "-c", f'{first}; exec "$@"', "sh", *command(10_000)])


def test_p8_datagrams_are_counted_until_there_is_room_again(udp: Any) -> None:
    """A new instance that has just become ready finds a full buffer: what is dropped until it has caught
    up is the upgrade's, to the last one."""
    service, command, port, path = udp
    service.start(command(0))
    service.stop()
    over, sent = threading.Event(), []

    def send() -> None:
        while not over.is_set():
            flood(port, 100)
            sent.append(100)

    sending = threading.Thread(target=send)
    sending.start()
    try:
        early = service.start(command(0)).datagrams_lost
    finally:
        over.set()
        sending.join()

    def lost() -> int:
        return int(service.describe()["loaded"]["datagrams_lost"])

    seen(path, 1)
    assert eventually(lambda: len(path.read_text().splitlines()) + lost() == sum(sent))
    assert 0 < early <= lost()


@pytest.mark.skipif(os.geteuid() != 0, reason="a larger buffer needs CAP_NET_ADMIN")
def test_p8_a_receive_buffer_that_is_declared(udp: Any) -> None:
    """It takes what comes in a restart; a version without it leaves it as large."""
    service, command, port, path = udp
    service.start(command(10 << 20))
    for size in (0, 10 << 20):
        path.unlink(missing_ok=True)
        service.stop()
        flood(port, 5000)
        assert 0 == service.start(command(size)).datagrams_lost
        assert 5000 == len(seen(path, 5000))
    assert "receive buffer" not in service.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up a capability")
def test_p8_a_receive_buffer_that_is_cut_is_told(udp: Any) -> None:
    """Without CAP_NET_ADMIN, net.core.rmem_max is the limit."""
    service, command, _, _ = udp
    service.start(["setpriv", "--bounding-set=-net_admin", *command(1 << 29)])
    assert "net.core.rmem_max" in service.stderr


def test_a_program_that_accepts_itself(tmp_path: Path) -> None:
    """Who waited on a replaced listener is given to it, although nothing is readable there."""
    (tmp_path / "accept.py").write_text(ACCEPT)
    command = [sys.executable, str(tmp_path / "accept.py")]
    chat = Chat("blocking", tmp_path)
    with chat.service as service:
        service.start([*command, f"unix:{tmp_path}/old"])
        service.stop()
        with Client(tmp_path / "old") as waiting:
            service.start([*command, f"unix:{tmp_path}/new"])

            assert "hello" == waiting.line()
        with Client(tmp_path / "new") as client:
            assert "hello" == client.line()


def test_identity_is_kept(chat: Chat) -> None:
    """The listener after some restarts is the socket that was bound first."""
    chat.start()
    before = [identify(fd) for _, fd in chat.service.store]
    for _ in range(3):
        chat.restart()

    assert before == [identify(fd) for _, fd in chat.service.store]
