# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who owns the backends, step by step, in a live migration: the tables that drive both sides.

Rules: every legal step is in SOURCE or DESTINATION, and the tests explore exactly these tables,
with takeover and PID 1 as the third and fourth actor. `interpreter` performs them. This module
does no IO.

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
    COPYING = "copying"  #: it serves, and sends pieces of its tables; no Ack counts yet
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

    GO = "go"  #: the destination waits, and there are no tables to be copied before the freeze
    COPY = "copy"  #: the destination waits, and there are
    PIECE = "piece"  #: of a table: the source has copied it, or the destination has got it
    COPIED = "copied"  #: what is left of the tables fits the pause, or never will
    PREPARED = "prepared"
    IMAGE = "image"
    PROGRESS = "progress"
    LOADED = "loaded"
    REFUSED = "refused"  #: by the source, before; or the destination cannot load, or must not
    ACK = "ack"  #: of the very image that was sent, and sent completely
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
    DRAINED = "drained"  #: nothing is left that could not move
    STOP = "stop"  #: SIGTERM to a source that drains


class SourceAction(StrEnum):
    """What the source does; in the order given."""

    RECORD = "record"  #: which keys of tables change, from here to the end
    SEND_PIECE = "send-piece"
    FREEZE = "freeze"
    SEND_IMAGE = "send-image"
    EXTEND = "extend"  #: the deadline
    SHUT = "shut"  #: the reading side of the channel
    KILL = "kill"  #: the destination; cleaning up, nothing depends on it
    TAKE_BACK = "take-back"  #: the image is worth nothing from here on
    RESUME = "resume"
    HANG_UP = "hang-up"  #: close the channel
    RETIRE = "retire"  #: write no state and touch nothing that has moved; drain the rest
    INSURE = "insure"  #: park a duplicate without connections
    NAME_SUCCESSOR = "name-successor"
    LET_GO = "let-go"  #: close what has moved
    PARK = "park"
    EXIT = "exit"


class DestinationAction(StrEnum):
    """What the destination does; in the order given."""

    SEND_GO = "send-go"
    LOAD_PIECE = "load-piece"
    LOAD = "load"
    SEND_ACK = "send-ack"
    SEND_ABORT = "send-abort"
    SERVE = "serve"
    EXIT = "exit"


State = TypeVar("State", bound=StrEnum)
Action = TypeVar("Action", bound=StrEnum)
Table = Mapping[tuple[State, Event], tuple[State, tuple[Action, ...]]]

_COMMIT = (SourceAction.RETIRE, SourceAction.INSURE, SourceAction.NAME_SUCCESSOR)
_SERVE_ON = (SourceAction.TAKE_BACK, SourceAction.RESUME, SourceAction.HANG_UP)
#: Nothing was given that could be acknowledged.
_COPY_NO_MORE = (Source.SERVING, (SourceAction.RESUME, SourceAction.HANG_UP, SourceAction.KILL))

