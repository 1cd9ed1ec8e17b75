# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lent sockets and kept FDs on their way, and peers that lie about them."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.units import Keeping
from upgrader.backends import EventFd, Pipe
from upgrader.errors import ChannelError, NotifyError
from upgrader.instance.control_answers import Negotiation
from upgrader.instance.declarations import Declarations
from upgrader.instance.lender import Lender
from upgrader.instance.lent_sockets import Borrowed, lend, next_kept
from upgrader.instance.self_report import SelfReport
from upgrader.protocol.fd import Fd
from upgrader.protocol.varlink_messages import Reply, encode
from upgrader.systemd.listen_fds import Passed


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.settimeout(20)
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize(
    ("data", "count"), [(b"x\0", 0), (b"x", 1), (b"a\0b\0", 1), (b"", 0), (b"\xff" * 2000, 1)]
)
def test_what_makes_no_sense_is_not_kept(
    pair: tuple[socket.socket, socket.socket], data: bytes, count: int
) -> None:
    """No FD, no end, two names, a hang-up; and no FD stays open."""
    ours, theirs = pair
    if data:
        socket.send_fds(theirs, [data], [theirs.fileno()] * count)
    theirs.shutdown(socket.SHUT_WR)

    assert next_kept(ours) is None


def test_one_fd_is_kept_at_a_time(pair: tuple[socket.socket, socket.socket]) -> None:
    """Further ones are closed."""
    ours, theirs = pair
    socket.send_fds(theirs, [b"name\0"], [theirs.fileno()] * 3)
    kept = next_kept(ours)
    assert kept
    name, fd = kept
    with fd:
        assert "name" == name
        assert os.fstat(theirs.fileno()).st_ino == os.fstat(fd.fileno()).st_ino


def answered(path: Path, answer: Callable[[socket.socket], None]) -> Borrowed | None:
    """What comes of asking a source that answers so."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                answer(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            return Borrowed.ask(str(path), {}, 20)
        finally:
            thread.join()


def reply(sock: socket.socket, names: object) -> None:
    sock.sendall(encode(Reply({"backends": names})))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_than_it_says(tmp_path: Path, count: int) -> None:
    """Two are announced: fewer or more are refused."""

    def answer(sock: socket.socket) -> None:
        reply(sock, ["a", "b"])
        with socket.socket(socket.AF_UNIX) as lent:
            lend(sock, [lent] * count)

    with pytest.raises(ChannelError):
        answered(tmp_path / "source", answer)


def test_many_are_lent(tmp_path: Path) -> None:
    """More than fit into one message."""

    def answer(sock: socket.socket) -> None:
        reply(sock, ["a"] * 600)
        lend(sock, [sock] * 600)

    borrowed = answered(tmp_path / "source", answer)
    assert borrowed
    assert 600 == len(borrowed.sockets["a"])
    for sock in borrowed.sockets["a"]:
        sock.close()
    with pytest.raises(NotifyError), Fd(os.open("/", os.O_RDONLY)) as fd:
        borrowed.keep("x", fd)  # it has hung up
    borrowed.close()


def test_what_the_program_keeps_is_lent(tmp_path: Path) -> None:
    """Under its name, after the sockets; what is given up meanwhile is sent still."""
    declarations = Declarations("x")
    declarations.take_passed([], [Passed("memory", Fd(os.memfd_create("x")))])
    lender = Lender(declarations, Keeping())

    def answer(sock: socket.socket) -> None:
        offer = lender.offer()
        assert {"backends": [], "kept": ["memory"], "others": []} == offer
        sock.sendall(encode(Reply(offer)))
        declarations.forget_kept("memory")
        lender.send(sock)

    borrowed = answered(tmp_path / "source", answer)
    assert borrowed
    (item,) = borrowed.kept
    with item.fd:
        assert "memory" == item.name
        assert "/memfd:x (deleted)" == os.readlink(f"/proc/self/fd/{item.fd.fileno()}")
    borrowed.close()


def test_other_backends_are_lent(tmp_path: Path) -> None:
    """All FDs of each under its name; without what does not move."""
    declarations = Declarations("x")
    declarations.take_passed([], [])
    for name, kind in (("jobs", Pipe()), ("hits", EventFd())):
        declarations.add_backend(name, kind)
    for each in declarations.backends.values():
        each.use(each.open())
    lender = Lender(declarations, Keeping())

    def answer(sock: socket.socket) -> None:
        sock.sendall(encode(Reply(lender.offer([declarations.backends["jobs"]]))))
        lender.send(sock)

    borrowed = answered(tmp_path / "source", answer)
    assert borrowed
    assert ["jobs"] == list(borrowed.others)
    os.write(declarations.backends["jobs"].fds[1].fileno(), b"x")
    assert b"x" == os.read(borrowed.others["jobs"][0].fileno(), 1)
    for fd in borrowed.others["jobs"]:
        fd.close()
    for each in declarations.backends.values():
        each.close()
    borrowed.close()


def test_a_source_that_lends_nothing(tmp_path: Path) -> None:
    """One of an older library does not know how; one that answers nonsense is refused."""

    def unknown(sock: socket.socket) -> None:
        sock.sendall(encode(Reply({}, "org.varlink.service.MethodNotFound")))

    assert answered(tmp_path / "old", unknown) is None
    with pytest.raises(ChannelError):
        answered(tmp_path / "liar", lambda sock: reply(sock, 7))


def test_what_a_source_keeps() -> None:
    """So many, each under a name of its own; all of it is given up if the upgrade fails."""
    declarations, keeping = Declarations("x"), Keeping()
    declarations.take_passed([], [])
    lender = Lender(declarations, keeping)
    with Fd(os.open("/", os.O_RDONLY)) as fd:
        for number in range(16):
            assert "" == lender.keep(f"n{number}", fd)
        assert "16 are kept already" == lender.keep("more", fd)
    lender.give_up()
    lender.wait_clean()

    assert [] == keeping.kept


def test_who_insures_waits_for_who_has_borrowed(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until that hangs up, which it does once it serves, or dies."""
    monkeypatch.setattr("upgrader.instance.control_answers._DECIDED", 0.01)
    ours, theirs = pair
    report = SelfReport("x", "1", {})
    report.declarations.take_passed([], [])
    negotiation = Negotiation(report, "1", lambda request: None, lambda: None, Keeping())
    assert negotiation.wait_returned(0)  # nobody has

    lending = threading.Thread(target=negotiation.lending, args=(ours,))
    lending.start()
    socket.send_fds(theirs, [b"x\0"], [theirs.fileno()])
    assert b"\0" == theirs.recv(1024)
    assert not negotiation.wait_returned(0)
    theirs.close()
    assert negotiation.wait_returned(20)
    lending.join()
