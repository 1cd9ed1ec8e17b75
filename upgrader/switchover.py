# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who owns the backends, step by step, in a live migration: the tables that drive both sides.

Rules: every legal step is in SOURCE or DESTINATION, and the tests explore exactly these tables,
with takeover and PID 1 as the third and fourth actor. This module does no IO.

The Ack is the commit. Before it every failure leads back to SERVING; after it the source never
serves again. A source that gives up shuts its reading side first and then looks once more: an Ack
already queued counts, a later one fails at the destination. That one may serve only if the source
has died without taking its image back, which is noted where both can see it.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar


class Source(StrEnum):
    """Where the source stands."""

    SERVING = "serving"
    FROZEN = "frozen"  #: the image is on its way, the Ack is awaited
    DECIDING = "deciding"  #: given up; an Ack that is already queued still counts
    COMMITTED = "committed"  #: the destination owns; PID 1 does not know it yet
    RETIRED = "retired"  #: PID 1 knows its new main process
    PARKED = "parked"  #: the destination died before PID 1 knew it


class Destination(StrEnum):
    """Where the destination stands."""

    PREPARING = "preparing"  #: its own start-up, then the negotiation
    WAITING = "waiting"  #: for the image
    LOADING = "loading"
    ACKING = "acking"
    ASKING = "asking"  #: the Ack was not taken: does the source serve again, or is it dead?
    OWNER = "owner"
    FAILED = "failed"


class Event(StrEnum):
    """What happens to a side."""

    GO = "go"
    PREPARED = "prepared"
    IMAGE = "image"
    PROGRESS = "progress"
    LOADED = "loaded"
    REFUSED = "refused"  #: the destination cannot load, or its check said no
    ACK = "ack"
    TAKEN = "taken"  #: the Ack was taken by the source's socket
    ABORT = "abort"
    UNREADABLE = "unreadable"  #: what came is no record that may come now
    HANGUP = "hangup"  #: the channel is closed, or empty after it was shut
    TAKEN_BACK = "taken-back"  #: the source serves again, or may
    ORPHANED = "orphaned"  #: the source has ended, and had not taken its image back
    DEADLINE = "deadline"
    NOT_SENT = "not-sent"  #: the image could not be made or sent
    NAMED = "named"  #: PID 1 has taken MAINPID=
    UNANSWERED = "unanswered"  #: PID 1 has not said whether it has
    SUCCESSOR_DEAD = "successor-dead"
    TAKEOVER_GONE = "takeover-gone"
    STOP = "stop"  #: SIGTERM


class Action(StrEnum):
    """What a side does; in the order given."""

    FREEZE = "freeze"
    SEND_IMAGE = "send-image"
    EXTEND = "extend"  #: the deadline
    SHUT = "shut"  #: the reading side of the channel
    KILL = "kill"  #: the destination; cleaning up, nothing depends on it
    TAKE_BACK = "take-back"  #: the image is worth nothing from here on
    RESUME = "resume"
    INSURE = "insure"  #: park a duplicate without connections
    NAME_SUCCESSOR = "name-successor"
    RETIRE = "retire"
    PARK = "park"
    SEND_GO = "send-go"
    LOAD = "load"
    SEND_ACK = "send-ack"
    SEND_ABORT = "send-abort"
    SERVE = "serve"
    EXIT = "exit"


State = TypeVar("State", Source, Destination)
Table = Mapping[tuple[State, Event], tuple[State, tuple[Action, ...]]]

