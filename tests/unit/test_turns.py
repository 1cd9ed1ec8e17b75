# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns: what a migration waits for, and what never waits for a migration."""

import asyncio
import threading

from upgrader.instance.turns import Turns

DEADLINE = 10.0


def test_a_turn_inside_a_turn_begins_at_once() -> None:
    """The outer one waits for it: both end, and then all is at rest."""
    turns = Turns()
    with turns.turn():
        turns.close()
        with turns.turn():
            assert 2 == len(turns.running)

    assert turns.wait_idle(DEADLINE)


def test_a_task_that_a_turn_has_started_begins_its_own_at_once() -> None:
    """As long as the turn that waits for it runs; another task waits until turns are open again."""

    async def play() -> list[str]:
        turns, said = Turns(), list[str]()

        async def take(name: str) -> None:
            async with turns.turn():
                said.append(name)

        async with turns.turn():
            turns.close()
            await asyncio.wait_for(asyncio.create_task(take("inner")), DEADLINE)
        other = asyncio.create_task(take("other"))
        await asyncio.sleep(0)
        said.append("opened")
        turns.open()
        await asyncio.wait_for(other, DEADLINE)
        return said

    assert ["inner", "opened", "other"] == asyncio.run(play())


def test_those_that_have_begun_are_told_apart_from_later_ones() -> None:
    """A wait ends although something new has begun meanwhile."""
    turns, ended = Turns(), threading.Event()
    turns.watch(ended.set)
    first = turns.turn()
    first.__enter__()
    begun = turns.begun()
    with turns.turn():
        assert turns.run_still(begun)
        first.__exit__(None, None, None)

        assert ended.is_set()
        assert not turns.run_still(begun)
        assert turns.running
