# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk of a storage daemon that lies, a wrong FD in the place of one of its parts, and a ring that cannot be
as it is described: each is refused by name."""

import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.process.disks import DISK, own
from upgrader.errors import BackendError, MismatchError, UpgradeError
from upgrader.instance.declared_backend import DeclaredBackend
from upgrader.lab.vhost_user import SLOTS, RingError, VhostUserDisk
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import identify
from upgrader.protocol.image import ManifestEntry


@pytest.fixture
def owned() -> Iterator[ExitStack]:
    with ExitStack() as owned:
        yield owned


def opened(owned: ExitStack, directory: Path, **options: Any) -> DeclaredBackend:
    """A disk of a daemon of its own."""
    directory.mkdir(exist_ok=True)
    owned.enter_context(own(directory, **options))
    declared = DeclaredBackend("disk", VhostUserDisk(str(directory / "disk.sock"), seconds=20))
    declared.use(declared.open())
    owned.callback(declared.close)
    return declared


def disk(declared: DeclaredBackend) -> VhostUserDisk:
    assert isinstance(declared.kind, VhostUserDisk)
    return declared.kind


def test_a_wrong_fd_in_the_place_of_any_part(owned: ExitStack, tmp_path: Path) -> None:
    """Of another disk with the same name, or another part of this one: it is refused by name."""
    right, other = (opened(owned, tmp_path / name) for name in ("a", "b"))
    said, path = right.describe(), disk(right).path

    def refusal(fds: list[Fd]) -> str:
        entries = [ManifestEntry("disk", right.kind.kind, identify(fd)) for fd in fds]
        try:
            loaded = DeclaredBackend("disk", VhostUserDisk(path))
            loaded.verify(entries, fds, said)
            loaded.adopt()
        except (MismatchError, BackendError) as error:
            return str(error)
        return ""

    own_fds = list(right.fds)
    assert "" == refusal(own_fds)
    for place, (part, why) in enumerate([
        ("call", "id="), ("connection", "inode="), ("memory", "inode="), ("kick", "id="),
        ("inflight", "inode="),
    ]):  # fmt: skip
        wrong = [*own_fds[:place], other.fds[place], *own_fds[place + 1 :]]
        assert f"example.vhost-user-blk 'disk': the manifest says {part}: {why}" in refusal(wrong)
    call, *others, kick, region = own_fds
    assert "call: id=" in refusal([kick, *others, call, region])
    assert "call: it is no eventfd" in refusal([region, *others, kick, call])
    with socket.socket(socket.AF_INET) as sock:
        fd = Fd(os.dup(sock.fileno()))
        assert "connection: it is AF_INET" in refusal([call, fd, *own_fds[2:]])
        fd.close()


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("size", "GET_FEATURES, answers 4 bytes in place of 8"),
        ("other", "GET_FEATURES, answers message 2"),
        ("close", "GET_FEATURES, closes the connection"),
        ("old", "GET_FEATURES, lacks 0x100000000"),
        ("refuse", "SET_MEM_TABLE, refuses with 1"),
        ("no fd", "GET_INFLIGHT_FD, sends 0 FDs in place of one"),
        ("region", "GET_INFLIGHT_FD, has 2080 bytes at 0 of a file of 1040"),
    ],
)
def test_a_daemon_that_lies(lie: str, said: str, owned: ExitStack, tmp_path: Path) -> None:
    """The error says what it was asked for, and what is wrong with its answer."""
    with pytest.raises(BackendError, match=f"^example.vhost-user-blk 'disk': .*{said}"):
        opened(owned, tmp_path, lie=lie)


def test_a_daemon_that_does_not_answer(owned: ExitStack, tmp_path: Path) -> None:
    """Nobody waits for ever."""
    owned.enter_context(own(tmp_path, lie="silent"))
    declared = DeclaredBackend("disk", VhostUserDisk(str(tmp_path / "disk.sock"), seconds=0.2))
    with pytest.raises(BackendError, match="GET_FEATURES, does not answer in time"):
        declared.open()


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("twice", "2 answers to 1 requests"),
        ("foreign", "an answer to descriptor 3, which nobody has asked"),
        ("inside", "an answer to descriptor 61"),
        ("no status", "an answer to request 7 with status 255"),
    ],
)
def test_answers_that_nobody_has_asked_for(
    lie: str, said: str, owned: ExitStack, tmp_path: Path
) -> None:
    """They are no answers."""
    held = disk(opened(owned, tmp_path, lie=lie))
    held.read(0, 512, 7)
    select.select([held.fileno()], [], [])
    with pytest.raises(RingError, match=said):
        held.answers()


def test_what_cannot_be_asked_for(owned: ExitStack, tmp_path: Path) -> None:
    """What is not on the disk, too much at a time, and one request too many."""
    held = disk(opened(owned, tmp_path, hold=0))
    assert DISK // 512 == held.capacity
    for sector, length in [(-1, 512), (0, 100), (0, 1 << 20), (held.capacity, 512)]:
        with pytest.raises(ValueError, match="bytes"):
            held.read(sector, length, 1)
    assert SLOTS == held.room
    tag = 0
    while held.room:
        tag += 1
        held.flush(tag)
        if tag % 2 == 0:
            select.select([held.fileno()], [], [])
            assert [tag] == [answer.tag for answer in held.answers()]
    assert [*range(1, 2 * SLOTS, 2)] == sorted(asked.tag for asked in held.in_flight)
    with pytest.raises(BlockingIOError, match=f"{SLOTS} requests are in flight"):
        held.flush(0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"available": 1 << 16}, "its facts do not decode"),
        ({"available": 3}, "3 in flight"),
        ({"asked": {SLOTS: [0, 0, 512, 1]}}, "its facts do not decode"),
        ({"asked": {0: [9, 0, 512, 1]}}, "its facts do not decode"),
        ({"asked": {0: [0, 0, 1 << 20, 1]}}, "its facts do not decode"),
        ({"agreed": [1 << 40, 0, 0, 0, 0]}, "a program that knows less"),
    ],
)
def test_a_ring_that_cannot_be(
    change: dict[str, Any], said: str, owned: ExitStack, tmp_path: Path
) -> None:
    """What another version says of the ring is checked before anything is used."""
    source = opened(owned, tmp_path, region=False)
    described = source.describe()
    memory = msgspec.msgpack.decode(described.facts[2], strict=False)
    memory["ring"] |= change
    facts = [*described.facts[:2], msgspec.msgpack.encode(memory), *described.facts[3:]]
    entries = [ManifestEntry("disk", source.kind.kind, identify(fd)) for fd in source.fds]
    loaded = DeclaredBackend("disk", VhostUserDisk(disk(source).path))
    with pytest.raises(UpgradeError, match=said):
        loaded.verify(entries, source.fds, msgspec.structs.replace(described, facts=facts))
