# SPDX-License-Identifier: LGPL-2.1-or-later
"""Show what is in an image: a file, or what PID 1 holds for a unit, which it goes on holding.

The state itself is the author's and may be secret: only names, versions and sizes are told.
"""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from upgrader.errors import UpgradeError
from upgrader.protocol import image
from upgrader.protocol.channel import ParkedChannel
from upgrader.protocol.fd import Fd
from upgrader.protocol.image import Manifest
from upgrader.protocol.kinds import Kind
from upgrader.systemd.fdstore import Stored, StoreName
from upgrader.systemd.unit import Unit
from upgrader.tool import pid1_fd
from upgrader.tool.systemd_client import Systemd

_IMAGES = (Stored.CHANNEL, Stored.INSURANCE, Stored.ASIDE, Stored.IMAGE)


class DumpError(UpgradeError):
    """There is no image to look at."""


class NotAllowed(DumpError):
    """There is one, and this user may not look at it."""


class Part(msgspec.Struct, frozen=True):
    """A state: `version`, from which on it can be read, and its size in bytes."""

    name: str
    version: int
    readable_from: int
    bytes: int


class Dump(msgspec.Struct, frozen=True):
    """An image: what it is of, and what is in it. `where`: a path, or a name in the FD store."""

    where: str
    service: str
    generation: int
    program: str
    bytes: int
    states: list[Part] = []
    entries: list[dict[str, Any]] = []
    left_behind: list[dict[str, str]] = []
    parameters: dict[str, str] = {}


def of_file(path: str) -> Dump:
    """The image in a file; raises DumpError, or ImageError that says what is wrong with it."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DumpError(f"{path}: {error.strerror}") from error
    with Fd(os.memfd_create("upgrader-dump", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as memfd:
        os.write(memfd.fileno(), data)
        image.protect(memfd)
        return _dump(path, memfd, image.unseal(memfd))


def of_unit(systemd: Systemd, unit: Unit) -> list[Dump]:
    """All images that PID 1 holds for a unit; raises DumpError if they may not be looked at."""
    if unit.active_state == "activating" and not unit.retries:
        # A parked channel has one reader at a time: whoever starts would be refused.
        raise DumpError("it is starting, and reads its image itself now")
    found = []
    for name, inode in systemd.stored_inodes(unit).items():
        parsed = StoreName.parse(name)
        if parsed is not None and parsed.what in _IMAGES and parsed.item.isdecimal():
            with _from_pid1(name, inode) as fd:
                found.append(_look(name, parsed, fd))
    return found


def _look(name: str, parsed: StoreName, fd: Fd) -> Dump:
    if parsed.what in (Stored.ASIDE, Stored.IMAGE):
        return _dump(name, fd, image.unseal(fd))
    channel = ParkedChannel(fd.duplicate().socket(), name)
    try:
        if not channel.open():
            raise DumpError(f"{name} is spent")
        return _dump(name, channel.image, image.unseal(channel.image))
    finally:
        channel.close()


def _dump(where: str, memfd: Fd, manifest: Manifest) -> Dump:
    entries: Counter[tuple[str, str, str]] = Counter()
    for entry in manifest.entries:
        address = entry.identity.address if entry.connection is None else ""
        entries[(entry.backend, entry.kind, address)] += 1
    for crowd in manifest.crowds or ():
        entries[(crowd.backend, Kind.CONNECTION, "")] += len(crowd)
    return Dump(
        where=where,
        service=manifest.service,
        generation=manifest.generation,
        program=manifest.program,
        bytes=os.fstat(memfd.fileno()).st_size,
        states=[Part(s.name, s.version, s.readable_from, len(s.data)) for s in manifest.states],
        entries=[
            {"backend": backend, "kind": kind, "address": address, "count": count}
            for (backend, kind, address), count in entries.items()
        ],
        left_behind=[msgspec.structs.asdict(each) for each in manifest.left_behind],
        parameters=manifest.parameters or {},
    )


def _from_pid1(name: str, inode: int) -> Fd:
    """A duplicate of what PID 1 holds; raises NotAllowed, or DumpError."""
    try:
        return pid1_fd.duplicate(inode)
    except PermissionError as error:
        raise NotAllowed(
            f"{name}: this user may not look at what systemd holds",
            remedy="run the command as root, with sudo for instance",
        ) from error
    except FileNotFoundError as error:
        raise DumpError(f"{name} is no longer there") from error