SOURCE: Table[Source, SourceAction] = {
    (Source.SERVING, Event.GO): (
        Source.FROZEN,
        (SourceAction.FREEZE, SourceAction.SEND_IMAGE),
    ),
    (Source.SERVING, Event.COPY): (Source.COPYING, (SourceAction.RECORD,)),
    (Source.COPYING, Event.PIECE): (Source.COPYING, (SourceAction.SEND_PIECE,)),
    (Source.COPYING, Event.PROGRESS): (Source.COPYING, (SourceAction.EXTEND,)),
    (Source.COPYING, Event.COPIED): (
        Source.FROZEN,
        (SourceAction.FREEZE, SourceAction.SEND_IMAGE),
    ),
    (Source.COPYING, Event.ABORT): _COPY_NO_MORE,
    (Source.COPYING, Event.HANGUP): _COPY_NO_MORE,
    (Source.COPYING, Event.SUCCESSOR_DEAD): _COPY_NO_MORE,
    (Source.COPYING, Event.UNREADABLE): _COPY_NO_MORE,
    (Source.COPYING, Event.NOT_SENT): _COPY_NO_MORE,
    (Source.COPYING, Event.DEADLINE): _COPY_NO_MORE,
    (Source.FROZEN, Event.PROGRESS): (Source.FROZEN, (SourceAction.EXTEND,)),
    (Source.FROZEN, Event.ACK): (Source.COMMITTED, _COMMIT),
    (Source.FROZEN, Event.ABORT): (Source.SERVING, _SERVE_ON),
    (Source.FROZEN, Event.HANGUP): (Source.SERVING, _SERVE_ON),
    (Source.FROZEN, Event.SUCCESSOR_DEAD): (Source.DECIDING, (SourceAction.SHUT,)),
    (Source.FROZEN, Event.UNREADABLE): (Source.DECIDING, (SourceAction.SHUT,)),
    (Source.FROZEN, Event.NOT_SENT): (Source.DECIDING, (SourceAction.SHUT,)),
    (Source.FROZEN, Event.DEADLINE): (Source.DECIDING, (SourceAction.SHUT,)),
    (Source.DECIDING, Event.PROGRESS): (Source.DECIDING, ()),
    (Source.DECIDING, Event.UNREADABLE): (Source.DECIDING, ()),
    (Source.DECIDING, Event.ACK): (Source.COMMITTED, _COMMIT),
    (Source.DECIDING, Event.ABORT): (Source.SERVING, _SERVE_ON),
    (Source.DECIDING, Event.HANGUP): (Source.SERVING, (*_SERVE_ON, SourceAction.KILL)),
    (Source.COMMITTED, Event.NAMED): (
        Source.RETIRED,
        (SourceAction.LET_GO, SourceAction.HANG_UP),
    ),
    (Source.COMMITTED, Event.UNANSWERED): (Source.COMMITTED, (SourceAction.NAME_SUCCESSOR,)),
    (Source.COMMITTED, Event.SUCCESSOR_DEAD): (
        Source.PARKED,
        (SourceAction.PARK, SourceAction.EXIT),
    ),
    (Source.RETIRED, Event.DRAINED): (Source.RETIRED, (SourceAction.EXIT,)),
    (Source.RETIRED, Event.STOP): (Source.RETIRED, (SourceAction.EXIT,)),
}

_GIVE_UP = (DestinationAction.SEND_ABORT, DestinationAction.EXIT)
_FAILED = (Destination.FAILED, (DestinationAction.EXIT,))
_OWNER = (Destination.OWNER, (DestinationAction.SERVE,))

#: A SIGTERM before the Ack ends the process, as any death of it: that is no step of its own.
DESTINATION: Table[Destination, DestinationAction] = {
    (Destination.PREPARING, Event.PREPARED): (Destination.WAITING, (DestinationAction.SEND_GO,)),
    (Destination.PREPARING, Event.REFUSED): _FAILED,
    (Destination.PREPARING, Event.HANGUP): _FAILED,
    (Destination.PREPARING, Event.TAKEOVER_GONE): _FAILED,
    (Destination.WAITING, Event.PIECE): (Destination.WAITING, (DestinationAction.LOAD_PIECE,)),
    (Destination.WAITING, Event.IMAGE): (Destination.LOADING, (DestinationAction.LOAD,)),
    (Destination.WAITING, Event.REFUSED): (Destination.FAILED, _GIVE_UP),
    (Destination.WAITING, Event.HANGUP): _FAILED,
    (Destination.WAITING, Event.TAKEOVER_GONE): (Destination.FAILED, _GIVE_UP),
    (Destination.LOADING, Event.REFUSED): (Destination.FAILED, _GIVE_UP),
    (Destination.LOADING, Event.LOADED): (Destination.ACKING, (DestinationAction.SEND_ACK,)),
    (Destination.LOADING, Event.TAKEOVER_GONE): (Destination.FAILED, _GIVE_UP),
    (Destination.ACKING, Event.TAKEN): _OWNER,
    (Destination.ACKING, Event.HANGUP): (Destination.ASKING, ()),
    (Destination.ASKING, Event.TAKEN_BACK): _FAILED,
    (Destination.ASKING, Event.ORPHANED): _OWNER,
    (Destination.ASKING, Event.TAKEOVER_GONE): _FAILED,
}


def step(
    table: Table[State, Action], state: State, event: Event
) -> tuple[State, tuple[Action, ...]]:
    """The next state and what to do; raises KeyError for a step that is not in the table."""
    return table[state, event]
