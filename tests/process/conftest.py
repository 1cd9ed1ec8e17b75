# SPDX-License-Identifier: LGPL-2.1-or-later
"""What process tests share: a service under test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.chat import Chat


@pytest.fixture(params=["aio", "blocking"])
def face(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def chat(face: str, tmp_path: Path) -> Iterator[Chat]:
    chat = Chat(face, tmp_path)
    with chat.service:
        yield chat


@pytest.fixture
def aio_chat(tmp_path: Path) -> Iterator[Chat]:
    chat = Chat("aio", tmp_path)
    with chat.service:
        yield chat
