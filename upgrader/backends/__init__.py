# SPDX-License-Identifier: LGPL-2.1-or-later
"""What moves: one module a kind of backend. Identities and the state of a connection are `protocol`'s.

An FD is recognised by what it is, never by its number or its place in a list. Authors import the names
from here; each is loaded when it is first asked for.
"""

from upgrader.protocol.later import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from upgrader.backends.kind import BackendKind
    from upgrader.backends.memory import Memory
    from upgrader.backends.tap import Tap

__all__ = ["BackendKind", "Memory", "Tap"]

_PLACES = {"kind": ("BackendKind",), "memory": ("Memory",), "tap": ("Tap",)}

if not TYPE_CHECKING:
    __getattr__ = names("upgrader.backends", _PLACES)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
