# SPDX-License-Identifier: LGPL-2.1-or-later
"""The image: what is sealed comes back, and whatever is damaged is refused by name."""

import contextlib
import fcntl
import os
import random
import re
import socket
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from tests.unit.golden import IMAGES, MANIFEST, STREAMS, image_bytes
from upgrader.errors import ImageError
from upgrader.protocol import image
from upgrader.protocol.fd import Fd
from upgrader.protocol.image import FORMATS, MAGIC, SEALS, Manifest, seal, unseal

HEADER = struct.Struct("!8sIIQ")


def memfd_of(data: bytes, seals: int = SEALS) -> Fd:
    memfd = Fd(os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.write(memfd.fileno(), data)
    fcntl.fcntl(memfd.fileno(), fcntl.F_ADD_SEALS, seals)
    return memfd


def framed(document: bytes, *, magic: bytes = MAGIC, version: int = FORMATS[0]) -> bytes:
    return HEADER.pack(magic, version, zlib.crc32(document), len(document)) + document


def refusal(data: bytes) -> str:
    with memfd_of(data) as memfd, pytest.raises(ImageError) as caught:
        unseal(memfd)
    assert "image" == caught.value.item
    return str(caught.value)


def test_what_is_sealed_comes_back() -> None:
    """A manifest is equal after its trip through a memfd."""
    with seal(MANIFEST) as memfd:
        assert MANIFEST == unseal(memfd)


def test_an_image_cannot_change() -> None:
    """It is sealed against writing, growing and shrinking, and CLOEXEC."""
    with seal(MANIFEST) as memfd:
        assert SEALS == fcntl.fcntl(memfd.fileno(), fcntl.F_GET_SEALS) & SEALS
        assert fcntl.FD_CLOEXEC & fcntl.fcntl(memfd.fileno(), fcntl.F_GETFD)
        for change in (
            lambda: os.pwrite(memfd.fileno(), b"x", 0),
            lambda: os.truncate(memfd.fileno(), 1),
        ):
            with pytest.raises(PermissionError):
                change()


def test_the_file_offset_is_not_touched() -> None:
    """It belongs to every process that holds the memfd."""
    with seal(MANIFEST) as memfd:
        for offset in (0, 7, 10_000):
            os.lseek(memfd.fileno(), offset, os.SEEK_SET)
            unseal(memfd)

            assert offset == os.lseek(memfd.fileno(), 0, os.SEEK_CUR)


@pytest.mark.parametrize("name", IMAGES)
def test_a_released_image_is_read(name: str) -> None:
    """The committed image of each format decodes to what it was made of."""
    with memfd_of((STREAMS / f"{name}.bin").read_bytes()) as memfd:
        assert IMAGES[name] == unseal(memfd)


@pytest.mark.parametrize("name", IMAGES)
def test_the_formats_have_not_changed(name: str) -> None:
    """The same manifest gives the committed bytes: a change needs a new format number."""
    assert (STREAMS / f"{name}.bin").read_bytes() == image_bytes(IMAGES[name])


def test_the_format_is_as_old_as_can_be() -> None:
    """Only what version 0.1.0 cannot load has a number that it refuses."""
    assert [1, 2, 3, 4, 1] == [HEADER.unpack_from(image_bytes(m))[1] for m in IMAGES.values()]


# Refusals


@pytest.mark.parametrize("length", [0, 1, HEADER.size - 1, HEADER.size, HEADER.size + 1, -1])
def test_a_truncated_image(length: int) -> None:
    """At whatever place, the message says so."""
    assert "truncated" in refusal(image_bytes()[:length])


def test_a_longer_image() -> None:
    """Trailing bytes are as wrong as missing ones."""
    assert "bytes" in refusal(image_bytes() + b"x")


def test_flipped_bits() -> None:
    """A flip anywhere, header or document, is refused."""
    good = image_bytes()
    for index in range(len(good)):
        damaged = bytearray(good)
        damaged[index] ^= 1 << index % 8
        refusal(bytes(damaged))


def test_an_unknown_format() -> None:
    """It names both formats, and says that nothing is lost."""
    message = refusal(framed(b"\x80", version=FORMATS[-1] + 1))

    assert f"format {FORMATS[-1] + 1}" in message
    assert f"reads formats {', '.join(map(str, FORMATS))}" in message
    assert "image is kept" in message


def test_foreign_bytes() -> None:
    """The message shows how it begins."""
    assert "b'SOMEBODY'" in refusal(framed(b"\x80", magic=b"SOMEBODY"))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**62, 2**64 - 1])
