# SPDX-License-Identifier: LGPL-2.1-or-later
"""SecretMemory of its own for what crosses and must not be in an image: written once, read once.

It is made by memfd_secret(2) where the kernel has that: such memory is not mapped by the kernel itself,
is never swapped, and is read through no /proc/PID/mem. Else it is an ordinary memfd.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Mapping
from enum import StrEnum
from functools import cache

import msgspec

from upgrader.errors import ImageError
from upgrader.protocol.fd import Fd
from upgrader.protocol.tls_state import TlsSecrets

#: Largest content, in bytes; memory of this kind is locked, and RLIMIT_MEMLOCK bounds it.
MAX_BYTES = 16 << 20
_MEMFD_SECRET = 447  # on every architecture, as all system calls since 424
_SIZE = 8  # bytes of the length before the content


class SecretMemory(StrEnum):
    """What kind of memory secrets cross in."""

    SECRET = "secret"  #: memfd_secret(2)
    ORDINARY = "ordinary"  #: a memfd, which may be swapped out


@cache
def kind() -> SecretMemory:
    """Which kind there is here, found once. Below a filter of system calls it is not tried: one that the filter
    does not know may end the process."""
    with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
        if re.search(r"^Seccomp:\s*[^0\s]", file.read(), re.MULTILINE):
            return SecretMemory.ORDINARY
    number = _memfd_secret()
    if number < 0:
        return SecretMemory.ORDINARY
    os.close(number)
    return SecretMemory.SECRET


def write(secrets: Mapping[int, TlsSecrets]) -> Fd:
    """Put secrets into new memory, each under the place of its entry in the manifest. Raises OSError."""
    content = msgspec.msgpack.encode(secrets)
    number = _memfd_secret() if kind() is SecretMemory.SECRET else -1
    if number < 0:
        number = os.memfd_create("upgrader-secrets", os.MFD_CLOEXEC)
    fd = Fd(number)
    size = _SIZE + len(content)
    os.ftruncate(number, size)
    with mmap.mmap(number, size) as memory_map:
        memory_map[:_SIZE] = len(content).to_bytes(_SIZE, "big")
        memory_map[_SIZE:] = content
    return fd


def take(fd: Fd) -> dict[int, TlsSecrets]:
    """Read secrets, overwrite them and close the FD: there is nobody else to read them. Raises
    ImageError for anything else."""
    with fd:
        size = os.fstat(fd.fileno()).st_size
        if not _SIZE < size <= MAX_BYTES:
            raise ImageError("secrets", f"{size} bytes (limit {MAX_BYTES})")
        try:
            with mmap.mmap(fd.fileno(), size) as memory_map:
                content = memory_map[_SIZE:]
                length = int.from_bytes(memory_map[:_SIZE], "big")
                memory_map[:] = bytes(size)
        except OSError as error:
            raise ImageError("secrets", f"cannot be mapped: {error.strerror}") from error
        if length != len(content):
            raise ImageError("secrets", f"{len(content)} of {length} bytes")
        try:
            return msgspec.msgpack.decode(content, type=dict[int, TlsSecrets])
        except (msgspec.MsgspecError, ValueError) as error:
            raise ImageError("secrets", "do not decode") from error


def _memfd_secret() -> int:
    return int(ctypes.CDLL(None).syscall(_MEMFD_SECRET, os.O_CLOEXEC))
