# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cut received bytes that are not handled yet into whole messages; does no IO.

Only whole messages leave: what is here when an instance is frozen moves along, unread.
"""

from __future__ import annotations

from collections.abc import Callable

from upgrader.errors import DeclarationError, UpgradeError

#: How a message ends: at a separator, or where a function says. It gets the buffer and returns
#: the length of the first whole message in bytes, or None while that is still incomplete.
Frame = bytes | Callable[[bytearray], int | None]


class MessageTooLong(UpgradeError):
    """A message is longer than `limit` bytes; nothing was taken from the connection."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"message longer than {limit} bytes")
        self.limit = limit


class Inbox:
    """The unread bytes of one connection."""

    __slots__ = ("_scanned", "_separator", "buffer")

    def __init__(self, unread: bytes = b"") -> None:
        self.buffer = bytearray(unread)
        self._scanned = 0  # no separator begins before here: keeps slow senders linear
        self._separator = b""

    def take_message(self, frame: Frame, limit: int) -> bytes | None:
        """The next whole message (with its separator), or None.

        Raises MessageTooLong, and DeclarationError for a frame that would give empty messages for
        ever.
        """
        if not self.buffer:
            return None
        length = self._find(frame) if isinstance(frame, bytes) else frame(self.buffer)
        if length is None:
            if len(self.buffer) > limit:
                raise MessageTooLong(limit)
            return None
        if length < 1:
            raise DeclarationError("frame", f"gives a message of {length} bytes")
        if length > limit:
            raise MessageTooLong(limit)
        return self.take(length) if length <= len(self.buffer) else None

    def take(self, size: int) -> bytes:
        """At most `size` bytes from the front."""
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        self._scanned = 0
        return taken

    def _find(self, separator: bytes) -> int | None:
        if separator != self._separator:
            self._separator, self._scanned = separator, 0
        at = self.buffer.find(separator, self._scanned)
        if at < 0:
            self._scanned = max(0, len(self.buffer) - len(separator) + 1)
            return None
        return at + len(separator)
