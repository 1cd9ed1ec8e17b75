# SPDX-License-Identifier: LGPL-2.1-or-later
"""Paths through the model of `protocol`: what one side does about one event is one move."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.unit.protocol import Model, Op, Rules, Unit, World
from upgrader.protocol.switchover import Destination, Event


class Move(NamedTuple):
    """One event with all that follows from it at once: what happens, and the world after it."""

    texts: tuple[str, ...]
    ops: tuple[Op, ...]
    world: World

    @property
    def rows(self) -> tuple[Op, ...]:
        """What of it is a row of a table."""
        return tuple(op for op in self.ops if op.who in ("source", "destination"))


Path = tuple[Move, ...]


def moves(model: Model, world: World, *, faults: bool) -> Iterator[Move]:
    """All that can happen next; with `faults`, what need not happen as well."""
    begins = [*model.successors(world), *(model.faults(world) if faults else ())]
    unfinished = [Move((n.text,), (n.op,) if n.op else (), n.world) for n in begins]
    while unfinished:
        texts, ops, reached = unfinished.pop()
        on = model.in_one_go(reached, texts[0].split(":")[0])
        if not on:
            yield Move(texts, ops, reached)
        for text, after, op in on:
            unfinished.append(Move((*texts, text), (*ops, op) if op else ops, after))


def is_over(world: World) -> bool:
    """Whether the unit has ended: nothing is left to be played."""
    return world.pid1.unit in (Unit.STOPPED, Unit.RESTARTED)


def paths(
    rules: Rules, goes_on: Callable[[World], bool] = lambda world: True
) -> dict[tuple[object, ...], Path]:
    """The shortest path, with one fault at most, to each event that a side may see: in each pair of
    states of both sides, with the image loaded before or not, and for each way in which its actions
    may end; as long as it `goes_on`."""
    model = Model(rules)
    found: dict[tuple[object, ...], Path] = {}
    seen = {(World(), False)}
    level: list[tuple[World, bool, Path]] = [(World(), False, ())]
    while level:
        following: list[tuple[World, bool, Path]] = []
        for world, faulty, path in level:
            faults = set() if faulty else {n.text for n in model.faults(world)}
            for move in moves(model, world, faults=not faulty):
                longer = (*path, move)
                if move.rows:
                    sides = world.source.at, world.destination.at
                    loaded = any(m.world.destination.at is Destination.LOADING for m in path)
                    found.setdefault((*sides, loaded, move.ops), longer)
                reached = move.world, faulty or move.texts[0] in faults
                if reached not in seen and not is_over(move.world) and goes_on(move.world):
                    seen.add(reached)
                    following.append((*reached, longer))
        level = following
    return found


#: What ends a migration before its commit.
_EARLY = {Event.REFUSED, Event.DEADLINE, "no Go, kills", "preparing -> failed"}


def walk(rules: Rules, seed: int) -> Path:
    """A path to wherever it leads; a fault in one move of twenty, and seldom what ends it early."""
    choose = random.Random(seed)
    model, world = Model(rules), World()
    path: list[Move] = []
    while not is_over(world):
        ahead = list(moves(model, world, faults=choose.random() < 0.05))
        if not ahead:
            break
        path += choose.choices(
            ahead, [1 if _EARLY & {*move.texts[0].split(": ")} else 30 for move in ahead]
        )
        world = path[-1].world
    return tuple(path)
