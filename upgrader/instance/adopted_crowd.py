# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections that are alike and have moved here, before anything is done for them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from upgrader.instance.adopted import Adopted
from upgrader.instance.frozen import FrozenCrowd
from upgrader.protocol.fd import Fd
from upgrader.protocol.kinds import Waiting

if TYPE_CHECKING:
    from array import array

    from upgrader.protocol.crowd import Crowd


class Member:
    """One that nothing has been done for, as others see it; it may be gone by now."""

    __slots__ = ("_number", "since")

    waiting = Waiting.MESSAGE
    what = ""  # only its handler knows

    def __init__(self, number: int, since: float) -> None:
        self._number = number
        self.since = since

    def fileno(self) -> int:
        """The number that its FD had."""
        return self._number


class AdoptedCrowd:
    """Owns the FDs of a crowd, by their numbers, until they are taken one by one."""

    def __init__(
        self,
        crowd: Crowd,
        numbers: array[int],
        decode: Callable[[bytes], object] | None,
        since: float,
    ) -> None:
        """`numbers`: in the order of the crowd. `decode`: makes a session, of those that are here it has
        made all once; None if there are none. `since`: of `time.monotonic`, for people."""
        self.listener = crowd.backend
        self._crowd = crowd
        self._received = numbers
        self._decode = decode
        self._since = since

    @functools.cached_property
    def _places(self) -> dict[int, int]:
        """The places of those that are here in the crowd, by the numbers of their FDs."""
        return dict(zip(self._received, range(len(self._received)), strict=True))

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, number: object) -> bool:
        return number in self._places

    @property
    def numbers(self) -> list[int]:
        """The numbers of those that are here; asked from any thread."""
        return list(self._places)

    @property
    def members(self) -> list[Member]:
        """Those that are here; asked from any thread."""
        return [Member(number, self._since) for number in self.numbers]

    def take(self, number: int) -> Adopted:
        """One of them by itself, which the caller owns."""
        place, crowd = self._places.pop(number), self._crowd
        state = crowd.state(place)
        session = self._decode(state.session) if self._decode else None
        return Adopted(
            self.listener, Fd(number), crowd.identity(place), state, session, self._since,
            as_it_came=True,
        )  # fmt: skip

    def freeze(self) -> FrozenCrowd:
        """What moves of those that are here, of which there is one at least; nothing changes."""
        frozen = FrozenCrowd(self._crowd, self._received)
        places = self._places
        return frozen if len(places) == len(self._received) else frozen.only([*places.values()])

    def close(self) -> None:
        """Close those that are here."""
        numbers = self.numbers
        self._places.clear()
        for number in numbers:
            with contextlib.suppress(OSError):
                os.close(number)

    def __del__(self) -> None:
        self.close()
