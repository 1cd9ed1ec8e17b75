# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loading an instance: finds the image, checks all of it against the declarations, claims it.

Nothing is consumed and no received FD is touched before `LoadedInstance.commit`: until then a failure of
any kind, this process killed included, leaves the image as it was for the next attempt.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections import Counter
from typing import TYPE_CHECKING

from upgrader.errors import ImageError, MismatchError
from upgrader.instance.commit import LoadedInstance
from upgrader.instance.open_sockets import Opening
from upgrader.protocol.fd import Fd
from upgrader.protocol.kinds import Kind
from upgrader.protocol.later import later
from upgrader.protocol.status_text import Origin, Status
from upgrader.systemd.fdstore import FdStore, Stored, StoreName
from upgrader.systemd.listen_fds import Passed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from upgrader.instance import (
        check_image,
        choose_image,
        foreign_fds,
        gap,
        load_connections,
        load_tls,
        open_backends,
    )
    from upgrader.instance.declarations import Declarations
    from upgrader.instance.interfaces import Closeable
    from upgrader.instance.live_destination import LiveDestination
    from upgrader.protocol import (
        connection_secrets,
        identity,
        image,
        records,
        state_codec,
        state_shape,
        table_reader,
    )
    from upgrader.protocol.channel import ReceivedImage
    from upgrader.protocol.parameters import Parameters
else:
    check_image = later("upgrader.instance.check_image", loading=True)
    choose_image = later("upgrader.instance.choose_image")
    foreign_fds = later("upgrader.instance.foreign_fds", loading=True)
    gap = later("upgrader.instance.gap", loading=True)
    connection_secrets = later("upgrader.protocol.connection_secrets", loading=True)
    load_connections = later("upgrader.instance.load_connections", loading=True)
    load_tls = later("upgrader.instance.load_tls", loading=True)
    open_backends = later("upgrader.instance.open_backends", loading=True)
    identity = later("upgrader.protocol.identity", loading=True)
    image = later("upgrader.protocol.image", loading=True)
    records = later("upgrader.protocol.records", loading=True)
    state_codec = later("upgrader.protocol.state_codec", loading=True)
    state_shape = later("upgrader.protocol.state_shape", loading=True)
    table_reader = later("upgrader.protocol.table_reader", loading=True)

_NAMED = 20  # items of one kind that are named in the log before only their number is
_LONGEST = 200  # characters of a reason that is counted
_LISTED = 100  # fields that were dropped, in what is said of how it was loaded
_log = logging.getLogger("upgrader")


