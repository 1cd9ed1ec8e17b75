# SPDX-License-Identifier: LGPL-2.1-or-later
"""Performs the tables of `switchover`, one event at a time; does no IO and has no clock.

Who performs has one method for each action. A method returns None, or what it has found out: the
rest of the row is not performed then, and that event comes next.
"""

from collections.abc import Callable
from typing import Generic, Protocol, assert_never

from upgrader.protocol.switchover import (
    DESTINATION,
    SOURCE,
    Action,
    Destination,
    DestinationAction,
    Event,
    Source,
    SourceAction,
    State,
    Table,
    step,
)


class SourcePerformer(Protocol):
    """What a source does; each is described at its SourceAction."""

    def record(self) -> Event | None: ...  # noqa: D102
    def send_piece(self) -> Event | None: ...  # noqa: D102
    def freeze(self) -> Event | None: ...  # noqa: D102
    def send_image(self) -> Event | None: ...  # noqa: D102
    def extend(self) -> Event | None: ...  # noqa: D102
    def shut(self) -> Event | None: ...  # noqa: D102
    def kill(self) -> Event | None: ...  # noqa: D102
    def take_back(self) -> Event | None: ...  # noqa: D102
    def resume(self) -> Event | None: ...  # noqa: D102
    def hang_up(self) -> Event | None: ...  # noqa: D102
    def retire(self) -> Event | None: ...  # noqa: D102
    def insure(self) -> Event | None: ...  # noqa: D102
    def name_successor(self) -> Event | None: ...  # noqa: D102
    def let_go(self) -> Event | None: ...  # noqa: D102
    def park(self) -> Event | None: ...  # noqa: D102
    def exit(self) -> Event | None: ...  # noqa: D102


class DestinationPerformer(Protocol):
    """What a destination does; each is described at its DestinationAction."""

    def send_go(self) -> Event | None: ...  # noqa: D102
    def load_piece(self) -> Event | None: ...  # noqa: D102
    def load(self) -> Event | None: ...  # noqa: D102
    def send_ack(self) -> Event | None: ...  # noqa: D102
    def send_abort(self) -> Event | None: ...  # noqa: D102
    def serve(self) -> Event | None: ...  # noqa: D102
    def exit(self) -> Event | None: ...  # noqa: D102


class Side(Generic[State, Action]):
    """One side of a switchover: where it stands by the table, and who performs what that says."""

    def __init__(
        self,
        table: Table[State, Action],
        state: State,
        perform: Callable[[Action], Event | None],
    ) -> None:
        self.state = state
        self._table = table
        self._perform = perform

    def feed(self, event: Event) -> Event | None:
        """Take one event: change the state, then perform the row's actions in their order.

        Returns what one of them has found out, which is to be fed next. Raises KeyError for an
        event that has no row here, changing nothing, and whatever a performer raises.
        """
        self.state, actions = step(self._table, self.state, event)
        for action in actions:
            found = self._perform(action)
            if found is not None:
                return found
        return None


def source(
    performer: SourcePerformer, table: Table[Source, SourceAction] = SOURCE
) -> Side[Source, SourceAction]:
    """A source that serves."""
    return Side(table, Source.SERVING, lambda action: perform_source(performer, action))


def destination(
    performer: DestinationPerformer, table: Table[Destination, DestinationAction] = DESTINATION
) -> Side[Destination, DestinationAction]:
    """A destination that prepares itself."""
    return Side(table, Destination.PREPARING, lambda action: perform_destination(performer, action))


def perform_source(performer: SourcePerformer, action: SourceAction) -> Event | None:
    """Have one action performed; returns what it has found out."""
    match action:
        case SourceAction.RECORD:
            return performer.record()
        case SourceAction.SEND_PIECE:
            return performer.send_piece()
        case SourceAction.FREEZE:
            return performer.freeze()
        case SourceAction.SEND_IMAGE:
            return performer.send_image()
        case SourceAction.EXTEND:
            return performer.extend()
        case SourceAction.SHUT:
            return performer.shut()
        case SourceAction.KILL:
            return performer.kill()
        case SourceAction.TAKE_BACK:
            return performer.take_back()
        case SourceAction.RESUME:
            return performer.resume()
        case SourceAction.HANG_UP:
            return performer.hang_up()
        case SourceAction.RETIRE:
            return performer.retire()
        case SourceAction.INSURE:
            return performer.insure()
        case SourceAction.NAME_SUCCESSOR:
            return performer.name_successor()
        case SourceAction.LET_GO:
            return performer.let_go()
        case SourceAction.PARK:
            return performer.park()
        case SourceAction.EXIT:
            return performer.exit()
        case _:
            assert_never(action)


def perform_destination(performer: DestinationPerformer, action: DestinationAction) -> Event | None:
    """Have one action performed; returns what it has found out."""
    match action:
        case DestinationAction.SEND_GO:
            return performer.send_go()
        case DestinationAction.LOAD_PIECE:
            return performer.load_piece()
        case DestinationAction.LOAD:
            return performer.load()
        case DestinationAction.SEND_ACK:
            return performer.send_ack()
        case DestinationAction.SEND_ABORT:
            return performer.send_abort()
        case DestinationAction.SERVE:
            return performer.serve()
        case DestinationAction.EXIT:
            return performer.exit()
        case _:
            assert_never(action)
