# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turns: what a migration waits for, and what never waits for a migration."""

import asyncio
import gc
import re
import threading
import weakref

from upgrader.instance.turns import Turns, begins_handler, kind

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


def test_p1_the_first_turn_of_what_a_handler_has_started_begins_at_once() -> None:
    """Its client may have its answer already. A loop that a handler has started takes turns on, and
    those wait, as the handler's own do: that is at no safe point meanwhile."""

    async def play() -> list[str]:
        turns, said = Turns(), list[str]()

        async def take(name: str, times: int = 1) -> None:
            for number in range(times):
                async with turns.turn():
                    said.append(f"{name} {number}")

        def take_in_thread() -> None:
            with turns.turn():
                said.append("thread")

        async def handler() -> None:
            begins_handler("door")
            tasks = [asyncio.create_task(take("started", 2))]
            await asyncio.wait_for(asyncio.to_thread(take_in_thread), DEADLINE)
            tasks.append(asyncio.create_task(take("own")))
            await take("handler")
            await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE)

        turns.close()
        handling = asyncio.create_task(handler())
        while len(said) < 3:
            await asyncio.sleep(0)
        said.append("opened")
        turns.open()
        await asyncio.wait_for(handling, DEADLINE)
        return said

    said = asyncio.run(play())
    assert {"started 0", "thread", "own 0"} == set(said[:3])
    assert "opened" == said[3]
    assert {"started 1", "handler 0"} == set(said[4:])


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


def test_r21_a_kind_of_turns_is_held_while_others_begin() -> None:
    """Threads of one pool are of one kind; who refuses an upgrade is told with how long others take."""
    turns, begun = Turns(), threading.Event()

    def work() -> None:
        with turns.turn():
            begun.set()

    with turns.turn():
        pass
    turns.close()
    turns.open(but=frozenset({kind("worker-7")}))
    held = threading.Thread(target=work, name="worker-12", daemon=True)
    held.start()
    with turns.turn():
        (shown,) = turns.shown(turns.begun())
        assert re.fullmatch(
            r"the turn of MainThread for 0.0 s \(the last 1 like it: p99 0.0 s\)", shown
        )
        assert not begun.is_set()
    turns.open()
    assert begun.wait(DEADLINE)
    held.join(DEADLINE)


def test_a_handler_that_has_ended_is_gone() -> None:
    """Without a collection, of which there is none while clients wait: there may be thousands."""

    async def handler() -> None:
        begins_handler("door")

    async def play() -> None:
        gc.disable()
        try:
            task = asyncio.create_task(handler())
            ended = weakref.ref(task)
            await task
            del task
            await asyncio.sleep(0)
            assert ended() is None
        finally:
            gc.enable()

    asyncio.run(play())
