# SPDX-License-Identifier: LGPL-2.1-or-later
"""A TAP device as it moves: what is said of it, what another process may spoil, and its queues."""

import contextlib
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator

import pytest

from tests.support import cannot_run
from upgrader.backends import Tap
from upgrader.errors import BackendError, MismatchError
from upgrader.instance.declared_backend import DeclaredBackend
from upgrader.programs.qemu import tap as qemu_tap
from upgrader.protocol.identity import identify
from upgrader.protocol.image import ManifestEntry

DEVICE = f"tt{os.getpid() % 10**8}"
#: Of include/uapi/linux/if_tun.h.
SET_HEADER, SET_LITTLE, SET_SNDBUF, SET_QUEUE = 0x400454D8, 0x400454DC, 0x400454D4, 0x400454D9
SET_CARRIER, SET_OFFLOAD = 0x400454E2, 0x400454D0
CSUM, TSO4 = 1, 2
DETACH = 0x400


@pytest.fixture
def tap() -> Iterator[DeclaredBackend]:
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK) or os.geteuid() != 0:
        cannot_run("a TAP device needs /dev/net/tun and CAP_NET_ADMIN")
    declared = DeclaredBackend(
        "uplink", Tap(DEVICE, queues=2, header=12, sndbuf=65536, queue_length=2000)
    )
    declared.use(declared.open())
    yield declared
    declared.close()


def entries(declared: DeclaredBackend) -> list[ManifestEntry]:
    return [ManifestEntry("uplink", "tap", identify(fd)) for fd in declared.fds]


def kind_of(declared: DeclaredBackend) -> Tap:
    assert isinstance(declared.kind, Tap)
    return declared.kind


def test_what_is_said_of_a_device(tap: DeclaredBackend) -> None:
    """All that the kernel reads; the offloads are what the program has set."""
    kind = kind_of(tap)
    kind.set_offloads(CSUM | TSO4)
    first, second = (kind.describe(fd) for fd in kind.fds)
    assert first == second
    assert (DEVICE, 12, 65536) == (first["device"], first["header"], first["sndbuf"])
    assert os.stat("/proc/self/ns/net").st_ino == first["netns"]
    assert (CSUM | TSO4, 3) == (first["offloads"], first["features"])
    assert not first["detached"]
    with open(f"/sys/class/net/{DEVICE}/tx_queue_len") as file:
        assert 2000 == int(file.read())


def test_frames_for_nobody(tap: DeclaredBackend) -> None:
    """Whoever reads the device next gets them; where none can be sent, nothing comes of it."""
    subprocess.run(["ip", "link", "set", DEVICE, "up"], check=True)
    qemu_tap.fill(DEVICE)
    qemu_tap.fill("nowhere")
    frames: list[bytes] = []
    for fd in kind_of(tap).fds:
        with contextlib.suppress(BlockingIOError):
            while True:
                frames.append(os.read(fd, 2000)[12:])

    ours = [each for each in frames if each[12:14] == b"\x88\xb5"]
    assert len(ours) > 1
    assert {60} == {len(each) for each in ours}


def test_what_another_process_spoils_is_set_again(tap: DeclaredBackend) -> None:
    """By whoever serves on; settings are not what a device is known by, so the new instance takes it,
    and sets them, too."""
    kind = kind_of(tap)
    described, before = tap.describe(), kind.describe(kind.fileno())

    def spoil() -> None:
        fcntl.ioctl(kind.fds[1], SET_HEADER, struct.pack("i", 10))
        fcntl.ioctl(kind.fds[1], SET_LITTLE, struct.pack("i", 1))
        fcntl.ioctl(kind.fds[1], SET_SNDBUF, struct.pack("i", 4096))
        fcntl.ioctl(kind.fds[1], SET_OFFLOAD, CSUM)
        assert before != kind.describe(kind.fileno())

    spoil()
    tap.serve_on(described)
    assert before == kind.describe(kind.fileno())
    spoil()
    tap.verify(entries(tap), tap.fds, described)
    tap.adopt()
    tap.guard()
    assert before == kind.describe(kind.fileno())


def test_offloads_that_nobody_has_said_are_guessed(tap: DeclaredBackend) -> None:
    """From what ethtool shows: a program may have set them without a word."""
    kind = kind_of(tap)
    fcntl.ioctl(kind.fileno(), SET_OFFLOAD, CSUM | TSO4)
    described = tap.describe()
    assert (0, 3) == tuple(kind.describe(kind.fileno())[name] for name in ("offloads", "features"))
    fcntl.ioctl(kind.fds[1], SET_OFFLOAD, 0)
    assert 0 == kind.describe(kind.fileno())["features"]
    tap.serve_on(described)
    assert 3 == kind.describe(kind.fileno())["features"]


def test_the_carrier_is_set_again(tap: DeclaredBackend) -> None:
    """If it was known; a device that somebody brings up in the meantime keeps the carrier that it has."""
    kind = kind_of(tap)
    down = tap.describe()
    assert -1 == kind.describe(kind.fileno())["carrier"]
    subprocess.run(["ip", "link", "set", DEVICE, "up"], check=True)
    assert tap.serve_on(down)
    assert 1 == kind.describe(kind.fileno())["carrier"]
    described = tap.describe()
    fcntl.ioctl(kind.fds[1], SET_CARRIER, struct.pack("i", 0))
    assert 0 == kind.describe(kind.fileno())["carrier"]
    assert tap.serve_on(described)
    assert 1 == kind.describe(kind.fileno())["carrier"]


def test_a_namespace_that_only_one_may_ask_for(tap: DeclaredBackend) -> None:
    """It takes CAP_NET_ADMIN, which the next instance may not have; another one is refused."""
    facts = {**kind_of(tap).describe(kind_of(tap).fileno())}
    kind_of(tap).verify(kind_of(tap).fileno(), {**facts, "netns": 0})
    with pytest.raises(MismatchError, match="netns="):
        kind_of(tap).verify(kind_of(tap).fileno(), {**facts, "netns": 1})


def test_queues_in_another_order_are_refused(tap: DeclaredBackend) -> None:
    """If they can be told apart, because one of them is detached."""
    kind = kind_of(tap)
    fcntl.ioctl(kind.fds[1], SET_QUEUE, struct.pack("16sH22x", b"", DETACH))
    described = tap.describe()
    tap.verify(entries(tap), tap.fds, described)
    with pytest.raises(MismatchError, match=r"detached=False.*detached=True"):
        tap.verify(entries(tap), tap.fds[::-1], described)


def test_a_device_that_was_removed(tap: DeclaredBackend) -> None:
    """Nothing can be said of it, and the next instance makes a new one."""
    assert "" == tap.stale(tap.fds)
    subprocess.run(["ip", "link", "delete", DEVICE], check=True)
    assert f"{DEVICE} was removed" == tap.stale(tap.fds)
    with pytest.raises(BackendError, match="tap 'uplink': cannot be described"):
        tap.describe()


def test_a_device_that_is_read_otherwise_is_refused(tap: DeclaredBackend) -> None:
    """A program that reads a vnet header where there is none sees no frame as it is."""
    with pytest.raises(MismatchError, match="header=12, the FD is declared with header=10"):
        Tap(DEVICE, queues=2, header=10).verify(
            kind_of(tap).fileno(), kind_of(tap).describe(kind_of(tap).fileno())
        )
    for other in (Tap(DEVICE, queues=2), Tap(DEVICE, header=12), Tap("other", queues=2, header=12)):
        assert "declared" in other.refuse(kind_of(tap).fileno())