SOURCE: Table[Source] = {
    (Source.SERVING, Event.GO): (Source.FROZEN, (Action.FREEZE, Action.SEND_IMAGE)),
    (Source.SERVING, Event.HANGUP): (Source.SERVING, ()),
    (Source.SERVING, Event.DEADLINE): (Source.SERVING, (Action.KILL,)),
    (Source.SERVING, Event.STOP): (Source.PARKED, (Action.PARK, Action.EXIT)),
    (Source.FROZEN, Event.PROGRESS): (Source.FROZEN, (Action.EXTEND,)),
    (Source.FROZEN, Event.ACK): (Source.COMMITTED, (Action.INSURE, Action.NAME_SUCCESSOR)),
    (Source.FROZEN, Event.ABORT): (Source.SERVING, (Action.TAKE_BACK, Action.RESUME)),
    (Source.FROZEN, Event.HANGUP): (Source.SERVING, (Action.TAKE_BACK, Action.RESUME)),
    (Source.FROZEN, Event.SUCCESSOR_DEAD): (Source.DECIDING, (Action.SHUT,)),
    (Source.FROZEN, Event.UNREADABLE): (Source.DECIDING, (Action.SHUT,)),
    (Source.FROZEN, Event.NOT_SENT): (Source.DECIDING, (Action.SHUT,)),
    (Source.FROZEN, Event.DEADLINE): (Source.DECIDING, (Action.SHUT,)),
    (Source.DECIDING, Event.PROGRESS): (Source.DECIDING, ()),
    (Source.DECIDING, Event.UNREADABLE): (Source.DECIDING, ()),
    (Source.DECIDING, Event.ACK): (Source.COMMITTED, (Action.INSURE, Action.NAME_SUCCESSOR)),
    (Source.DECIDING, Event.ABORT): (Source.SERVING, (Action.TAKE_BACK, Action.RESUME)),
    (Source.DECIDING, Event.HANGUP): (
        Source.SERVING,
        (Action.TAKE_BACK, Action.RESUME, Action.KILL),
    ),
    (Source.COMMITTED, Event.NAMED): (Source.RETIRED, (Action.RETIRE,)),
    (Source.COMMITTED, Event.UNANSWERED): (Source.COMMITTED, (Action.NAME_SUCCESSOR,)),
    (Source.COMMITTED, Event.SUCCESSOR_DEAD): (Source.PARKED, (Action.PARK, Action.EXIT)),
    (Source.RETIRED, Event.STOP): (Source.RETIRED, (Action.EXIT,)),
}

DESTINATION: Table[Destination] = {
    (Destination.PREPARING, Event.PREPARED): (Destination.WAITING, (Action.SEND_GO,)),
    (Destination.PREPARING, Event.REFUSED): (Destination.FAILED, (Action.EXIT,)),
    (Destination.WAITING, Event.IMAGE): (Destination.LOADING, (Action.LOAD,)),
    (Destination.WAITING, Event.REFUSED): (Destination.FAILED, (Action.SEND_ABORT, Action.EXIT)),
    (Destination.LOADING, Event.REFUSED): (Destination.FAILED, (Action.SEND_ABORT, Action.EXIT)),
    (Destination.LOADING, Event.LOADED): (Destination.ACKING, (Action.SEND_ACK,)),
    (Destination.ACKING, Event.TAKEN): (Destination.OWNER, (Action.SERVE,)),
    (Destination.ACKING, Event.HANGUP): (Destination.ASKING, ()),
    (Destination.ASKING, Event.TAKEN_BACK): (Destination.FAILED, (Action.EXIT,)),
    (Destination.ASKING, Event.ORPHANED): (Destination.OWNER, (Action.SERVE,)),
    (Destination.ASKING, Event.TAKEOVER_GONE): (Destination.FAILED, (Action.EXIT,)),
    (Destination.ASKING, Event.STOP): (Destination.FAILED, (Action.EXIT,)),
    (Destination.OWNER, Event.STOP): (Destination.OWNER, (Action.PARK, Action.EXIT)),
    **{
        (state, event): (Destination.FAILED, (Action.EXIT,))
        for state in (Destination.PREPARING, Destination.WAITING, Destination.LOADING)
        for event in (Event.HANGUP, Event.TAKEOVER_GONE, Event.STOP)
    },
}


def step(table: Table[State], state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """The next state and what to do; raises KeyError for a step that is not in the table."""
    return table[state, event]
