# SPDX-License-Identifier: LGPL-2.1-or-later
"""An image spread over the FD store: whole, cut, or only parts of one."""

import os
import socket
from collections.abc import Iterator

import pytest

from upgrader.instance import image_in_fd_store
from upgrader.protocol import image, records
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import identify
from upgrader.protocol.image import Manifest, ManifestEntry
from upgrader.protocol.kinds import Kind
from upgrader.protocol.ledger import new_ledger
from upgrader.systemd.fdstore import Stored, StoreName

Store = dict[StoreName, Fd]


@pytest.fixture
def stored() -> Iterator[Store]:
    """What PID 1 passes to the start after a parking: a listener, and one image in three parts."""
    listener = socket.create_server(("127.0.0.1", 0))
    one, other = socket.socketpair()
    entries = [
        ManifestEntry("door", Kind.LISTENER, identify(listener)),
        ManifestEntry("door", Kind.CONNECTION, identify(one)),
        ManifestEntry("door", Kind.CONNECTION, identify(other)),
    ]
    found = {
        StoreName(Stored.ENTRY, "7.2"): Fd(other.detach()),
        StoreName(Stored.LISTENER, "door"): Fd(listener.detach()),
        StoreName(Stored.IMAGE, "7"): image.seal(Manifest("web", 7, "1", 0, entries=entries)),
        StoreName(Stored.ENTRY, "7.1"): Fd(one.detach()),
        StoreName(Stored.LEDGER, "7"): new_ledger(),
    }
    yield found
    for fd in found.values():
        fd.close()


def test_the_fds_are_found_by_what_they_are(stored: Store) -> None:
    """Whatever their names and the order in which PID 1 passes them; nothing is consumed."""
    (found,) = image_in_fd_store.find(stored)
    stream = found.peek()
    expected = [StoreName(Stored.LISTENER, "door"), StoreName(Stored.ENTRY, "7.1"),
                StoreName(Stored.ENTRY, "7.2")]  # fmt: skip

    assert (7, 3, records.EndReason.COMPLETE) == (
        stream.generation,
        stream.announced,
        stream.reason,
    )
    assert [identify(stored[name]) for name in expected] == [identify(fd) for fd in stream.fds]
    assert "upgrader-image-7" == found.name
    assert {*map(str, expected[1:]), "upgrader-ledger-7"} == set(found.others)
    for fd in stream.fds:
        fd.close()
    found.close()
    assert all(os.fstat(fd.fileno()) for fd in stored.values())


def test_attempts_are_counted_for_all_copies(stored: Store) -> None:
    """The count outlives whoever has counted."""
    for attempt in range(3):
        (found,) = image_in_fd_store.find(stored)
        assert attempt == found.count_attempt()
        found.close()


def test_one_fd_is_missing(stored: Store) -> None:
    """What comes after it is cut, and never taken for another."""
    stored.pop(StoreName(Stored.ENTRY, "7.1")).close()
    (found,) = image_in_fd_store.find(stored)
    stream = found.peek()

    assert [1, records.EndReason.CHANNEL_FULL] == [len(stream.fds), stream.reason]
    stream.fds[0].close()
    found.close()


@pytest.mark.parametrize("missing", [Stored.IMAGE, Stored.LEDGER])
def test_parts_are_no_image(stored: Store, missing: Stored) -> None:
    """Of a parking that was killed half-way there is nothing to load."""
    stored.pop(StoreName(missing, "7")).close()

    assert [] == image_in_fd_store.find(stored)
