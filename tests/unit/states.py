# SPDX-License-Identifier: LGPL-2.1-or-later
"""State classes that several modules save, load and declare; asserts nothing."""

import dataclasses
from typing import Any

import upgrader


@upgrader.state("room", version=1)
class Room1:
    messages: int = 0


@upgrader.state("room", version=2, readable_from=1)
class Room2:
    messages: int = 0
    topic: str = upgrader.since(2, default="none")


@upgrader.state("room", version=3)
class Room3:
    messages: int = 0
    topic: str = upgrader.since(2, default="none")
    tags: list[str] = upgrader.since(3, default_factory=list)


@dataclasses.dataclass
class Job:
    name: str = ""
    note: Any = None


@dataclasses.dataclass
class Tree:
    more: "dict[int, Tree]" = dataclasses.field(default_factory=dict)
