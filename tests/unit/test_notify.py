# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notifying, against a real datagram socket that plays PID 1's end; also the FD store's fields."""

import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from upgrader.errors import NotifyError
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import identify
from upgrader.systemd import notify
from upgrader.systemd.fdstore import FdStore, Stored, StoreName, removal
from upgrader.systemd.notify import Notifier, one_line


class Pid1:
    """The other end: handles what comes in a thread, in order, and remembers it."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address)
        self.heard: list[tuple[str, int]] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self.sock, 4096, 253)
            self.heard.append((data.decode(), len(fds)))
            for number in fds:
                os.close(number)
            if data == b"CLOSE=1":
                return

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"CLOSE=1", self.sock.getsockname())
        self._thread.join()
        self.sock.close()


@pytest.fixture(params=["path", "abstract"])
def pid1(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Pid1, Notifier]]:
    shown = str(tmp_path / "notify") if request.param == "path" else f"@upgrader-{os.getpid()}"
    ear = Pid1(shown.replace("@", "\0", 1) if shown[0] == "@" else shown)
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": shown})
    yield ear, notifier
    notifier.close()
    ear.close()


def test_fields_are_one_datagram(pid1: tuple[Pid1, Notifier]) -> None:
    """READY=1 and what goes with it arrive together; the barrier comes after them."""
    ear, notifier = pid1
    notifier.send("READY=1", "STATUS=generation 1, cold start", *removal("x"))
    notifier.send("STATUS=failed: \udcff")  # a path that is not UTF-8
    notifier.barrier()

    assert [
        ("READY=1\nSTATUS=generation 1, cold start\nFDSTOREREMOVE=1\nFDNAME=x", 0),
        ("STATUS=failed: ?", 0),
        ("BARRIER=1", 1),
    ] == ear.heard


def test_the_store_says_what_it_is_told(pid1: tuple[Pid1, Notifier]) -> None:
    """Each FD under a name of its own, without FDPOLL; both ways end with a barrier."""
    ear, notifier = pid1
    store = FdStore(notifier)
    with Fd(os.memfd_create("x")) as memfd:
        store.push(StoreName(Stored.CHANNEL, "3"), memfd)
    store.remove(StoreName(Stored.LISTENER, "http"), "other")
    store.remove()

    assert [
        ("FDSTORE=1\nFDNAME=upgrader-channel-3\nFDPOLL=0", 1),
        ("BARRIER=1", 1),
        ("FDSTOREREMOVE=1\nFDNAME=upgrader-listener-http", 0),
        ("FDSTOREREMOVE=1\nFDNAME=other", 0),
        ("BARRIER=1", 1),
    ] == ear.heard


def test_a_barrier_waits(tmp_path: Path) -> None:
    """It returns when the other end has closed its copy, not when it was sent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        notifier = Notifier(str(tmp_path / "notify"))
        passed = threading.Event()
        waiter = threading.Thread(target=lambda: (notifier.barrier(), passed.set()))
        waiter.start()
        data, (number,), _, _ = socket.recv_fds(sock, 4096, 1)

        assert b"BARRIER=1" == data
        assert stat.S_ISFIFO(os.fstat(number).st_mode)
        assert not passed.is_set()
        os.close(number)
        waiter.join()
        assert passed.is_set()
        notifier.close()


def test_an_unanswered_barrier_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PID 1 does not answer: it says so, and leaves no FD open."""
    monkeypatch.setattr(notify, "PATIENCE", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        notifier = Notifier(str(tmp_path / "notify"))
        with pytest.raises(NotifyError, match="BARRIER=1"):
            notifier.barrier()
        notifier.close()


def test_a_full_queue_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PID 1 takes nothing: the error says what it was not told."""
    monkeypatch.setattr(notify, "PATIENCE", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        notifier = Notifier(str(tmp_path / "notify"))

        def fill() -> None:
            for _ in range(100_000):
                notifier.send("WATCHDOG=1")

        with pytest.raises(NotifyError, match="did not take WATCHDOG=1: timed out"):
            fill()
        notifier.close()


def test_nobody_listens_any_more(tmp_path: Path) -> None:
    """The socket is gone: an error, no signal."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        notifier = Notifier(str(tmp_path / "notify"))
    with pytest.raises(NotifyError, match="did not take READY=1: Connection refused"):
        notifier.send("READY=1")
    notifier.close()


@pytest.mark.parametrize("path", ["notify", "vsock:2:1234", "/no/such/socket"])
def test_unusable_sockets_are_named(path: str) -> None:
    """The variable and its value."""
    with pytest.raises(NotifyError, match=f"NOTIFY_SOCKET='{path}'"):
        Notifier(path)


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}])
def test_without_systemd_nothing_is_told(environment: dict[str, str]) -> None:
    """At a desk every message is dropped, and no barrier waits."""
    notifier = Notifier.from_environment(environment)

    assert not notifier.connected
    notifier.send("READY=1")
    notifier.barrier()
    notifier.close()


def test_status_is_one_line() -> None:
    """A newline would begin another field, and the datagram has room for 4096 bytes."""
    assert "a b READY=1" == one_line("a\n b\r\nREADY=1\n")
    assert len(one_line("\N{EURO SIGN}" * 5000).encode()) < 4000


@pytest.mark.parametrize("what", Stored)
@pytest.mark.parametrize("item", ["http", "a.b-c_d", "3", "upgrader-channel-1"])
def test_store_names(what: Stored, item: str) -> None:
    """A name is read back as what was stored."""
    name = StoreName(what, item)

    assert name == StoreName.parse(str(name))


@pytest.mark.parametrize("text", ["", "http", "upgrader-channel-", "upgrader-other-1", "channel-1"])
def test_foreign_names(text: str) -> None:
    """They are not ours."""
    assert StoreName.parse(text) is None


def test_the_sender_keeps_its_fd(pid1: tuple[Pid1, Notifier]) -> None:
    """Storing gives away a duplicate."""
    _, notifier = pid1
    with Fd(os.memfd_create("x")) as memfd:
        FdStore(notifier).push(StoreName(Stored.ASIDE, "1"), memfd)

        assert identify(memfd).inode
