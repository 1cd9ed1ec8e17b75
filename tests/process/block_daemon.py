# SPDX-License-Identifier: LGPL-2.1-or-later
"""A vhost-user-blk daemon on a file: `python block_daemon.py '{"path": ..., "file": ..., "log": ...}'`.
QEMU, docs/interop/vhost-user.rst; the region of what is in flight is laid out as "Inflight I/O tracking" there says.

`region`: it keeps one; `hold`: after so many answers it takes every second request and does not answer it;
`lie`: what it does wrong, as the test says. The log has a line for each message, request, and request done again.
"""

import array
import json
import mmap
import os
import selectors
import socket
import struct
import sys
from contextlib import suppress
from typing import Any

OPTIONS: dict[str, Any] = {"region": True, "hold": None, "lie": "", **json.loads(sys.argv[1])}
LIE = OPTIONS["lie"]
FEATURES = 1 << 30 | 1 << 32 | 1 << 9
PROTOCOL = 1 << 3 | 1 << 9 | (1 << 12 if OPTIONS["region"] else 0)
HEADER = struct.Struct("<III")
#: Of the region: features, version, descriptors, last batch's head, used index; then each descriptor's.
REGION, STATE = struct.Struct("<QHHHH"), struct.Struct("<B5xHQ")


class Region:
    """What a daemon that is killed leaves to the next one."""

    def __init__(self, fd: int, size: int, offset: int) -> None:
        self.memory = memoryview(mmap.mmap(fd, size + offset))[offset:]
        self.numbers = self.memory.cast("H")

    @staticmethod
    def size(descriptors: int) -> int:
        return REGION.size + STATE.size * descriptors

    @property
    def used(self) -> int:
        return self.numbers[7]

    @used.setter
    def used(self, index: int) -> None:
        self.numbers[7] = index

    @property
    def last(self) -> int:
        return self.numbers[6]

    def take(self, head: int, order: int) -> None:
        place = REGION.size + head * STATE.size
        self.memory[place + 8 : place + 16] = struct.pack("<Q", order)
        self.memory[place] = 1

    def begin_answer(self, head: int) -> None:
        self.numbers[(REGION.size + head * STATE.size) // 2 + 3] = self.last
        self.numbers[6] = head

    def clear(self, head: int) -> None:
        self.memory[REGION.size + head * STATE.size] = 0

    def left(self, descriptors: int) -> list[int]:
        """What is in flight, in the order in which it came."""
        found = []
        for head in range(descriptors):
            taken, _, order = STATE.unpack_from(self.memory, REGION.size + head * STATE.size)
            if taken:
                found.append((order, head))
        return [head for _, head in sorted(found)]


class Daemon:
    """One connection after the other."""

    def __init__(self) -> None:
        self.log = open(OPTIONS["log"], "a", buffering=1)  # noqa: SIM115 (until it is killed)
        self.file = os.open(OPTIONS["file"], os.O_RDWR)
        self.done = 0

    def run(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            with suppress(FileNotFoundError):
                os.unlink(OPTIONS["path"])
            listener.bind(OPTIONS["path"])
            listener.listen()
            print("listening", flush=True)
            while True:
                with listener.accept()[0] as self.sock:
                    self.serve()

    def serve(self) -> None:
        self.region: Region | None = None
        self.order = self.used = 0
        self.memory, self.base, self.count = memoryview(b""), 0, 0
        with selectors.DefaultSelector() as self.watched:
            self.watched.register(self.sock, selectors.EVENT_READ, self.message)
            while True:
                for each, _ in self.watched.select():
                    if not each.data():
                        return

    # Messages

    def message(self) -> bool:
        """Take one; whether there was one."""
        data, ancillary, _, _ = self.sock.recvmsg(HEADER.size, socket.CMSG_SPACE(64))
        if not data:
            return False
        number, flags, size = HEADER.unpack(data)
        body = self.sock.recv(size, socket.MSG_WAITALL) if size else b""
        fds = [fd for _, _, found in ancillary for fd in array.array("i", found)]
        self.log.write(f"message {number}\n")
        answer, passed = self.perform(number, body, fds)
        if answer is None and flags & 8:
            answer = struct.pack("<Q", LIE == "refuse" and number == 5)
        if answer is not None and LIE not in ("silent", "close"):
            number, answer = (number + 1, answer) if LIE == "other" else (number, answer)
            answer = answer[:-4] if LIE == "size" else answer
            data = HEADER.pack(number, 5, len(answer)) + answer
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", passed))]
            self.sock.sendmsg([data], rights if passed else [])
        return LIE != "close"

    def perform(self, number: int, body: bytes, fds: list[int]) -> tuple[bytes | None, list[int]]:
        match number:
            case 1:
                return struct.pack("<Q", FEATURES & ~(LIE == "old" and 1 << 32)), []
            case 15:
                return struct.pack("<Q", PROTOCOL), []
            case 24:
                return body[:12] + struct.pack("<Q", os.fstat(self.file).st_size // 512), []
            case 31:
                size = Region.size(struct.unpack("<QQHH4x", body)[3])
                fd = os.memfd_create("region")
                os.truncate(fd, size)
                told = size * 2 if LIE == "region" else size
                return struct.pack("<QQ8s", told, 0, body[16:]), [] if LIE == "no fd" else [fd]
            case 32:
                size, offset = struct.unpack_from("<QQ", body)
                self.region = Region(fds[0], size, offset)
            case 5:
                _, _, _, size, self.base, offset = struct.unpack("<IIQQQQ", body)
                self.memory = memoryview(mmap.mmap(fds[0], size, offset=offset))
            case 8:
                self.count = struct.unpack("<II", body)[1]
            case 10:
                self.available = self.used = struct.unpack("<II", body)[1]
            case 9:
                places = struct.unpack("<8xQQQQ", body)[:3]
                self.at_desc, self.at_used, self.at_avail = (each - self.base for each in places)
                self.numbers = self.memory.cast("H")
            case 13:
                self.call = fds[0]
            case 12:
                self.kick = fds[0]
            case 18:
                self.start()
        return None, []

    # The ring

    def start(self) -> None:
        """Do again what was in flight, then go on."""
        if self.region:
            now = self.numbers[self.at_used // 2 + 1]
            if self.region.used != now:  # killed between the answer and the note of it
                self.region.clear(self.region.last)
                self.region.used = now
            for head in self.region.left(self.count):
                self.available = (self.available + 1) & 0xFFFF
                self.log.write(f"again {head}\n")
                self.answer(head)
        self.watched.register(self.kick, selectors.EVENT_READ, self.kicked)

    def kicked(self) -> bool:
        with suppress(BlockingIOError):
            os.eventfd_read(self.kick)
        while self.available != self.numbers[self.at_avail // 2 + 1]:
            head = self.numbers[self.at_avail // 2 + 2 + self.available % self.count]
            self.available = (self.available + 1) & 0xFFFF
            self.order += 1
            if self.region:
                self.region.take(head, self.order)
            hold = OPTIONS["hold"]
            if hold is not None and self.done >= hold and self.order % 2:
                self.log.write("held\n")
            else:
                self.answer(head)
        return True

    def answer(self, head: int) -> None:
        status = self.perform_request(head)
        self.done += 1
        if self.region:
            self.region.begin_answer(head)
        for _ in range(2 if LIE == "twice" else 1):
            place = self.at_used + 4 + self.used % self.count * 8
            told = {"foreign": 3, "inside": head + 1}.get(LIE, head)
            self.memory[place : place + 8] = struct.pack("<II", told, status)
            self.used = (self.used + 1) & 0xFFFF
            self.numbers[self.at_used // 2 + 1] = self.used
        if self.region:
            self.region.clear(head)
            self.region.used = self.used
        os.eventfd_write(self.call, 1)

    def perform_request(self, head: int) -> int:
        chain = []
        number, flags = head, 1
        while flags & 1:
            place = self.at_desc + number * 16
            address, length, flags, number = struct.unpack_from("<QIHH", self.memory, place)
            chain.append((address - self.base, length))
        operation, _, sector = struct.unpack_from("<IIQ", self.memory, chain[0][0])
        for at, length in chain[1:-1]:
            data = self.memory[at : at + length]
            if operation == 1:
                os.pwrite(self.file, data, sector * 512)
            else:
                data[:] = os.pread(self.file, length, sector * 512)
        if LIE != "no status":
            self.memory[chain[-1][0]] = 0
        self.log.write(f"did {operation} {sector}\n")
        return 1 + sum(length for _, length in chain[1:-1])


if __name__ == "__main__":
    Daemon().run()
