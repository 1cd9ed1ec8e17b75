# SPDX-License-Identifier: LGPL-2.1-or-later
"""A model of a live migration with all four who take part: source, destination, takeover, PID 1.

Source and destination do what the tables of `upgrader.protocol.switchover` say; what is written down here
is only what an action does to the world, how takeover and PID 1 behave, and how an owner ends that
is stopped outside of a switchover. `successors` gives everything that can happen next: in a world
of tuples, so that all of it can be explored.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from upgrader.protocol.switchover import (
    DESTINATION,
    SOURCE,
    Destination,
    DestinationAction,
    Event,
    Source,
    SourceAction,
    Table,
    step,
)


class Process(StrEnum):
    UP = "up"
    ZOMBIE = "zombie"  # dead, and PID 1 has not noticed
    GONE = "gone"


class Channel(StrEnum):
    """The source's end."""

    OPEN = "open"
    SHUT = "shut"  # SHUT_RD: what is queued is still read, nothing more comes in
    CLOSED = "closed"


class Step(StrEnum):
    """How far takeover has come."""

    START = "start"
    REGISTERED = "registered"
    FOLLOW = "follow"
    CLEAN = "clean up"
    KILL = "kill"
    CONFIRM = "confirm"


class Unit(StrEnum):
    """PID 1's view of the service."""

    RELOAD = "reload"
    RUNNING = "running"
    STOPPING = "stop-sigterm"
    FINAL = "final-sigterm"
    STOPPED = "stopped"
    RESTARTED = "restarted"


class SourceSide(NamedTuple):
    process: Process = Process.UP
    at: Source = Source.SERVING
    todo: tuple[SourceAction, ...] = ()
    found: Event | None = None  # by its own last action
    serving: bool = True
    retired: bool = False  # writes no state, touches nothing that has moved
    let_go: bool = False  # has closed what has moved
    told: bool = False  # SIGTERM, not yet acted upon
    naming: bool = False  # waits for PID 1's answer
    asked: bool = False  # has sent PID 1 what it wants stored, or removed
    channel: Channel = Channel.OPEN
    pieces: int = 0  # of tables, that were sent
    registered: bool = False
    migrating: bool = False


class DestinationSide(NamedTuple):
    process: Process = Process.UP
    at: Destination = Destination.PREPARING
    todo: tuple[DestinationAction | SourceAction, ...] = ()
    found: Event | None = None
    held: bool = True  # by takeover, before execve
    called: bool = False
    serving: bool = False
    told: bool = False
    asked: bool = False
    hung: bool = False
    said: str = ""  # to takeover
    chatted: bool = False  # has said something that it need not say
    trusted: bool = False  # has given up the insurance
    ended: bool = False  # has acted upon SIGTERM as the owner


class TakeoverSide(NamedTuple):
    process: Process = Process.UP
    at: Step = Step.START
    line: bool = True  # its end of the line to the destination is open
    released: bool = False  # the destination, after it was registered
    told: bool = False


class Pid1(NamedTuple):
    unit: Unit = Unit.RELOAD
    main: str = "source"
    failed: bool = False  # its main process did: the unit is stopped as soon as no reload runs
    job: str = ""
    queue: tuple[tuple[str, str], ...] = ()  # notifications: sender, what
    store: frozenset[str] = frozenset()
    loaded: str = ""  # what the instance started by Restart= has loaded


class World(NamedTuple):
    source: SourceSide = SourceSide()
    destination: DestinationSide = DestinationSide()
    takeover: TakeoverSide = TakeoverSide()
    pid1: Pid1 = Pid1()
    to_source: tuple[str, ...] = ()
    to_destination: tuple[str, ...] = ()
    taken_back: bool = False  # in the ledger, which both sides hold
    history: frozenset[str] = frozenset()
    wrong: str = ""


class Op(NamedTuple):
    """What of a step is there to be played, besides what can be seen in the world."""

    who: str
    what: Event | str


class Next(NamedTuple):
    """One thing that can happen."""

    text: str
    world: World
    op: Op | None = None


