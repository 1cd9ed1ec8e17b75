# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an instance says of itself on its socket, as values; the tool reads the same ones.

Every field has a default, so that a tool of another version can read what it knows.
"""

import msgspec

from upgrader.protocol.phase import Decision, Phase

#: Of the interface that this library speaks; an instance that does not say has 1.
VERSION = 2


class Backend(msgspec.Struct, frozen=True):
    """A declared backend: its FD, and how many connections it has. `transfer`: whether it moves, or
    those do if it is a listener.

    There may be several sockets: `addresses` and `inodes` are of all, and the rest is of the first.
    Of another kind than sockets: `size` in bytes, the facts that were `verified` when it moved here,
    and `text` for people.
    """

    name: str
    kind: str = ""
    fd: int = -1
    address: str = ""
    inode: int = 0
    addresses: list[str] = []
    inodes: list[int] = []
    transfer: bool = True
    connections: int = 0
    busy: int = 0
    size: int = 0
    verified: list[str] = []
    text: str = ""


class Connection(msgspec.Struct, frozen=True):
    """An open connection; `age`: seconds in this process; `waiting`: its safe point, or nothing;
    `what`: what it is at, where the library that owns it says so."""

    backend: str
    peer: str = ""
    fd: int = -1
    age: float = 0.0
    waiting: str = ""
    what: str = ""


class Migration(msgspec.Struct, frozen=True):
    """The migration under way, or the last one, as this side of it knows it.

    `source` and `destination` are generations; `began` is seconds since the epoch, `seconds` how
    long it has taken, `times` how long each phase before this one, `pause` how long nobody served;
    `reason` says why it failed; `preflight`: it was to end before its commit. `round`: which one of its
    tables, from 1 on; by then, `copied` bytes of them, and about as many as `left` have changed since.
    """

    phase: Phase = Phase.NONE
    mode: str = ""
    source: int = 0
    destination: int = 0
    pid: int = 0
    began: float = 0.0
    seconds: float = 0.0
    pause: float = 0.0
    fds: int = 0
    bytes: int = 0
    left_behind: int = 0
    reason: str = ""
    times: dict[str, float] = {}
    preflight: bool = False
    round: int = 0
    copied: int = 0
    left: int = 0


class Last(msgspec.Struct, frozen=True):
    """The last upgrade that an instance had a part in, and how it was decided.

    `id` is that of the upgrade, empty if nobody gave it one; `side` is "source" or "destination";
    `code` (see `codes.Code`) and `reason` say why it was aborted; `pause` is how many seconds nobody
    served; `source` and `destination` are generations.
    """

    id: str = ""
    side: str = ""
    decision: Decision = Decision.NONE
    code: str = ""
    reason: str = ""
    mode: str = ""
    pause: float = 0.0
    fds: int = 0
    bytes: int = 0
    left_behind: int = 0
    source: int = 0
    destination: int = 0


class Loaded(msgspec.Struct, frozen=True):
    """How an instance came to be: where its backends and state are from, and what crossed.

    `origin` is a `systemd.status.Origin`; `source` is the generation that it was loaded from, and
    `set_aside` that of an image that was not loaded, 0 if there is none; `bytes` is the size of the
    image; for `pause` seconds nobody served. `dropped` are fields of states that this version does not
    know, and `unsaved` states that the source could not save, so that they began anew.
    `datagrams_lost` came in the pause and did not fit into the receive buffer. `stayed` counts what was
    left behind by the reason, at most 20 of them.
    """

    origin: str = ""
    source: int = 0
    fds: int = 0
    bytes: int = 0
    left_behind: int = 0
    set_aside: int = 0
    pause: float = 0.0
    dropped: list[str] = []
    unsaved: list[str] = []
    datagrams_lost: int = 0
    stayed: dict[str, int] = {}


class Refusal(msgspec.Struct, frozen=True):
    """The last version that did not take over, by its own fault.

    `fingerprint` names the files of the program as they were on disk then; `since` is seconds since
    the epoch.
    """

    id: str = ""
    code: str = ""
    reason: str = ""
    fingerprint: str = ""
    since: float = 0.0


class Started(msgspec.Struct, frozen=True):
    """What PID 1 gave to an instance at its start, for takeover, which must give it to the next.

    `activated`: what `.socket` units passed, as `show_socket` writes it, None if it does not
    say; `credentials`: names; `memory`: bytes that are its own by now; `settings` and `command`: what
    the unit had it made from, each in one checksum, empty if it does not know; `environment`: its
    variables in checksums; `direct`: whether it was itself that command, or started by it; `cache`:
    bytes of files that the kernel keeps for the unit, and gives up if memory is needed.
    """

    activated: list[str] | None = None
    credentials: list[str] = []
    memory: int = 0
    settings: str = ""
    command: str = ""
    environment: dict[str, str] = {}
    direct: bool = True
    cache: int = 0


class Trial(msgspec.Struct, frozen=True):
    """What came of saving a state, only to see whether it can be done.

    `bytes`: its size; `seconds`: how long it takes, which is part of every pause; `at`: when that
    was, in seconds since the epoch; `problem`: what cannot be saved, and why, or nothing; `unreadable`: what
    this version could not load again, and why, or nothing; `altered`: what it would load as something else,
    or not at all. Larger states than 1 MiB are not loaded again.
    """

    name: str
    version: int = 0
    bytes: int = 0
    seconds: float = 0.0
    at: float = 0.0
    problem: str = ""
    unreadable: str = ""
    altered: list[str] = []


class RunProgram(msgspec.Struct, frozen=True):
    """A program of a runner. `replaced`: it drains; `processes`: of it and below it; `memory`: bytes that
    are their own; `offers`: what its adapter has found that the program could do; `deleted`: the path of the
    file that it runs, if that was replaced or removed on disk since; `sockets`: paths of those that its adapter
    has made for it alone; `may_end`: its end with status 0 is that of the unit."""

    pid: int
    replaced: bool = False
    processes: int = 1
    memory: int = 0
    offers: list[str] = []
    deleted: str = ""
    sockets: list[str] = []
    may_end: bool = False


class ReplayCounts(msgspec.Struct, frozen=True):
    """Handlers of connections without an end that move. Here: `moved` began anew and go on, `refused` did
    not, and their clients dial again, `waiting` are still to begin. `suspended`: of connections that have
    moved away, and never go on; `lost`: messages that these wanted to send since."""

    moved: int = 0
    refused: int = 0
    waiting: int = 0
    suspended: int = 0
    lost: int = 0


class Description(msgspec.Struct, frozen=True):
    """One instance. `since`: seconds since the epoch at which it began to serve; `can`: what it can
    reach, of `bus` (systemd) and `journal`, None if it does not say; `changed`: files of the program
    that are others now; `reread`: files that are, and that a reload reads anew; `late`: modules that
    were imported after it was ready; `expected`: the next reload is an upgrade, with the id `upgrade`,
    or its `preflight` (`rehearsal`, to takeovers of interface 1); `overrides`: what was set at run
    time; `fingerprint` names the files of the program as they are on disk now; `last_upgrade`: the
    last migration that was done or has failed, and was no preflight; `drains_until`: when it cuts what
    it still drains, in seconds since the epoch, 0 if it was not replaced; `programs`: of a runner, the
    one that serves first; `partial`: it is only what everybody may know; `tls_memory`: in which the keys
    of TLS connections cross, `secret` or `ordinary` (which may be swapped out), empty if none do;
    `preflight_first`: an upgrade begins with a preflight, unless its wish says otherwise;
    `replays`: handlers of WebSockets that move."""

    service: str
    version: str = ""
    unit: str = ""
    pid: int = 0
    generation: int = 0
    phase: str = ""
    library: str = ""
    since: float = 0.0
    credentials: str = ""
    can: list[str] | None = None
    changed: list[str] = []
    reread: list[str] = []
    late: list[str] = []
    expected: bool = False
    upgrade: str = ""
    preflight: bool = False
    rehearsal: bool = False
    states: dict[str, int] = {}
    trials: list[Trial] = []
    backends: list[Backend] = []
    connections: int = 0
    held: list[Connection] = []
    parameters: dict[str, str] = {}
    overrides: dict[str, str] = {}
    migration: Migration = Migration()
    started: Started = Started()
    interface: int = 1
    last: Last = Last()
    loaded: Loaded = Loaded()
    refused: Refusal = Refusal()
    fingerprint: str = ""
    last_upgrade: Migration = Migration()
    drains_until: float = 0.0
    programs: list[RunProgram] = []
    partial: bool = False
    tls_memory: str = ""
    preflight_first: bool = False
    replays: ReplayCounts = ReplayCounts()