def test_a_lying_length(length: int) -> None:
    """Nothing is allocated for a length that the file does not have."""
    document = msgspec.msgpack.encode(MANIFEST)
    header = HEADER.pack(MAGIC, FORMATS[0], zlib.crc32(document), length)

    assert "truncated" in refusal(header + document)


def test_a_length_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be read is not written either: the source finds out."""
    data = image_bytes()
    monkeypatch.setattr(image, "MAX_BYTES", 10)

    assert "limit 10" in refusal(data)
    with pytest.raises(ImageError, match=r"too large \(limit 10\)"):
        seal(MANIFEST)


def test_text_that_cannot_be_encoded() -> None:
    """The source gets an error of this library, so that it can drain instead."""
    with pytest.raises(ImageError, match="cannot be encoded"):
        seal(msgspec.structs.replace(MANIFEST, service="\udcff"))


def test_an_unsealed_memfd() -> None:
    """It could change while it is read."""
    for seals in (0, fcntl.F_SEAL_WRITE, SEALS & ~fcntl.F_SEAL_SHRINK):
        with memfd_of(image_bytes(), seals) as memfd, pytest.raises(ImageError, match="sealed"):
            unseal(memfd)


def test_what_is_no_memfd(tmp_path: Path) -> None:
    """A pipe, a socket, a file, a device, a directory."""
    reading, writing = os.pipe()
    left, right = socket.socketpair()
    (tmp_path / "file").write_bytes(image_bytes())
    others = [os.open(name, os.O_RDONLY) for name in (tmp_path / "file", "/dev/null", tmp_path)]
    numbers = [reading, writing, left.detach(), right.detach(), *others]
    for number in numbers:
        with Fd(number) as fd, pytest.raises(ImageError, match=r"not a memfd|not sealed"):
            unseal(fd)


def test_a_kind_of_a_later_version_is_read() -> None:
    """It makes no manifest unreadable: who loads it can name what it is."""
    entry = ["uplink", "a-later-kind", [105, 8192]]
    document = msgspec.msgpack.encode(Wrong(entries=[entry]))
    with memfd_of(framed(document, version=2)) as memfd:
        assert ["a-later-kind of 'uplink'"] == [str(each) for each in unseal(memfd).entries]


@dataclass
class Wrong:
    service: object = "web"
    generation: object = 1
    program: object = ""
    frozen_at: object = 0
    states: object = ()
    entries: object = ()


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (Wrong(service=1), "service"),
        (Wrong(generation="1"), "generation"),
        (Wrong(states=[1]), r"states\[0\]"),
        (Wrong(entries=[["http", 5, [1, 2]]]), r"entries\[0\]"),
        (Wrong(entries=[["http", "listener", [1]]]), r"entries\[0\]"),
        (Wrong(entries=[["http", "connection", [1, 2], 0, ["asleep"]]]), r"entries\[0\]"),
    ],
)
def test_wrong_types(wrong: Wrong, where: str) -> None:
    """The message names the place in the manifest."""
    assert re.search(
        rf"does not decode.*\$\.{where}", refusal(framed(msgspec.msgpack.encode(wrong)))
    )


def test_random_documents_raise_nothing_else() -> None:
    """Whatever stands in a document with a right checksum: ImageError, or a manifest."""
    source = random.Random(1)
    good = msgspec.msgpack.encode(MANIFEST)
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] = source.randrange(256)
        document = bytes(data[: source.randint(0, len(data) * 2)])
        with memfd_of(framed(document)) as memfd, contextlib.suppress(ImageError):
            assert isinstance(unseal(memfd), Manifest)
