# SPDX-License-Identifier: LGPL-2.1-or-later
"""A file system in memory on MOUNTPOINT, with no library for it. Files can be made, written, read and
listed. The kernel's protocol: fuse(4), include/uapi/linux/fuse.h, of which this is version 7.31."""

import asyncio
import errno
import os
import stat
import struct
from dataclasses import field
from enum import IntEnum

import upgrader
from upgrader.backends import Fuse

HEADER = struct.Struct("<IIQQ16x")  # length, opcode, unique, node
ROOT, LARGEST = 1, 1 << 17
DIRECT_IO = 1  # each read comes here


class Op(IntEnum):
    LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE = 1, 2, 3, 4, 14, 15, 16
    RELEASE, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, CREATE = 18, 25, 26, 27, 28, 29, 35
    BATCH_FORGET = 42


@upgrader.state("files")
class Files:
    """`names[n]` is node n + 2, and `contents[n]` what is in it."""

    names: list[str] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)


class FileSystem:
    """Answers requests."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def attributes(self, node: int) -> bytes:
        size = 0 if node == ROOT else len(self.content(node))
        mode = stat.S_IFDIR | 0o755 if node == ROOT else stat.S_IFREG | 0o644
        return struct.pack("<2Q32x3I3I4I", node, size, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def content(self, node: int) -> bytes:
        try:
            return self.files.contents[node - 2]
        except IndexError:
            raise OSError(errno.ENOENT, "no such node") from None

    def entry(self, node: int) -> bytes:
        """Valid for no time at all: the kernel asks again."""
        return struct.pack("<4Q2I", node, 0, 0, 0, 0, 0) + self.attributes(node)

    def lookup(self, node: int, data: bytes) -> bytes:
        name = data.rstrip(b"\0").decode()
        if node != ROOT or name not in self.files.names:
            raise OSError(errno.ENOENT, name)
        return self.entry(self.files.names.index(name) + 2)

    def create(self, node: int, data: bytes) -> bytes:
        name = data[16:].rstrip(b"\0").decode()
        if name not in self.files.names:
            self.files.names.append(name)
            self.files.contents.append(b"")
        return self.entry(self.files.names.index(name) + 2) + struct.pack("<QII", 0, DIRECT_IO, 0)

    def set_attributes(self, node: int, data: bytes) -> bytes:
        valid, _, _, size = struct.unpack_from("<IIQQ", data)
        if valid & 8:  # FATTR_SIZE
            self.files.contents[node - 2] = self.content(node)[:size].ljust(size, b"\0")
        return struct.pack("<QII", 0, 0, 0) + self.attributes(node)

    def read(self, node: int, data: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", data)
        return self.content(node)[offset : offset + size]

    def write(self, node: int, data: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", data)
        before = self.content(node).ljust(offset, b"\0")
        after = data[40 : 40 + size]
        self.files.contents[node - 2] = before[:offset] + after + before[offset + size :]
        return struct.pack("<II", size, 0)

    def list(self, node: int, data: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", data)
        found = b""
        for number, name in list(enumerate(self.files.names))[offset:]:
            text = name.encode()
            item = (
                struct.pack("<QQII", number + 2, number + 1, len(text), stat.S_IFREG >> 12) + text
            )
            item += bytes(-len(item) % 8)
            if len(found + item) > size:
                break
            found += item
        return found

    def answer(self, opcode: int, node: int, data: bytes) -> bytes | None:
        """What comes back; None if nothing does. Raises OSError."""
        asked = {Op.LOOKUP: self.lookup, Op.SETATTR: self.set_attributes, Op.CREATE: self.create}
        asked |= {Op.READ: self.read, Op.WRITE: self.write, Op.READDIR: self.list}
        if opcode in asked:
            return asked[Op(opcode)](node, data)
        match opcode:
            case Op.INIT:  # no features; what may be read ahead, and written at once
                ahead = struct.unpack_from("<I", data, 8)[0]
                return struct.pack("<IIIIHHII36x", 7, 31, ahead, 0, 0, 0, LARGEST - 4096, 1)
            case Op.GETATTR:
                return struct.pack("<QII", 0, 0, 0) + self.attributes(node)
            case Op.OPEN | Op.OPENDIR:
                return struct.pack("<QII", 0, DIRECT_IO if opcode == Op.OPEN else 0, 0)
            case Op.RELEASE | Op.FLUSH | Op.RELEASEDIR:
                return b""
            case Op.FORGET | Op.BATCH_FORGET:
                return None
        raise OSError(errno.ENOSYS, "not here")


async def main() -> None:
    async with upgrader.attach("memfs") as instance:
        declared = instance.state(Files)
        fuse = instance.backend("files", Fuse(os.environ["MOUNTPOINT"], source="memfs"))

        def readable() -> None:
            try:
                request = os.read(fuse.fileno(), LARGEST)
            except BlockingIOError:  # whoever wanted it does not wait any more
                return
            _, opcode, unique, node = HEADER.unpack_from(request)
            try:
                found, code = FileSystem(declared.value).answer(opcode, node, request[40:]), 0
            except Exception as failed:  # no answer at all would have somebody wait for ever
                found, code = b"", getattr(failed, "errno", errno.EIO)
            if found is not None:
                os.write(fuse.fileno(), struct.pack("<IiQ", 16 + len(found), -code, unique) + found)

        async def serve() -> None:
            fuse.resend()  # what one that was killed has read, and has not answered
            asyncio.get_running_loop().add_reader(fuse.fileno(), readable)

        if await instance.serve([serve]) is upgrader.Ended.STOPPED:
            fuse.unmount()


asyncio.run(main())
