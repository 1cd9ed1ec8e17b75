# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections that are alike cross as columns: none is lost, mixed up, or taken for another one."""

import os
import socket
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.loading import Bench, Session, Session2, Session3, image
from upgrader.errors import ImageError, MismatchError, RefusedError, UnclaimedError
from upgrader.instance.adopted_crowd import AdoptedCrowd
from upgrader.instance.declarations import Connections, Declarations
from upgrader.instance.declared_socket import Bound
from upgrader.instance.frozen import Frozen, FrozenCrowd, Moving, gather, in_crowds, spread
from upgrader.instance.offer import Offer
from upgrader.instance.save import entry_of, one_by_one
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.crowd import Crowd
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import identify
from upgrader.protocol.image import Manifest, in_columns
from upgrader.protocol.kinds import Kind, Waiting
from upgrader.protocol.parameters import Transfer
from upgrader.protocol.received_fds import ReceivedFds
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.state import describe
from upgrader.protocol.state_codec import encode

COUNT = 5


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for loaded in bench.loads:
        for crowd in loaded.crowds:
            crowd.close()
    bench.close()


def accepted(bench: Bench, door: socket.socket, count: int) -> list[socket.socket]:
    socks = []
    for _ in range(count):
        bench.opened.append(socket.create_connection(door.getsockname()))
        socks.append(door.accept()[0])
    bench.opened += socks
    return socks


def frozen(sock: socket.socket, session: bytes, **more: Any) -> Frozen:
    state = ConnectionState(more.pop("waiting", Waiting.MESSAGE), session=session, **more)
    return Frozen("door", sock, identify(sock), state)


def numbered(bench: Bench, *numbers: int) -> tuple[Manifest, list[Any], list[FrozenCrowd]]:
    """An image with one connection that is not alike, and the crowd of connections with these sessions."""
    manifest, fds = image(bench)
    header = SavedState("session", 1, 1, b"", shape=describe(Session).shape.mark)
    manifest = msgspec.structs.replace(manifest, sessions={"door": header})
    socks = accepted(bench, fds[0], len(numbers))
    moving = [
        frozen(sock, encode(Session(number))) for sock, number in zip(socks, numbers, strict=True)
    ]
    alone, crowds = gather(moving, ["door"])
    assert not alone
    return manifest, [*fds, *socks], crowds


def is_open(number: int) -> bool:
    return Path(f"/proc/self/fd/{number}").exists()


def inodes(socks: Any) -> list[int]:
    return [os.fstat(sock.fileno()).st_ino for sock in socks]


@pytest.mark.parametrize("numbers", [range(COUNT), [7] * COUNT, [7]])
def test_a_crowd_is_loaded(numbers: list[int], bench: Bench) -> None:
    """Each socket has its own session; taken one by one, then frozen again, it is the same."""
    manifest, fds, crowds = numbered(bench, *numbers)
    bench.park(in_columns(manifest, [each.crowd for each in crowds]), fds)
    loaded = bench.load()

    assert 3 + len(numbers) == loaded.status.fds
    assert [Session(7)] == [adopted.session for adopted in loaded.adopted]
    (crowd,) = loaded.crowds
    assert inodes(fds[3:]) == inodes(crowd.members)
    again = crowd.freeze()
    assert crowds[0].crowd == again.crowd
    first = crowd.take(crowd.numbers[0])
    with first.take() as sock:
        assert (Session(numbers[0]), inodes(fds[3:4])) == (first.session, inodes([sock]))
    rest = [each for each in loaded.each_adopted() if each is not loaded.adopted[0]]
    bench.adopted += rest
    assert [Session(number) for number in numbers[1:]] == [each.session for each in rest]
    assert inodes(fds[4:]) == inodes(rest)
    assert not crowd


def test_a_crowd_is_left_with_systemd_one_by_one(bench: Bench) -> None:
    """Nobody can say whether the version that comes next knows crowds."""
    manifest, fds, crowds = numbered(bench, *range(COUNT))
    whole, owners = one_by_one(manifest, fds[:3], crowds)
    bench.park(whole, owners)
    loaded = bench.load()

    assert (1, []) == (whole.format, loaded.crowds)
    assert [Session(7), *map(Session, range(COUNT))] == [a.session for a in loaded.adopted]
    assert inodes(fds[2:]) == inodes(loaded.adopted)


