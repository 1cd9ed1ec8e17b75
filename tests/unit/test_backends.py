# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backends: owning FDs, saying what they are, addresses and what is bound to them."""

import fcntl
import os
import socket
import stat
from pathlib import Path

import pytest

from upgrader.backends.listener import Address, bind, path_inode
from upgrader.errors import DeclarationError
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import Identity, identify
from upgrader.protocol.kinds import show_address


def parse(text: str) -> Address:
    """An address of one family."""
    [address] = Address.parse(text)
    return address


STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM


def unix(path: Path) -> Address:
    return parse(f"unix:{path}")


# Fd


def test_an_fd_is_closed_once() -> None:
    """Closing again does not close whoever got the number next."""
    reading, writing = os.pipe()
    fd = Fd(reading)
    fd.close()
    os.dup2(writing, reading)
    fd.close()
    del fd

    os.fstat(reading)
    os.close(reading)
    os.close(writing)


def test_duplicates_and_detaching() -> None:
    """A duplicate is CLOEXEC and the same file; a detached number is the caller's."""
    reading, writing = os.pipe()
    with Fd(reading) as fd, Fd(writing):
        twin = fd.duplicate()

        assert fcntl.fcntl(twin.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert identify(fd) == identify(twin)
        number = twin.detach()
        assert -1 == twin.fileno()
        os.close(number)


def test_an_fd_becomes_a_socket() -> None:
    """The socket owns the number then; what is none stays where it was."""
    left, right = socket.socketpair()
    with right, Fd(left.detach()).socket() as sock:
        sock.send(b"x")

        assert b"x" == right.recv(1)
    reading, writing = os.pipe()
    with Fd(reading) as fd, Fd(writing):
        with pytest.raises(OSError, match="non-socket"):
            fd.socket()
        assert reading == fd.fileno()


# Identity


def test_sockets_are_recognised() -> None:
    """Family, type and address come from the kernel; a duplicate has the same identity."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        identity = identify(sock)
        port = sock.getsockname()[1]

        assert (socket.AF_INET, STREAM) == (identity.family, identity.type)
        assert f"127.0.0.1:{port}" == identity.address
        assert f"AF_INET SOCK_STREAM 127.0.0.1:{port}" in str(identity)
        with Fd(os.dup(sock.fileno())) as twin:
            assert identity == identify(twin)
        with socket.create_server(("127.0.0.1", 0)) as other:
            assert identity != identify(other)


def test_files_are_recognised() -> None:
    """What is no socket has its file type and inode."""
    reading, writing = os.pipe()
    with Fd(reading) as fd, Fd(writing):
        identity = identify(fd)

    assert (stat.S_IFIFO, 0, "") == (identity.file_type, identity.family, identity.address)
    assert "0o10000" in str(identity)


def test_an_identity_of_unknown_kind_can_be_shown() -> None:
    """It comes from another version of this library: the error message must not fail."""
    assert "9999 77 (no address)" in str(Identity(1, stat.S_IFSOCK, 9999, 77))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (("127.0.0.1", 80), "127.0.0.1:80"),
        (("::1", 80, 0, 0), "[::1]:80"),
        ((3, 1234), "3:1234"),
        (b"\0name", "@name"),
        (b"\0\xff", "@\N{REPLACEMENT CHARACTER}"),
        ("/run/x", "/run/x"),
        ("/run/\udcff", "/run/\N{REPLACEMENT CHARACTER}"),
        ("", ""),
        (None, ""),
    ],
)
def test_addresses_are_shown(name: object, text: str) -> None:
    """As people write them, and always in UTF-8."""
    assert text == show_address(name)
    text.encode()


# Addresses


@pytest.mark.parametrize(
    ("text", "family", "name"),
    [
        ("127.0.0.1:80", socket.AF_INET, ("127.0.0.1", 80)),
        ("[::1]:80", socket.AF_INET6, ("::1", 80)),
        ("unix:/run/x", socket.AF_UNIX, "/run/x"),
        ("unix:@x", socket.AF_UNIX, "@x"),
    ],
)
def test_addresses_are_read(text: str, family: int, name: object) -> None:
    """The forms that systemd knows, with unix: before a path."""
    address = parse(text)

    assert (family, name) == (address.family, address.name)


@pytest.mark.parametrize(
    "text",
    ["", "80", "host", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536", "127.0.0.1:-1",
     "unix:", "unix:x", "unix:/", "unix:@", "[::1]", "no.such.host.invalid:80"],
)  # fmt: skip
def test_bad_addresses_are_named(text: str) -> None:
    """The error begins with what was given."""
    with pytest.raises(DeclarationError) as caught:
        parse(text)

    assert text == caught.value.item


@pytest.mark.parametrize(
    "text", ["127.0.0.1:0", "unix:@upgrader-test-{pid}", "unix:{path}/s", "unix:{path}/\udcff"]
)
@pytest.mark.parametrize("kind", [STREAM, DATAGRAM])
def test_what_is_bound_matches(text: str, kind: socket.SocketKind, tmp_path: Path) -> None:
    """A bound socket does not block, matches its own address, and no other."""
    address = parse(text.format(pid=os.getpid(), path=tmp_path))
    with bind(address, kind) as sock:
        assert not sock.getblocking()
        assert address.matches(sock)
        for other in ("127.0.0.2:0", "127.0.0.1:1", "[::1]:0", "unix:@other", "unix:/other"):
            assert not parse(other).matches(sock)


def test_an_occupied_address_is_named() -> None:
    """The error says where, and why not."""
    with bind(parse("127.0.0.1:0"), STREAM) as sock:
        taken = f"127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(OSError, match=f"cannot bind {taken}: Address already in use"):
            bind(parse(taken), STREAM)


def test_a_path_that_is_too_long_is_named() -> None:
    """Python itself refuses it, without an errno."""
    with pytest.raises(OSError, match=r"unix:/xxx.*: AF_UNIX path too long"):
        bind(parse("unix:/" + "x" * 200), STREAM)


@pytest.mark.parametrize("kind", [STREAM, DATAGRAM])
def test_a_stale_socket_file_is_replaced(kind: socket.SocketKind, tmp_path: Path) -> None:
    """Nobody listens there: a killed instance left it."""
    address = unix(tmp_path / "s")
    bind(address, kind).close()
    before = os.stat(tmp_path / "s").st_ino
    with bind(address, kind) as sock:
        assert path_inode(sock) == os.stat(tmp_path / "s").st_ino
    assert before  # the number may be given again


@pytest.mark.parametrize("kind", [STREAM, DATAGRAM])
def test_a_living_socket_file_is_not_replaced(kind: socket.SocketKind, tmp_path: Path) -> None:
    """Somebody else listens there."""
    address = unix(tmp_path / "s")
    with bind(address, kind) as sock:
        with pytest.raises(OSError, match="Address already in use"):
            bind(address, kind)
        assert path_inode(sock) == os.stat(tmp_path / "s").st_ino


def test_a_full_backlog_is_alive(tmp_path: Path) -> None:
    """Looking whether somebody listens never waits for them."""
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as client:
        sock.bind(str(tmp_path / "s"))
        sock.listen(0)
        client.connect(str(tmp_path / "s"))
        with pytest.raises(OSError, match="Address already in use"):
            bind(unix(tmp_path / "s"), STREAM)


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    """Only sockets are removed, never a file or a directory that happens to be there."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "directory", "link"):
        with pytest.raises(OSError, match="Address already in use"):
            bind(unix(tmp_path / name), STREAM)

    assert "precious" == (tmp_path / "file").read_text()


def test_the_inode_of_a_path(tmp_path: Path) -> None:
    """0 where there is no file, or none any more."""
    with bind(unix(tmp_path / "s"), STREAM) as sock:
        assert path_inode(sock) == os.stat(tmp_path / "s").st_ino
        os.unlink(tmp_path / "s")
        assert 0 == path_inode(sock)
    for text in ("127.0.0.1:0", f"unix:@upgrader-test-{os.getpid()}"):
        with bind(parse(text), STREAM) as sock:
            assert 0 == path_inode(sock)
