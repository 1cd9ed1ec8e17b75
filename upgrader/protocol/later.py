# SPDX-License-Identifier: LGPL-2.1-or-later
"""Modules that an instance loads once it serves: a start waits for what it needs, and no more.

They are loaded in a thread as soon as the instance is ready (`load_all`), or before, when something
of one is used: the files on disk may be another version's later.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType
    from typing import Any


class Later:
    """Stands for a module, which is loaded when something of it is used."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: ModuleType | None = None

    def __getattr__(self, attribute: str) -> Any:
        if self._module is None:
            self._module = _load(self._name)
        return getattr(self._module, attribute)


_ALL: dict[str, Later] = {}


def later(name: str) -> Later:
    """What stands for the module `name`."""
    return _ALL.setdefault(name, Later(name))


def load_all() -> None:
    """Load all of them, and those that they name."""
    loaded: set[str] = set()
    while wanted := _ALL.keys() - loaded:
        for name in wanted:
            _load(name)
        loaded |= wanted


def names(package: str, places: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """The `__getattr__` of a package whose names are loaded when one asks for them, by the module
    in which each is; PEP 562."""
    place = {name: module for module, names in places.items() for name in names}

    def attribute(name: str) -> object:
        if name not in place:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(_load(f"{package}.{place[name]}"), name)

    return attribute


def _load(name: str) -> ModuleType:
    from importlib import import_module

    return import_module(name)
