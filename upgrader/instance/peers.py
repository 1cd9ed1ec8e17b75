# SPDX-License-Identifier: LGPL-2.1-or-later
"""All connections that are open at one moment, for their author to say something to all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar, overload

if TYPE_CHECKING:
    from typing import Protocol

    class Writable(Protocol):
        """What a peer stands for."""

        @property
        def unsent(self) -> int:
            """Bytes written and not sent."""

        def queue(self, data: bytes) -> None:
            """Queue data, however much is unsent; raises ConnectionResetError when the peer is gone."""


P = TypeVar("P")

#: Bytes that a peer may have unsent and still be sent more to.
_LIMIT = 1 << 20


class Peers(Sequence[P], Generic[P]):
    """The open connections that handlers of `connections` serve, as a sequence that does not change."""

    def __init__(self, open_now: Sequence[tuple[Writable, P]]) -> None:
        self._open = open_now

    @overload
    def __getitem__(self, index: int) -> P: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[P]: ...
    def __getitem__(self, index: int | slice) -> P | Sequence[P]:
        if isinstance(index, slice):
            return [peer for _, peer in self._open[index]]
        return self._open[index][1]

    def __iter__(self) -> Iterator[P]:
        return (peer for _, peer in self._open)

    def __len__(self) -> int:
        return len(self._open)

    def broadcast(
        self, data: bytes, *, to: Callable[[P], bool] | None = None, limit: int = _LIMIT
    ) -> list[P]:
        """Queue data for all peers at once, or for those for which `to` is true; wait for none.

        Returns the peers that got nothing of it: they are gone, or have more than `limit` bytes
        unsent. Close these, or let them miss it. What is queued moves along in a migration. Raises
        Retired after one.
        """
        missed = []
        for connection, peer in self._open:
            if to and not to(peer):
                continue
            try:
                if connection.unsent > limit:
                    missed.append(peer)
                else:
                    connection.queue(data)
            except ConnectionError:
                missed.append(peer)
        return missed
