# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures of several unit tests."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

import upgrader
from tests.unit.control import Instance
from tests.unit.copied import Both
from upgrader.instance.control_listener import Places
from upgrader.instance.control_socket import Control


@pytest.fixture(params=["asyncio", "uvloop"])
def loop_factory(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    return uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop


@pytest.fixture
def both() -> Iterator[Both]:
    both = Both()
    yield both
    both.rounds.end()
    assert upgrader.Table is type(both.stock.items)


@pytest.fixture
def instance() -> Instance:
    return Instance()


@pytest.fixture
def control_path(tmp_path: Path, instance: Instance) -> Iterator[Path]:
    """The path of a socket that answers."""
    path = tmp_path / "upgrader.sock"
    answering = Control(Places(str(path)), instance, "1.0")
    answering.open()
    instance.progress.on_change(answering.announce)
    yield path
    answering.close()
    assert not path.exists()
    instance.callers.clear()
    for sock in instance.channels:
        sock.close()
