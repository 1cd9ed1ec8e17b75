# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make the words and variables by which a program is told which of its FDs are listeners."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from upgrader.errors import DeclarationError
from upgrader.protocol.kinds import show_address
from upgrader.protocol.programs import Passing
from upgrader.protocol.values import Value
from upgrader.systemd.listen_fds import FIRST

if TYPE_CHECKING:
    from upgrader.protocol.identity import HasFileno

_PLACE = re.compile(r"\{(fd|address):([^{}]*)\}")


class Given(Value):
    """One listener as the program gets it: its name, and the address that it is bound to."""

    name: str
    sock: HasFileno
    address: object


def variables(passing: Passing, given: Sequence[Given]) -> dict[str, str]:
    """The variables by which the program finds its FDs, which begin at 3 in this order.

    LISTEN_PID is its own PID, so whoever starts it sets that.
    """
    numbers = range(FIRST, FIRST + len(given))
    match passing:
        case Passing.LISTEN_FDS:
            names = ":".join(each.name for each in given)
            return {"LISTEN_FDS": str(len(given)), "LISTEN_FDNAMES": names}
        case Passing.PHP_FPM:
            pairs = zip(given, numbers, strict=True)
            # fpm_sockets.c has no brackets around an IPv6 address.
            keys = [
                (show_address(g.address).replace("[", "").replace("]", ""), n) for g, n in pairs
            ]
            return {"FPM_SOCKETS": ",".join(f"{key}={number}" for key, number in keys)}
        case Passing.NGINX:
            return {"NGINX": "".join(f"{number};" for number in numbers)}
        case Passing.SERVER_STARTER:
            pairs = zip(given, numbers, strict=True)
            ports = [f"{show_address(each.address)}={number}" for each, number in pairs]
            return {"SERVER_STARTER_PORT": ";".join(ports), "SERVER_STARTER_GENERATION": "1"}
        case Passing.NONE | Passing.HAPROXY:
            return {}


def arguments(words: Sequence[str], given: Sequence[Given]) -> list[str]:
    """A command line with the number of its FD in each place `{fd:NAME}`, and the address in each
    `{address:NAME}`, of the first one if there are several; raises DeclarationError for a name that
    there is not."""
    places: dict[tuple[str, str], str] = {}
    for number, each in enumerate(given, FIRST):
        places.setdefault(("fd", each.name), str(number))
        places.setdefault(("address", each.name), show_address(each.address))
    return [_PLACE.sub(lambda found: _value(found[1], found[2], places), word) for word in words]


def _value(what: str, name: str, places: Mapping[tuple[str, str], str]) -> str:
    if (what, name) not in places:
        raise DeclarationError(f"{{{what}:{name}}}", "there is no such listener")
    return places[what, name]