class Loader:
    """Loads one instance from what PID 1 passed."""

    def __init__(
        self,
        declarations: Declarations,
        parameters: Parameters,
        store: FdStore,
        passed: Sequence[Passed],
        migration: LiveDestination | None = None,
        *,
        executed: bool = False,
        unit: str = "",
    ) -> None:
        """`executed`: what was passed has come through an execve(2), not from PID 1; `unit`: the
        name of this one, empty outside of systemd."""
        self._declarations = declarations
        self._parameters = parameters
        self._store = store
        self._migration = migration
        self._executed = executed
        self._loaded = LoadedInstance()
        self._was_passed: frozenset[str] = frozenset()
        self._dropped: dict[str, set[str]] = {}  # unknown fields, by the state that they are of
        self._opened: list[Closeable] = []  # to be closed by a refusal
        self._opening = Opening(declarations, self._loaded, unit, self._opened)
        self._channels: list[Passed] = []
        for item in passed:
            name = StoreName.parse(item.name)
            if name and name.what in (Stored.CHANNEL, Stored.INSURANCE):
                self._channels.append(item)
            else:
                self._opening.add(item)
        declarations.activated = [str(item) for item in self._opening.others if item.is_socket]

    def load(self) -> LoadedInstance:
        """Load everything; raises UpgradeError, consuming nothing and leaving nothing open."""
        try:
            return self._load()
        except BaseException:
            for owner in self._opened:
                owner.close()
            raise

    def _load(self) -> LoadedInstance:
        channel = None
        stored = self._opening.stored
        if stored:
            foreign_fds.set_aside(
                stored, self._opening.repeated, self._declarations.backends.values(), self._loaded
            )
        if self._channels or stored:
            parked = choose_image.ParkedImages(
                self._parameters, self._store, self._channels, stored, self._loaded, self._opened
            )
            channel = parked.choose()
            self._loaded.status = parked.status
        received: dict[str, tuple[image.ManifestEntry, socket.socket]] = {}
        if self._migration:
            for declared in self._declarations.states.values():
                declared.description.prepare()
            self._migration.take(
                self.offer(),
                lambda stream: received.update(self._load_image(stream, Origin.LIVE)),
                self._tables.add,
            )
            self._loaded.migration = self._migration
        elif channel:
            came_by = Origin.EXEC if self._executed else choose_image.origin(channel)
            received = self._load_image(channel.peek(), came_by)
            self._loaded.channel = channel
        for declared in self._declarations.states.values():
            if not declared.filled:
                declared.fill(None)
        for bound in self._declarations.sockets.values():
            self._opening.open(
                bound, received.get(bound.name), moved=self._unpassed,
                passed=bound.name in self._was_passed,
            )  # fmt: skip
        for name, backend in self._declarations.backends.items():
            open_backends.open_backend(
                backend, self._opening.stored, self._loaded, self._opened,
                transfers=self._parameters.transfers(name),
            )  # fmt: skip
        self._declarations.take_passed(self._opening.others, self._opening.kept())
        # What belongs to an image goes with it.
        kept = {channel.name, *channel.others} if channel else set()
        self._loaded.unwanted += [
            n for n in self._opening.stored if n.what is not Stored.ASIDE and str(n) not in kept
        ]
        return self._loaded

    @property
    def _unpassed(self) -> bool:
        """PID 1 has passed nothing to this process: the source's word counts for what it had."""
        return self._executed or self._migration is not None

    # Loading an image

    def offer(self) -> dict[str, Any]:
        """What this program can load: asked before the source is disturbed."""
        declared = self._declarations
        return {
            "stream": records.VERSIONS[0],  # the only one that an instance of interface 1 takes
            "streams": list(records.VERSIONS),
            "image": image.FORMATS[0],  # likewise
            "images": list(image.FORMATS),
            "states": {name: known.description.version for name, known in declared.states.items()},
            "sessions": {
                listener: header.version for listener, header in declared.sessions().items()
            },
            "kinds": sorted(Kind),  # version 0.1.0 does not say, and knows the first three
            "backends": sorted({*declared.names, *declared.dropped}),
            "backend_kinds": {name: each.kind.kind for name, each in declared.backends.items()},
            "kind_versions": {
                each.kind.kind: each.kind.version for each in declared.backends.values()
            },
            "tls": {name: each.trust for name, each in declared.moving_tls().items()},
            "speak_tls": [name for name, each in declared.protocols.items() if each.tls],
            "tables": {
                f"{name}.{field}": table_reader.oldest_version(known.description)
                for name, known in declared.states.items()
                for field in known.description.tables
            },
            "withheld": sorted(n for n in declared.names if not self._parameters.transfers(n)),
        }

    @functools.cached_property
    def _tables(self) -> table_reader.TableReader:
        """What comes of tables before an image, or with it."""
        states = self._declarations.states
        return table_reader.TableReader({n: each.description for n, each in states.items()})

    def _load_image(
        self, stream: ReceivedImage, origin: Origin
    ) -> dict[str, tuple[image.ManifestEntry, socket.socket]]:
        manifest = image.unseal(stream.image)
        self._declarations.generation = manifest.generation + 1
        # Thousands of them may be connections, which are loaded apart.
        single = [(i, e) for i, e in enumerate(manifest.entries) if e.connection is None]
        check_image.check(self._declarations, manifest, stream, [entry for _, entry in single])
        self._loaded.overrides = manifest.parameters or {}
        if self._executed:  # what was before the execve(2) cannot give up its insurance any more
            older = StoreName(Stored.INSURANCE, str(manifest.generation - 1))
            self._loaded.unwanted.append(older)
        for index, entry in single:
            if entry.kind == Kind.TABLE and index < len(stream.fds):
                self._tables.add(stream.fds[index])
        self._load_states(manifest)
        if self._unpassed:
            self._declarations.activated = list(manifest.activated or ())
            self._was_passed = frozenset(manifest.passed or ())
        bound: dict[str, tuple[image.ManifestEntry, socket.socket]] = {}
        backends: dict[str, open_backends.Received] = {}
        connections = load_connections.ConnectionLoader(
            self._declarations, self._parameters, manifest, self._dropped,
            self._migration.progress if self._migration else lambda loaded: None,
            load_tls.take(manifest, stream.fds, self._declarations) if manifest.tls else {},
            self._own,
        )  # fmt: skip
        self._opened.append(stream.fds)
        for index, entry in single:
            if index >= len(stream.fds) or entry.kind in (Kind.SECRETS, Kind.TABLE):
                continue
            fd = stream.fds[index]
            if entry.kind == Kind.PASSED:
                if identity.identify(fd) != entry.identity:
                    raise MismatchError(str(entry), entry.identity, identity.identify(fd))
                self._opening.add(Passed(entry.backend, fd))
                continue
            if self._migration:
                self._migration.progress(index)
            if entry.is_declared_by_kind:
                backends.setdefault(entry.backend, open_backends.Received()).add(entry, fd)
                continue
            sock = _as_socket(entry, fd)
            self._own(sock)
            if entry.backend in self._declarations.dropped:
                sock.close()
                if self._unpassed:
                    # What PID 1 keeps of it is a listener behind which clients would wait for nobody.
                    stored = StoreName.of_backend(entry.kind, entry.backend, 0)
                    self._loaded.unwanted.append(stored)
                continue
            bound[entry.backend] = entry, sock
        connections.load(stream.fds)
        self._loaded.adopted, self._loaded.crowds = connections.adopted, connections.crowds
        self._load_secrets(manifest.generation)
        withheld = connections.withheld + self._load_backends(manifest, backends)
        dropped = self._tell_dropped()
        left = (
            manifest.left_behind
            + withheld
            + [
                image.LeftBehind(e.backend, str(e), stream.reason or "the source was killed")
                for e in manifest.entries[len(stream.fds) :]
            ]
        )
        for item in left[:_NAMED]:
            _log.warning("left behind: %s of %r: %s", item.what, item.backend, item.why)
        if len(left) > _NAMED:
            _log.warning("%d were left behind in all", len(left))
        if origin is not Origin.INSURANCE:  # there, somebody else has served since
            self._loaded.frozen_at = manifest.frozen_at
            if manifest.drops:
                self._loaded.gap = gap.Gap(self._declarations, manifest.drops)
        self._loaded.stayed = dict(
            Counter(item.why[:_LONGEST] for item in left).most_common(_NAMED)
        )
        known = self._declarations.states
        tables = self._tables.bytes if "_tables" in vars(self) else 0  # loaded if any have come
        self._loaded.status = Status(
            manifest.generation + 1,
            origin,
            manifest.generation,
            len(stream.fds),
            os.fstat(stream.image.fileno()).st_size + tables,
            len(left),
            dropped=tuple(dropped[:_LISTED]),
            unsaved=tuple(name for name in manifest.unsaved or () if name in known),
        )
        return bound

    def _own(self, owner: Closeable) -> None:
        """Close it if this instance is refused, and in forked processes before the commit."""
        self._opened.append(owner)
        if self._migration:
            self._migration.fence.add(owner)

    def _load_backends(
        self, manifest: image.Manifest, received: Mapping[str, open_backends.Received]
    ) -> list[image.LeftBehind]:
        """Verify the backends of other kinds than sockets; returns those that are opened anew."""
        left = []
        for name, came in received.items():
            kind = came.entries[0].kind
            sent = sum(entry.backend == name for entry in manifest.entries)
            if name in self._declarations.dropped or len(came.fds) < sent:
                pass  # it is declared no more, or what did not come is told below
            elif not self._parameters.transfers(name):
                left.append(image.LeftBehind(name, kind, "backend-transfer=no"))
            else:
                backend = self._declarations.backends[name]
                why = open_backends.load_received(backend, came, manifest)
                if not why:
                    self._loaded.backends.append(backend)
                    continue
                left.append(image.LeftBehind(name, kind, why))
            for number, fd in enumerate(came.fds):
                fd.close()
                if self._unpassed:  # else it is among what PID 1 has passed
                    self._loaded.unwanted.append(StoreName.of_kind(kind, name, number))
        return left

    def _load_states(self, manifest: image.Manifest) -> None:
        for saved in manifest.states:
            if self._migration:
                self._migration.progress(0)
            if declared := self._declarations.states.get(saved.name):
                fill = functools.partial(self._tables.fill, saved) if saved.tables else None
                value, unknown = state_codec.load(declared.cls, saved, fill)
                declared.fill(value)
                if unknown:
                    self._dropped.setdefault(declared.description.item, set()).update(unknown)

    def _load_secrets(self, generation: int) -> None:
        """What goes with the connections of this image and was not in it. A connection whose secret
        cannot be read does not go on; nothing else is lost by that."""
        fd = self._opening.stored.get(StoreName.of_secrets(generation))
        if fd is None:
            return
        self._loaded.secrets = fd
        try:
            secrets = connection_secrets.read(fd)
        except ImageError as error:
            _log.error("%s", error)
            return
        for adopted in self._loaded.adopted:
            adopted.secret = secrets.get(adopted.identity.inode, b"")

    def _tell_dropped(self) -> list[str]:
        """Name the fields that this version does not know; returns all of them."""
        dropped = []
        for item, fields in self._dropped.items():
            names = sorted(fields)
            dropped += [f"{item}: {name}" for name in names]
            _log.warning(
                "%s: dropped, unknown to this version: %s", item, state_shape.name_some(names)
            )
        return dropped


def _as_socket(entry: image.ManifestEntry, fd: Fd) -> socket.socket:
    """The socket of an entry; raises MismatchError unless it is the one that the manifest says."""
    said = entry.identity
    # Told what it is, the socket object asks the kernel nothing; `identify` does, once.
    try:
        sock = socket.socket(said.family, said.type, 0, fileno=fd.fileno())
    except OSError:
        raise MismatchError(str(entry), said, identity.identify(fd)) from None
    fd.detach()
    if not identity.is_socket(sock, said):
        with Fd(sock.detach()) as found_fd:
            found = identity.identify(found_fd)
        raise MismatchError(str(entry), said, found)
    return sock
