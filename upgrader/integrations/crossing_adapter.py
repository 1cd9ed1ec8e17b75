# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the adapters of all libraries have in common whose WebSockets can move."""

from __future__ import annotations

from typing import Any

import msgspec

from upgrader.aio.adapter import Adapter
from upgrader.integrations.crossing import Handshake, Traffic


class CrossingAdapter(Adapter):
    """Its movable protocols have a `crossing`."""

    says_goodbye = True

    def __init__(self) -> None:
        self._traffic = Traffic()

    def secret(self, protocol: Any) -> bytes:
        """Its opening handshake, and what its handler has left."""
        return msgspec.msgpack.encode(protocol.crossing.handshake())

    def unfinished(self, protocol: Any) -> bytes:
        """The beginning of the next message."""
        return bytes(protocol.crossing.frames.rest or b"")

    @property
    def last_said(self) -> float:
        """On any WebSocket."""
        return self._traffic.last

    def in_hand(self) -> tuple[int, int]:
        """On WebSockets."""
        counts = self._traffic.in_hand.values()
        return sum(counts), len(counts)


def opened_with(secret: bytes) -> Handshake:
    """What `secret` has returned; raises msgspec.DecodeError for anything else."""
    return msgspec.msgpack.decode(secret, type=Handshake)