def test_what_is_left_of_a_crowd_moves_on(bench: Bench) -> None:
    """Those that have been heard meanwhile are no part of it, and all others keep what is theirs."""
    manifest, fds, crowds = numbered(bench, *range(COUNT))
    bench.park(in_columns(manifest, [each.crowd for each in crowds]), fds)
    (crowd,) = bench.load().crowds
    for place in (3, 1):
        bench.adopted.append(crowd.take(crowd.numbers[place]))

    left = list(crowd.freeze().each())
    assert [encode(Session(n)) for n in (0, 2, 4)] == [each.state.session for each in left]
    assert inodes([fds[3], fds[5], fds[7]]) == [each.identity.inode for each in left]
    assert [each.identity.inode for each in left] == inodes(each.sock for each in left)


def test_only_those_that_are_alike(bench: Bench) -> None:
    """Whoever has something in hand, or is at another safe point, goes by itself."""
    door = bench.socket()
    socks = accepted(bench, door, 8)
    one, two, *odd = socks
    moving: list[Moving] = [
        frozen(one, b"1"),
        frozen(odd[0], b"", unread=b"x"),
        frozen(odd[1], b"", unsent=b"x"),
        frozen(odd[2], b"", waiting=Waiting.SAFE),
        msgspec.structs.replace(frozen(odd[3], b""), secret=b"x"),
        msgspec.structs.replace(frozen(odd[4], b""), listener="other"),
        frozen(two, b"2"),
    ]
    alone, (crowd,) = gather(moving, ["door"])

    assert moving[1:6] == alone
    assert [moving[0], moving[6]] == [
        msgspec.structs.replace(each, sock=sock)
        for each, sock in zip(spread([crowd]), (one, two), strict=True)
    ]
    more, (both,) = gather([*alone, crowd, frozen(odd[5], b"3")], ["door"])
    assert (alone, [b"1", b"2", b"3"]) == (more, both.crowd.sessions)
    assert inodes([one, two, odd[5]]) == both.crowd.numbers.tolist()
    nobody, none = gather([both], [])
    assert (3, []) == (len(nobody), none)
    assert [entry_of(each) for each in both.each()] == [entry_of(each) for each in nobody]


def test_another_socket_in_its_place(bench: Bench) -> None:
    """It is refused by name, with what should be there; nothing is lost by that."""
    manifest, fds, crowds = numbered(bench, *range(COUNT))
    whole = in_columns(manifest, [each.crowd for each in crowds])
    bench.park(whole, [*fds[:4], fds[5], fds[4], *fds[6:]])
    with pytest.raises(MismatchError, match="connection of 'door': the manifest says AF_INET"):
        bench.load()


def test_a_file_of_the_same_inode(bench: Bench) -> None:
    """Only a socket can be one."""
    manifest, fds, crowds = numbered(bench, 1, 2)
    file = Fd(os.memfd_create("x"))
    bench.kept.append(("x", file))
    (inode,) = inodes([file])
    columns = msgspec.structs.replace(
        crowds[0].crowd, inodes=array("Q", [*inodes(fds[3:4]), inode]).tobytes()
    )
    bench.park(in_columns(manifest, [columns]), [*fds[:4], file])
    with pytest.raises(MismatchError, match=r"connection of 'door'.* the FD is a file"):
        bench.load()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inodes": b""}, ImageError, "0 bytes of inodes"),
        ({"inodes": bytes(9)}, ImageError, "9 bytes of inodes"),
        ({"sessions": []}, ImageError, "0 sessions"),
        ({"sessions": [b"\x80"] * (COUNT - 1)}, ImageError, "4 sessions"),
        ({"sessions": [b"\xc1"]}, RefusedError, "session"),
        ({"backend": "x"}, UnclaimedError, "connection of 'x'"),
        ({"backend": "inbox"}, UnclaimedError, "connection of 'inbox'"),
        ({"inodes": bytes(8 * COUNT)}, MismatchError, "connection of 'door'"),
    ],
)
def test_a_crowd_that_lies(
    changes: dict[str, Any], error: type[RefusedError], message: str, bench: Bench
) -> None:
    """It is refused by name, and the image is as it was."""
    manifest, fds, crowds = numbered(bench, *range(COUNT))
    crowd = msgspec.structs.replace(crowds[0].crowd, **changes)
    bench.park(in_columns(manifest, [crowd]), fds[: 3 + len(crowd)])
    for _ in range(2):
        with pytest.raises(error, match=message):
            bench.load()
    assert [] == bench.told()


