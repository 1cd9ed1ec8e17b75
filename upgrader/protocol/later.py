# SPDX-License-Identifier: LGPL-2.1-or-later
"""Modules that an instance loads once it serves: a start waits for what it needs, and no more.

They are loaded in a thread as soon as the instance is ready (`load_all`), or before, when something
of one is used: the files on disk may be another version's later.
"""

from __future__ import annotations

import sys
import time

from upgrader.protocol.collector import no_collection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from types import ModuleType
    from typing import Any


_PAUSE = 0.001  # seconds


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
_LOADING: set[str] = set()


def later(name: str, *, loading: bool = False) -> Later:
    """What stands for the module `name`. `loading`: an image is loaded with it, while clients wait."""
    if loading:
        _LOADING.add(name)
    return _ALL.setdefault(name, Later(name))


def load_all(also: Sequence[str] = ()) -> None:
    """Load all of them, those that they name, and at last `also`, with a pause after each: clients are
    served meanwhile, and want the interpreter and the CPU."""
    _load_each(_ALL, _PAUSE)
    _load_each(also, _PAUSE)


def load_for_loading() -> None:
    """Load those with which an image is loaded, and those of them that they name."""
    _load_each(_LOADING)


def _load_each(names: Collection[str], pause: float = 0.0) -> None:
    loaded: set[str] = set()
    # A list of all at once: what another thread loads meanwhile may add some.
    while wanted := [name for name in list(names) if name not in loaded]:
        for name in wanted:
            new = name not in sys.modules
            _load(name)
            if new and pause:
                time.sleep(pause)
        loaded.update(wanted)


def names(package: str, places: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """The `__getattr__` of a package whose names are loaded when one asks for them, by the module
    in which each is; PEP 562."""
    place = {name: module for module, names in places.items() for name in names}

    def attribute(name: str) -> object:
        if name not in place:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with no_collection():
            return getattr(_load(f"{package}.{place[name]}"), name)

    return attribute


def _load(name: str) -> ModuleType:
    from importlib import import_module

    return import_module(name)
