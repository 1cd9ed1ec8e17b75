# SPDX-License-Identifier: LGPL-2.1-or-later
"""The values between a private systemd and its keeper: what it is made of, and what is reported."""

import msgspec


class File(msgspec.Struct, frozen=True):
    """A file that the root gets before its systemd starts."""

    path: str
    text: str
    mode: int = 0o644


class Plan(msgspec.Struct, frozen=True):
    """One private systemd, as its keeper needs it."""

    #: The root tree; only read, every write goes to memory.
    root: str
    #: Process whose end ends the machine.
    caller: int
    #: Directories on other file systems than `root` that are shown at their own path.
    layers: tuple[str, ...] = ()
    #: Paths that services without privileges must be able to reach.
    reachable: tuple[str, ...] = ()
    #: Directories whose files every user may read.
    readable: tuple[str, ...] = ()
    #: Files added to the root.
    files: tuple[File, ...] = ()
    #: A directory of the machine and the place in the root it is copied to.
    package: tuple[str, str] | None = None


class MachineStarted(msgspec.Struct, frozen=True, tag=True):
    """The process that becomes the inner PID 1 exists; `cgroup` is below the keeper's own mount."""

    pid: int
    cgroup: str


class MachineReady(msgspec.Struct, frozen=True, tag=True):
    """The inner PID 1 said READY=1: after a boot, but after a daemon-reload as well."""


class Stopping(msgspec.Struct, frozen=True, tag=True):
    """The inner PID 1 left its target: it is about to reboot (said by systemd 254 and later)."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The root could not be set up; `message` names the step."""

    message: str


class Gone(msgspec.Struct, frozen=True, tag=True):
    """The machine has ended; `leftover` names what could not be removed, `console` is its last output."""

    console: str
    status: int | None = None
    leftover: str = ""


MachineEvent = MachineStarted | MachineReady | Stopping | Failed | Gone