def test_one_fd_less(bench: Bench) -> None:
    """A crowd comes whole, or not at all."""
    manifest, fds, crowds = numbered(bench, *range(COUNT))
    bench.park(in_columns(manifest, [each.crowd for each in crowds]), fds[:-1])
    with pytest.raises(ImageError, match="8 entries, 7 FDs"):
        bench.load()


def test_sessions_of_another_version(bench: Bench) -> None:
    """They are read one by one, as ever."""
    manifest, fds, crowds = numbered(bench, *range(COUNT))
    bench.park(in_columns(manifest, [each.crowd for each in crowds]), fds)
    bench.session = Session2
    loaded = bench.load()

    assert [] == loaded.crowds
    assert [Session2(7), *map(Session2, range(COUNT))] == [a.session for a in loaded.adopted]
    assert inodes(fds[2:]) == inodes(loaded.adopted)


def test_a_crowd_that_is_not_taken(bench: Bench) -> None:
    """With backend-transfer=no, each is closed here and counted as left behind."""
    manifest, fds, crowds = numbered(bench, *range(COUNT))
    bench.park(in_columns(manifest, [each.crowd for each in crowds]), fds)
    loaded = bench.load(backend_transfer=Transfer.parse("door=no"))
    assert (COUNT + 1, []) == (loaded.status.left_behind, loaded.crowds)


def test_who_gets_crowds(bench: Bench) -> None:
    """A library that reads the format of the image, for sessions that no older version may want."""
    declarations = Declarations("web")
    for name, session in (("plain", None), ("one", Session), ("converted", Session3)):
        door = Bound(Kind.LISTENER, name)
        door.open(bench.socket())
        declarations.add_socket(door)
        declarations.add_connections(Connections(door, session, lambda peer: None))
    asked: dict[str, Any] = {
        "streams": [1, 2, 3], "states": {}, "backends": ["plain", "one", "converted"],
    }  # fmt: skip
    for images, names in (([1, 2, 3], []), ([1, 2, 3, 4], ["plain", "one"])):
        offer = Offer.read({**asked, "images": images}, declarations)
        assert names == in_crowds(declarations, offer.readers)


def test_a_crowd_closes_what_is_left_of_it() -> None:
    """When it is told to, or collected; what was taken is somebody else's."""
    ends = [os.pipe() for _ in range(2)]
    numbers = array("i", [number for pair in ends for number in pair])
    crowd = AdoptedCrowd(Crowd("door", 1, 1, "", bytes(32), [b""]), numbers, None, 0.0)
    taken = crowd.take(numbers[1])
    del crowd

    assert is_open(numbers[1])
    for number in numbers[:1] + numbers[2:]:
        assert not is_open(number)
    taken.close()


def test_received_fds_close_what_nobody_has() -> None:
    """What was looked at is its own, what was taken is the caller's, and all else is closed."""
    ends = [os.pipe() for _ in range(2)]
    one, two, three, four = (number for pair in ends for number in pair)
    ancillary = array("i", [two, three, four]).tobytes() + b"\x01"  # the last one was cut off
    fds = ReceivedFds([Fd(one)])
    fds.join(ReceivedFds.of([(socket.SOL_SOCKET, socket.SCM_RIGHTS, ancillary), (0, 0, b"1234")]))
    looked_at = fds[1]
    assert fds[1] is looked_at
    taken = fds.take(2, 1)
    assert [one, two, -1, four] == [fd.fileno() for fd in (fds[0], fds[1])] + fds.numbers[
        2:
    ].tolist()
    del fds

    assert (two, [three]) == (looked_at.fileno(), taken.tolist())
    assert is_open(two)
    os.close(three)
    assert not is_open(four)
    looked_at.close()