@dataclass(frozen=True)
class Rules:
    """What holds; each default is right, and the tests show that anything else is not."""

    source: Table[Source, SourceAction] = field(default_factory=lambda: SOURCE)
    destination: Table[Destination, DestinationAction] = field(default_factory=lambda: DESTINATION)
    tables: bool = False  # the source has some, and copies them before the freeze
    notify_access: str = "all"
    stops_with_mainpid: bool = True  # PID 1 takes MAINPID= of a unit that stops; 252 does not
    revokes: bool = True  # takeover kills only what the source has struck off
    checks_takeover: bool = True  # the destination, before the Ack
    checks_ack: bool = True  # the source, whether it acknowledges what was sent, all of it
    looks_again: bool = True  # the source, whether the destination lives after PID 1 has answered
    names_until_answered: bool = True
    names_early: bool = False  # MAINPID= together with the image
    waits_for_source: bool = True  # the owner, until the channel closes, before it touches
    # what the source may still be putting into the FD store
    asks_for_job: bool = True  # a source left alone, whether it is a stop for good
    waits_to_be_main: bool = True  # the owner, before it notifies anything
    names_for_the_dead: bool = True  # takeover, if the source is dead after the commit
    reads_on: bool = True  # takeover, after it has hung up: it may be too late for that
    waits_for_the_end: bool = True  # a destination whose Ack was not taken, for the source's


SIDES = "source", "destination", "takeover"
IMAGE = {"source": "image of the source", "destination": "image of the destination"}
INSURANCE = "insurance"
EARLY_ACK = "ack of nothing"
EVERYTHING = "nothing"  # the request to keep nothing
#: Pieces of tables that a source sends at most.
PIECES = 1
_BEFORE_ACK = (Destination.PREPARING, Destination.WAITING, Destination.LOADING)


def owns(world: World) -> set[str]:
    """Who has the backends, alive, and not yet in the FD store."""
    source, destination = world.source, world.destination
    owners = set()
    taken = destination.at is Destination.OWNER
    if destination.process is Process.UP and taken and "destination ended" not in world.history:
        owners.add("destination")
    if source.process is Process.UP and not taken and "source ended" not in world.history:
        owners.add("source")
    return owners


