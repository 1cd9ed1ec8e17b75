# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `python -m upgrader.asgi` says of an application."""

from typing import Any

import fastapi
import pytest

from upgrader.asgi import version_of


async def plain(scope: Any, receive: Any, send: Any) -> None: ...


class Module:
    __version__ = "8.2"


@pytest.mark.parametrize(
    ("application", "version"),
    [(fastapi.FastAPI(), ""), (fastapi.FastAPI(version="7.1"), "7.1"), (plain, "")],
    ids=["nothing said", "said", "a function"],
)
def test_the_version_of_an_application(application: object, version: str) -> None:
    """FastAPI gives a version to each application that has none of its own."""
    assert version == version_of(application)
    assert version or "8.2" == version_of(application, Module)
