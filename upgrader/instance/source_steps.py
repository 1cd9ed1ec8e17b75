# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the actions of a switchover mean for an instance that is the source."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from upgrader.codes import Code
from upgrader.instance import save
from upgrader.instance.frozen import Built, gather, in_crowds
from upgrader.protocol import image, phase, state_codec
from upgrader.protocol.identity import HasFileno
from upgrader.protocol.kinds import Standing
from upgrader.systemd import own_unit
from upgrader.systemd.fdstore import Stored, StoreName

if TYPE_CHECKING:
    from upgrader.instance.interfaces import Loop
    from upgrader.instance.rounds import Rounds
    from upgrader.instance.source_side import SourceSide

_TO_SERVE = 0.1  # seconds that a new owner has before this instance insures it


class SourceSteps:
    """What the actions of a switchover mean for an instance; implements `live_source.Steps`."""

    def __init__(self, side: SourceSide, loop: Loop, copied: Rounds | None) -> None:
        self._side = side
        self._copied = copied
        self._report = side.report
        self._loop = loop
        self._built: Built | None = None
        self._watchdog = ("WATCHDOG=1",) if side.watchdog else ()

    def record(self) -> None:
        """Begin with the tables."""
        if self._copied:
            self._copied.begin()

    def freeze(self) -> Built:
        """Build the image."""
        progress = self._report.progress
        progress.enter(phase.Phase.FROZEN)
        negotiation = self._side.answering.negotiation
        readers = negotiation.offer.readers if negotiation else None
        moving, busy = self._loop.freeze()
        takes = in_crowds(self._side.declarations, readers) if readers else ()
        connections, crowds = gather(moving, takes)
        takes_passed = negotiation is not None and negotiation.offer.takes_passed
        beyond: list[tuple[str, HasFileno]] = []
        if takes_passed:
            secrets = save.secrets(self._report.generation, connections)
            beyond = self._side.declarations.beyond_image()
            beyond += [(str(name), fd) for name, fd in secrets]
        else:
            why = "the library of the new version does not take it"
            here = self._side.declarations
            busy += [image.LeftBehind(item.name, "FD", why) for item in here.passed]
        pieces = self._copied.finish() if self._copied else []
        manifest, fds = self._side.build(
            connections, busy, readers, beyond=beyond, copied=self._copied
        )
        self._built = built = Built(manifest, fds, pieces, crowds)
        count, left = built.count, len(manifest.left_behind)
        progress.enter(phase.Phase.LOADING, fds=count, left_behind=left)
        return built

    def resume(self, code: Code, reason: str) -> None:
        """Serve on, then say so."""
        if self._copied:
            self._copied.end()
        if self._built:
            self._side.guard(self._built.manifest)
        self._loop.resume()
        if code is Code.STATE_UNREADABLE and (why := self._report.unreadable):
            code, reason = Code.SOURCE_FAILED, why  # no fault of the version that was to load it
        self._side.serve_on(code, reason)

    def retire(self) -> None:
        """The states are another instance's from here on."""
        report = self._report
        pause = time.clock_gettime(time.CLOCK_MONOTONIC) - self._image.manifest.frozen_at / 1e9
        report.progress.enter(phase.Phase.COMMITTED, pause=round(pause, 6))
        report.standing = Standing.DRAINING
        self._side.retire(self._image.manifest)
        self._loop.give_up()

    def insure(self) -> None:
        """Leave what may be replayed; what the instance before has left is older. The destination serves
        first: until it does, PID 1 would only be in its way."""
        if negotiation := self._side.answering.negotiation:
            negotiation.wait_returned(_TO_SERVE)
        backends = self._side.declarations.backends.values()
        once = {each.name for each in backends if not each.kind.replayable}
        pieces = [piece.memfd for piece in self._copied.pieces] if self._copied else []
        manifest, fds = save.insurance(self._image.manifest, self._image.fds, once, pieces)
        try:
            self._park(manifest, fds, Stored.INSURANCE, whole=bool(pieces))
        finally:
            for piece in pieces:
                piece.close()
        self._side.destination.forget_insurance()

    def name_successor(self, pid: int) -> None:
        """Tell PID 1, and wait until it has taken that."""
        notifier = self._report.notifier
        notifier.send(f"MAINPID={pid}", *self._watchdog)
        notifier.barrier()

    def let_go(self) -> None:
        """Close what has moved: everything is another instance's, and PID 1 knows."""
        self._loop.let_go()
        for backend in self._side.declarations.backends.values():
            if backend.moved:
                self._side.outlive += backend.processes()
                backend.close()
        self._done("retired")

    def park(self) -> None:
        """Leave everything with PID 1, or nothing if the unit is stopped for good."""
        self._done("parked")
        if own_unit.ask(self._report.unit).reason is own_unit.StopReason.STOP:
            self._side.store.remove(self._name(Stored.INSURANCE))
        else:
            manifest, fds = save.lasting(self._with_tables(), self._image.fds)
            manifest, fds = save.one_by_one(manifest, fds, self._image.crowds)
            self._park(manifest, fds, Stored.CHANNEL)

    def _with_tables(self) -> image.Manifest:
        """The image with its tables: nobody has written to those since."""
        manifest, declared = self._image.manifest, self._side.declarations.states
        states = [
            state_codec.save(declared[each.name].value) if each.tables else each
            for each in manifest.states
        ]
        return msgspec.structs.replace(manifest, states=states)

    def exit(self, *, failed: bool) -> None:
        """Have the process end as soon as `attach` is left."""
        self._side.frozen = True
        self._side.exit_status = int(failed)

    def wake(self) -> None:
        """Send the sign of life that the author's own code cannot send now."""
        if self._watchdog:
            self._report.notifier.send(*self._watchdog)

    @property
    def _image(self) -> Built:
        assert self._built is not None
        return self._built

    def _park(
        self,
        manifest: image.Manifest,
        fds: Sequence[HasFileno],
        what: Stored,
        *,
        whole: bool = False,
    ) -> None:
        store, unit = self._side.store, self._report.unit
        save.park(manifest, fds, self._name(what), store, unit, whole=whole)

    def _name(self, what: Stored) -> StoreName:
        return StoreName(what, str(self._report.generation))

    def _done(self, how: str) -> None:
        report = self._report
        report.progress.enter(phase.Phase.DONE)
        message = f"generation {report.generation} has been replaced, {how}"
        report.done("source", "migrate", message)