class Model:
    """All that can happen under some rules; keeps count of the rows used."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.used: set[tuple[Source | Destination, Event]] = set()

    def successors(self, world: World) -> list[Next]:
        """All that will happen next, in one order or another; nothing, once the world is at rest."""
        happens = [
            *self._source(world),
            *self._destination(world),
            *self._takeover(world),
            *self._pid1(world),
        ]
        if not happens and world.pid1.unit in (Unit.STOPPING, Unit.FINAL):
            # TimeoutStopSec= is longer than all that the others wait for by themselves.
            happens = [
                Next(
                    f"PID 1: SIGKILL to {side}, TimeoutStopSec= is over",
                    _kill(world, side, "PID 1"),
                )
                for side in SIDES
                if getattr(world, side).process is Process.UP
            ]
        return happens

    def in_one_go(self, world: World, name: str) -> list[Next]:
        """How a side that has seen an event goes on with what that row says, with nobody else in
        between; nothing, once the row is performed or waits."""
        source, destination = world.source, world.destination
        if name == "source" and source.process is Process.UP:
            if source.todo:
                failing = [n for n in self.faults(world) if n.op and n.op.who == "fails"]
                return [*self._source_does(world, source.todo[0]), *failing]
            return [self._source_sees(world, source.found)] if source.found else []
        if name == "destination" and destination.process is Process.UP:
            if destination.todo:
                return list(self._destination_does(world, destination.todo[0]))
            return [self._destination_sees(world, destination.found)] if destination.found else []
        return []

    # The source

    def _source(self, world: World) -> Iterator[Next]:
        side = world.source
        if side.process is not Process.UP:
            return
        if world.to_source[:1] == ("migrate",) and side.channel is Channel.OPEN:
            answer = "agreed" if side.registered else "refused"
            yield Next(
                f"source: Migrate is {answer}",
                _with(world, "source", migrating=side.migrating or side.registered)._replace(
                    to_source=world.to_source[1:],
                    to_destination=(*world.to_destination, answer),
                ),
            )
        if side.todo:
            yield from self._source_does(world, side.todo[0])
        elif side.found is not None:
            yield self._source_sees(world, side.found)
        elif side.naming:
            yield self._source_names(world)
        else:
            yield from self._source_waits(world)

    def _source_waits(self, world: World) -> Iterator[Next]:
        side, heard = world.source, world.to_source[:1]
        read = world._replace(to_source=world.to_source[1:])
        closed = world.destination.process is not Process.UP
        if side.at in (Source.COPYING, Source.FROZEN, Source.DECIDING):
            if heard:
                yield self._source_sees(read, self._event(heard[0]))
            elif closed or side.channel is Channel.SHUT:
                yield self._source_sees(world, Event.HANGUP)
            if side.at is Source.COPYING:
                if side.pieces < PIECES:
                    yield self._source_sees(world, Event.PIECE)
                yield self._source_sees(world, Event.COPIED)
            if side.at is Source.FROZEN or (side.at is Source.COPYING and side.pieces):
                yield self._source_sees(world, Event.DEADLINE)
            if side.at is not Source.DECIDING and closed and not heard:
                yield self._source_sees(world, Event.SUCCESSOR_DEAD)
        elif side.at is Source.SERVING and side.migrating and heard != ("migrate",):
            if heard == ("go",):
                yield self._source_sees(read, Event.COPY if self.rules.tables else Event.GO)
            yield Next("source: no Go, kills", _kill(_over(world), "destination", "the source"))
        elif side.at is Source.RETIRED:
            yield self._source_sees(world, Event.DRAINED)
            if side.told:
                yield self._source_sees(_with(world, "source", told=False), Event.STOP)
        if side.told and side.at is Source.SERVING:
            todo = (SourceAction.PARK, SourceAction.EXIT)
            stopped = _with(world, "source", told=False, serving=False, todo=todo)
            yield Next("source: stops as the owner", stopped)

    def _event(self, record: str) -> Event:
        if record == EARLY_ACK:
            return Event.UNREADABLE if self.rules.checks_ack else Event.ACK
        known = {"ack": Event.ACK, "progress": Event.PROGRESS, "abort": Event.ABORT}
        return known.get(record, Event.UNREADABLE)

    def _source_sees(self, world: World, event: Event) -> Next:
        side = world.source
        try:
            at, todo = step(self.rules.source, side.at, event)
        except KeyError:
            return Next(
                f"source: {event}", _wrong(world, f"the source in {side.at} has no {event}")
            )
        self.used.add((side.at, event))
        changed = _with(world, "source", at=at, todo=todo, found=None, naming=False)
        return Next(f"source: {event}: {side.at} -> {at}", changed, Op("source", event))

    def _source_does(self, world: World, action: SourceAction) -> Iterator[Next]:
        side = world.source
        rest = side.todo[1:]
        done = _with(world, "source", todo=rest)
        text = f"source: {action}"
        match action:
            case SourceAction.RECORD:
                yield Next(text, done)
            case SourceAction.SEND_PIECE:
                failed = _with(done, "source", found=Event.NOT_SENT)
                yield Next(f"{text} fails", failed, Op("fails", action))
                if world.destination.process is Process.UP:
                    sent = _with(done, "source", pieces=side.pieces + 1)
                    more = (*world.to_destination, "piece")
                    yield Next(text, sent._replace(to_destination=more))
            case SourceAction.FREEZE:
                frozen = _with(done, "source", serving=False)
                yield Next(text, frozen)
                failed = _with(frozen, "source", todo=(), found=Event.NOT_SENT)
                yield Next(f"{text} fails", failed, Op("fails", action))
            case SourceAction.SEND_IMAGE:
                if self.rules.names_early:
                    done = _notify(done, "source", "MAINPID")
                failed = _with(done, "source", found=Event.NOT_SENT)
                yield Next(f"{text} fails", failed, Op("fails", action))
                if world.destination.process is Process.UP:
                    sent = (*world.to_destination, "image")
                    yield Next(text, done._replace(to_destination=sent))
            case SourceAction.SHUT:
                yield Next(text, _with(done, "source", channel=Channel.SHUT))
            case SourceAction.TAKE_BACK:
                yield Next(text, done._replace(taken_back=True))
            case SourceAction.KILL:
                yield Next(text, _kill(done, "destination", "the source"))
            case SourceAction.RESUME:
                resumed = _with(done, "source", serving=True, migrating=False, registered=False)
                if side.retired:
                    resumed = _wrong(resumed, "the source serves with what has moved")
                yield Next(text, _note(resumed, "source resumed"))
            case SourceAction.HANG_UP:
                yield Next(text, _hang_up_source(done))
            case SourceAction.INSURE:
                yield Next(text, _notify(done, "source", INSURANCE))
            case SourceAction.NAME_SUCCESSOR:
                if world.destination.process is not Process.UP:
                    yield Next(text, _with(done, "source", found=Event.SUCCESSOR_DEAD))
                else:
                    named = _notify(done, "source", "MAINPID")
                    yield Next(text, _with(named, "source", naming=True))
            case SourceAction.RETIRE:
                yield Next(text, _with(done, "source", retired=True))
            case SourceAction.LET_GO:
                yield Next(text, _with(done, "source", let_go=True))
            case SourceAction.PARK:
                yield from self._parks(world, "source")
            case SourceAction.EXIT:
                yield Next(f"{text}s", _exit(done, "source"))
            case SourceAction.EXTEND:
                yield Next(text, done)

    def _source_names(self, world: World) -> Next:
        if ("source", "MAINPID") in world.pid1.queue:
            if not self.rules.names_until_answered:
                return Next("source: stays, quiesced", _with(world, "source", naming=False))
            return self._source_sees(world, Event.UNANSWERED)
        alive = world.destination.process is Process.UP or not self.rules.looks_again
        return self._source_sees(world, Event.NAMED if alive else Event.SUCCESSOR_DEAD)

    # The destination

    def _destination(self, world: World) -> Iterator[Next]:
        side = world.destination
        if side.process is not Process.UP or side.hung:
            return
        line = world.takeover.line and world.takeover.process is Process.UP
        if side.held:
            if world.takeover.released:
                yield Next("destination: is released", _with(world, "destination", held=False))
            if world.takeover.process is not Process.UP or side.told:
                yield Next("destination: exits, held back", _exit(world, "destination"))
        elif side.todo:
            yield from self._destination_does(world, side.todo[0])
        elif side.found is not None:
            yield self._destination_sees(world, side.found)
        elif side.at is Destination.OWNER:
            yield from self._destination_owns(world)
        else:
            yield from self._destination_waits(world, line)

    def _destination_waits(self, world: World, line: bool) -> Iterator[Next]:
        side, heard = world.destination, world.to_destination[:1]
        closed = world.source.channel is Channel.CLOSED and not heard
        read = world._replace(to_destination=world.to_destination[1:])
        waits = line or not self.rules.checks_takeover
        events: list[tuple[Event, World]] = []
        if side.at is Destination.PREPARING:
            events.append((Event.REFUSED, world))
            if not side.called:
                called = _with(world, "destination", called=True)
                if world.source.channel is Channel.CLOSED:
                    events.append((Event.HANGUP, called))
                else:
                    asked = called._replace(to_source=(*world.to_source, "migrate"))
                    yield Next("destination: calls Migrate", asked)
            elif heard == ("agreed",):
                events += [(Event.PREPARED, read)] if waits else []
            elif heard:
                events.append((Event.REFUSED, read))
            elif closed:
                events.append((Event.HANGUP, world))
        elif side.at is Destination.WAITING and waits:
            if heard:
                event = Event.PIECE if heard == ("piece",) else Event.IMAGE
                events += [(event, read), (Event.REFUSED, read)]
            elif closed:
                events.append((Event.HANGUP, world))
        elif side.at is Destination.LOADING:
            events.append((Event.REFUSED, world))
            events += [(Event.LOADED, world)] if waits else []
        elif side.at is Destination.ASKING and waits:
            ended = world.source.channel is Channel.CLOSED or not self.rules.waits_for_the_end
            if world.taken_back or world.source.process is Process.UP:
                events.append((Event.TAKEN_BACK, world))  # at the latest when it stops waiting
            if ended and not world.taken_back:
                events.append((Event.ORPHANED, world))
        if not waits:
            events.append((Event.TAKEOVER_GONE, world))
        for event, before in events:
            yield self._destination_sees(before, event)
        if side.told and side.at in _BEFORE_ACK:
            yield Next("destination: dies of SIGTERM", _exit(world, "destination"))

    def _destination_owns(self, world: World) -> Iterator[Next]:
        side = world.destination
        alone = self._is_heard(world)
        if not side.said:
            yield Next("destination: says committed", _with(world, "destination", said="committed"))
            return  # the next thing that it does, whatever it is told
        if side.ended:
            return
        if alone and not side.trusted:
            trusted = _notify(world, "destination", f"no {INSURANCE}")
            yield Next(
                "destination: gives up the insurance", _with(trusted, "destination", trusted=True)
            )
        if side.told:
            todo = (SourceAction.PARK, SourceAction.EXIT)
            stopped = _with(world, "destination", told=False, ended=True, serving=False, todo=todo)
            yield Next("destination: stops as the owner", stopped)

    def _destination_sees(self, world: World, event: Event) -> Next:
        side = world.destination
        text = f"destination: {event}"
        try:
            at, todo = step(self.rules.destination, side.at, event)
        except KeyError:
            return Next(text, _wrong(world, f"the destination in {side.at} has no {event}"))
        self.used.add((side.at, event))
        said = "failed" if event is Event.REFUSED else side.said
        changed = _with(world, "destination", at=at, todo=todo, found=None, said=said)
        if event is Event.ORPHANED and "source resumed" in world.history:
            changed = _wrong(changed, "what is served is older than what was served")
        if event is Event.TAKEN and "takeover was gone" in world.history:
            changed = _wrong(changed, "a commit, though takeover had gone before it was decided")
        return Next(f"{text}: {side.at} -> {at}", changed, Op("destination", event))

    def _destination_does(
        self, world: World, action: DestinationAction | SourceAction
    ) -> Iterator[Next]:
        side = world.destination
        done = _with(world, "destination", todo=side.todo[1:])
        text = f"destination: {action}"
        reads = world.source.channel is Channel.OPEN
        match action:
            case (
                DestinationAction.SEND_GO
                | DestinationAction.SEND_ACK
                | DestinationAction.SEND_ABORT
            ):
                record = action.removeprefix("send-")
                if reads:
                    done = done._replace(to_source=(*world.to_source, record))
                if action is DestinationAction.SEND_ACK:
                    answer = Event.TAKEN if reads else Event.HANGUP
                    # One system call: what it answers is what has happened.
                    after = self._destination_sees(done, answer)
                    answered = f"{text}: {after.text.removeprefix('destination: ')}"
                    yield Next(answered, after.world, after.op)
                elif action is DestinationAction.SEND_GO and not reads:
                    yield Next(f"{text} fails", _with(done, "destination", found=Event.HANGUP))
                else:
                    yield Next(text, done)
            case DestinationAction.SERVE:
                yield Next(text, _with(done, "destination", serving=True))
            case SourceAction.PARK:
                yield from self._parks(world, "destination")
            case DestinationAction.EXIT:
                yield Next(f"{text}s", _exit(done, "destination"))
            case DestinationAction.LOAD_PIECE:
                if reads:
                    yield Next(text, done._replace(to_source=(*world.to_source, "progress")))
                else:
                    yield Next(f"{text} fails", _with(done, "destination", found=Event.HANGUP))
            case DestinationAction.LOAD:
                yield Next(text, done)

    # Takeover

    def _takeover(self, world: World) -> Iterator[Next]:
        side, destination = world.takeover, world.destination
        if side.process is not Process.UP:
            return
        if side.told:
            killed = _note(_exit(world, "takeover"), "takeover killed")
            yield Next("takeover: dies of SIGTERM", killed)
        answers = world.source.process is Process.UP
        ended = _exit(world, "takeover")
        decided = destination.at in (Destination.ACKING, Destination.ASKING, Destination.OWNER)
        owner = destination.process is Process.UP and decided
        match side.at:
            case Step.START if answers:
                registered = _with(world, "source", registered=True)
                yield Next("takeover: Register", _with(registered, "takeover", at=Step.REGISTERED))
            case Step.START:
                yield Next("takeover: nobody answers", _clean_up(world))
            case Step.REGISTERED:
                yield Next(
                    "takeover: releases it", _with(world, "takeover", at=Step.FOLLOW, released=True)
                )
            case Step.FOLLOW:
                yield Next("takeover: deadline", _clean_up(world))
                if destination.said == "committed":
                    confirms = _with(world, "takeover", at=Step.CONFIRM)
                    yield Next("takeover: reads committed", confirms)
                elif destination.said or destination.process is not Process.UP:
                    yield Next("takeover: reads that it has failed", _clean_up(world))
            case Step.CLEAN if destination.said == "committed" and self.rules.reads_on:
                yield Next("takeover: reads committed", _with(world, "takeover", at=Step.CONFIRM))
            case Step.CLEAN if answers and world.source.migrating and self.rules.revokes:
                # It waits long enough for an owner to say so.
                if not owner or not self.rules.reads_on:
                    yield Next("takeover: Revoke is Busy, gives up", ended)
            case Step.CLEAN if answers or not self.rules.revokes:
                revoked = _with(world, "source", registered=False)
                yield Next("takeover: Revoke", _with(revoked, "takeover", at=Step.KILL))
            case Step.CLEAN:
                if not owner or not self.rules.reads_on:
                    yield Next("takeover: the source is gone", ended)
            case Step.KILL:
                yield Next("takeover: kills", _kill(ended, "destination", "takeover"))
            case Step.CONFIRM:
                if destination.process is not Process.UP:
                    yield Next("takeover: the destination is gone", ended)
                named = ("takeover", "MAINPID") in world.pid1.queue
                if (
                    not answers
                    and self.rules.names_for_the_dead
                    and world.pid1.main != "destination"
                    and destination.process is Process.UP
                    and not named
                ):
                    yield Next("takeover: names it", _notify(world, "takeover", "MAINPID"))
                if world.pid1.main == "destination":
                    done = _exit(world, "takeover")
                    if destination.at is not Destination.OWNER:
                        done = _wrong(done, "success, though the destination does not own")
                    yield Next("takeover: MainPID is the destination, exits 0", done)

    # PID 1

    def _pid1(self, world: World) -> Iterator[Next]:
        pid1 = world.pid1
        if pid1.unit in (Unit.STOPPED, Unit.RESTARTED):
            return
        if pid1.queue:
            yield self._notified(world)
        for side in SIDES:
            if getattr(world, side).process is Process.ZOMBIE:
                yield Next(f"PID 1: {side} has ended", self._reap(world, side))

    def _notified(self, world: World) -> Next:
        pid1 = world.pid1
        sender, what = pid1.queue[0]
        known = getattr(world, sender).process is not Process.GONE
        control = sender == "takeover"
        allowed = known and (self.rules.notify_access == "all" or control or pid1.main == sender)
        taken = _with(world, "pid1", queue=pid1.queue[1:])
        text = f"PID 1: takes {what!r} of {sender}"
        if not allowed:
            return Next(f"PID 1: drops {what!r} of {sender}", taken)
        if what == "MAINPID":
            suits = world.destination.process is Process.UP
            late = pid1.unit is Unit.STOPPING and self.rules.stops_with_mainpid
            if suits and (late or pid1.unit in (Unit.RELOAD, Unit.RUNNING)):
                return Next(text, _with(taken, "pid1", main="destination"))
            return Next(f"PID 1: refuses MAINPID ({pid1.unit})", taken)
        if what == f"no {INSURANCE}":
            return Next(text, _with(taken, "pid1", store=pid1.store - {INSURANCE}))
        if what == EVERYTHING:
            return Next(text, _note(_with(taken, "pid1", store=frozenset()), f"{sender} ended"))
        taken = _with(taken, "pid1", store=pid1.store | {what})
        return Next(text, _note(taken, f"{sender} ended") if what == IMAGE[sender] else taken)

    def _reap(self, world: World, side: str) -> World:
        world = _with(world, side, process=Process.GONE)
        pid1 = world.pid1
        unit, main = pid1.unit, pid1.main
        failed = pid1.failed
        if side == main:
            main = ""
            failed = failed or f"{side} killed" in world.history
        control = world.takeover.process is not Process.GONE
        if unit is Unit.RELOAD and not control:
            unit = Unit.RUNNING
        world = _with(world, "pid1", unit=unit, main=main, failed=failed)
        if unit is Unit.RUNNING and (failed or not main):
            return self._unasked_stop(world)
        if unit is Unit.STOPPING and not main and not control:
            world = _tell(_with(world, "pid1", unit=Unit.FINAL), *SIDES)
        return _end(world) if world.pid1.unit in (Unit.STOPPING, Unit.FINAL) else world

    def _unasked_stop(self, world: World) -> World:
        """The main process is gone, or the one before has failed: everybody gets SIGTERM."""
        stopped = _tell(_with(world, "pid1", unit=Unit.STOPPING), *SIDES)
        well = [side for side in owns(world) if not world.history & {"source killed", "by hand"}]
        if well:
            stopped = _wrong(
                stopped, f"PID 1 stops the unit, though the {well[0]} owns and is well"
            )
        return _end(stopped)

    # What need not happen

    def faults(self, world: World) -> Iterator[Next]:
        """All that can go wrong, and all that people can do."""
        pid1 = world.pid1
        if pid1.unit in (Unit.STOPPED, Unit.RESTARTED):
            return
        owners = owns(world)
        for side in SIDES:
            actor = getattr(world, side)
            if actor.process is not Process.UP:
                continue
            killed = _note(_exit(world, side), *_obituary(world, side, owners))
            yield Next(f"{side} is killed", killed)
            yield Next(f"SIGTERM to {side} by hand", _note(_tell(world, side), "by hand"))
        side = world.destination
        if side.process is Process.UP and side.at in _BEFORE_ACK and not (side.held or side.hung):
            hung = _with(world, "destination", hung=True)
            yield Next("destination hangs", hung)
        talks = not (side.held or side.hung or side.chatted or side.todo)
        if talks and world.source.channel is Channel.OPEN:
            records = {
                Destination.WAITING: (EARLY_ACK,),
                Destination.LOADING: ("progress", "junk"),
            }
            for record in records.get(side.at, ()):
                sent = world._replace(to_source=(*world.to_source, record))
                chatted = _with(sent, "destination", chatted=True)
                yield Next(f"destination: sends {record}", chatted, Op("sends", record))
        if world.source.todo[:1] == (SourceAction.INSURE,):
            failed = _with(world, "source", todo=world.source.todo[1:])
            noted = _note(failed, "no insurance")
            yield Next("source: insure fails", noted, Op("fails", SourceAction.INSURE))
        if pid1.unit in (Unit.RELOAD, Unit.RUNNING):
            for job in ("restart", "stop"):
                stopping = _with(world, "pid1", unit=Unit.STOPPING, job=job)
                yield Next(f"systemctl {job}", _tell(stopping, *SIDES))

    # Both sides

    def _is_heard(self, world: World) -> bool:
        """Whether the destination may notify PID 1: what it says is taken, or never will be, and
        does not cross with what the source says."""
        if world.source.channel is not Channel.CLOSED and self.rules.waits_for_source:
            return False
        if world.pid1.main == "destination" or not self.rules.waits_to_be_main:
            return True
        # Nobody is left who could name it, or takeover is slow: it does not wait for ever.
        return world.takeover.process is not Process.UP

    def _parks(self, world: World, name: str) -> Iterator[Next]:
        """Wait until PID 1 has what is to be kept; on a stop for good, until it has nothing."""
        side = getattr(world, name)
        if name == "source" and side.let_go:
            world = _wrong(world, "the source parks what it has closed")
        if not side.asked:
            left_alone = name == "source" and world.destination.at is Destination.OWNER
            asks = self.rules.asks_for_job or not left_alone
            for_good = world.pid1.job == "stop" and asks
            if name == "destination" and not self._is_heard(world):
                return
            what = EVERYTHING if for_good else IMAGE[name]
            before = () if for_good or world.pid1.job else (f"{name} parked unasked",)
            asked = _note(_with(_notify(world, name, what), name, asked=True), *before)
            yield Next(f"{name}: asks PID 1 to keep {what}", asked)
        elif not any(sender == name for sender, _ in world.pid1.queue):
            yield Next(f"{name}: PID 1 has answered", _with(world, name, todo=side.todo[1:]))


def _obituary(world: World, side: str, owners: set[str]) -> tuple[str, ...]:
    """What a death excuses later."""
    if side != "destination":
        return (f"{side} killed", f"{side} killed as the owner")[: 1 + (side in owners)]
    if side not in owners:
        return ()
    source = world.source
    late = source.process is not Process.UP or source.at is Source.RETIRED
    return ("destination killed as the owner", "the source had retired")[: 1 + late]


def _with(world: World, side: str, **changes: Any) -> World:
    return world._replace(**{side: getattr(world, side)._replace(**changes)})


def _note(world: World, *notes: str) -> World:
    return world._replace(history=world.history | set(notes))


def _wrong(world: World, what: str) -> World:
    return world._replace(wrong=world.wrong or what)


def _notify(world: World, sender: str, what: str) -> World:
    queue = world.pid1.queue
    if (sender, what) in queue:  # it says nothing new
        return world
    return _with(world, "pid1", queue=(*queue, (sender, what)))


def _tell(world: World, *sides: str) -> World:
    for side in sides:
        if getattr(world, side).process is Process.UP:
            world = _with(world, side, told=True)
    return world


def _exit(world: World, side: str) -> World:
    """End a process; of what it was, only what the others can see of it stays."""
    actor = getattr(world, side)
    if actor.process is not Process.UP:
        return world
    if side == "takeover":
        dead = TakeoverSide(Process.ZOMBIE, released=actor.released, line=False)
        return _hang_up(world)._replace(takeover=dead)
    if side == "source":
        closed = SourceSide(Process.ZOMBIE, Source.RETIRED, serving=False, channel=Channel.CLOSED)
        return world._replace(source=closed, to_source=())
    at = actor.at if actor.at is Destination.OWNER else Destination.FAILED
    ended = DestinationSide(Process.ZOMBIE, at, held=False, said=actor.said, trusted=actor.trusted)
    return world._replace(destination=ended, to_destination=())


def _hang_up(world: World) -> World:
    if world.destination.at in _BEFORE_ACK and world.takeover.line:
        world = _note(world, "takeover was gone")
    return _with(world, "takeover", line=False)


def _clean_up(world: World) -> World:
    return _hang_up(_with(world, "takeover", at=Step.CLEAN))


def _kill(world: World, side: str, killer: str) -> World:
    if side in owns(world):
        world = _wrong(world, f"the {side} owns, and is killed by {killer}")
    return _exit(world, side)


def _over(world: World) -> World:
    """A migration that ends before Go."""
    return _hang_up_source(_with(world, "source", migrating=False, registered=False))


def _hang_up_source(world: World) -> World:
    return _with(world, "source", channel=Channel.CLOSED)._replace(to_source=())


def _end(world: World) -> World:
    """Once nobody is left: the end, or a new instance, which loads the newest there is."""
    pid1 = world.pid1
    if any(getattr(world, side).process is not Process.GONE for side in SIDES):
        return world
    if pid1.job == "stop":
        return _with(world, "pid1", unit=Unit.STOPPED, queue=())
    for what in (IMAGE["destination"], IMAGE["source"], INSURANCE):
        if what in pid1.store:
            return _with(world, "pid1", unit=Unit.RESTARTED, loaded=what, queue=())
    return _with(world, "pid1", unit=Unit.RESTARTED, loaded="cold", queue=())


def verdict(world: World) -> str:
    """What is wrong with a world, whatever comes next; empty if nothing is."""
    if world.wrong:
        return world.wrong
    if world.source.serving and world.destination.serving:
        return "two owners serve"
    source = world.source
    if source.serving and world.destination.at is Destination.OWNER:
        return "the source serves after the commit"
    if source.at is Source.COMMITTED and world.destination.at in _BEFORE_ACK:
        return "the source commits, and nobody owns"
    if source.at is Source.COPYING and not source.serving:
        return "the source stands still while it copies"
    runs = source.process is Process.UP and not source.todo
    if runs and source.at in (Source.COMMITTED, Source.RETIRED) and not source.retired:
        return "the source touches what has moved"
    if runs and source.at is Source.RETIRED and not source.let_go:
        return "the source keeps open what has moved"
    return ""


def verdict_at_rest(world: World) -> str:
    """What is wrong with a world in which nothing more will happen; empty if nothing is."""
    pid1 = world.pid1
    match pid1.unit:
        case Unit.STOPPED:
            excused = _nobody_left(world) or any("parked unasked" in note for note in world.history)
            kept = "" if excused else ", ".join(sorted(pid1.store))
            return f"stopped for good, and PID 1 keeps the {kept}" if kept else ""
        case Unit.RESTARTED:
            return _verdict_on_start(world)
        case Unit.STOPPING | Unit.FINAL:
            return "the stop never ends"
    serving = [side for side in ("source", "destination") if getattr(world, side).serving]
    if len(serving) != 1:
        return f"{len(serving)} owners serve in the end"
    if pid1.main != serving[0]:
        return f"the {serving[0]} serves, and is not PID 1's main process"
    if world.source.serving and world.source.migrating:
        return "the source refuses every further upgrade"
    if pid1.store:
        return f"PID 1 keeps the {', '.join(sorted(pid1.store))}, older than what is served"
    lingers = world.destination.process is Process.UP and world.source.serving
    if lingers and not (world.destination.hung and "takeover killed" in world.history):
        return "a destination lingers"
    return ""


def _verdict_on_start(world: World) -> str:
    """Whether a new instance has loaded the best that there could be."""
    owner_died = "destination killed as the owner" in world.history
    match world.pid1.loaded:
        case "image of the destination":
            return ""
        case "image of the source":
            newest = owner_died or world.destination.at is not Destination.OWNER
            return "" if newest else "an older image is loaded, though nobody died"
        case "insurance":
            return "" if owner_died else "connections are lost, though no owner died"
    excused = (
        "source killed as the owner" in world.history
        or _nobody_left(world)
        or (owner_died and world.destination.trusted)
    )
    return "" if excused else "everything is lost"


def _nobody_left(world: World) -> bool:
    """Whether the owner has died, and so has everybody who could have done something about it."""
    notes = world.history
    if "destination killed as the owner" not in notes:
        return False
    uninsured = "the source had retired" in notes and (
        "no insurance" in notes or world.pid1.job == "stop"
    )
    return "source killed" in notes or uninsured
