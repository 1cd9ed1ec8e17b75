# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures of several unit tests."""

import asyncio
from collections.abc import Callable, Iterator

import pytest
import uvloop

import upgrader
from tests.unit.copied import Both


@pytest.fixture(params=["asyncio", "uvloop"])
def loop_factory(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    return uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop


@pytest.fixture
def both() -> Iterator[Both]:
    both = Both()
    yield both
    both.rounds.end()
    assert upgrader.Table is type(both.stock.items)
