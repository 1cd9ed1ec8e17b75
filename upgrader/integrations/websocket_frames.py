# SPDX-License-Identifier: LGPL-2.1-or-later
"""Follow the frames that a WebSocket client sends: where a message ends, and what has come since.

RFC 6455, section 5.2. Nothing is decoded and nothing is judged; the library that reads the same bytes does
that.
"""

from __future__ import annotations

#: Bytes of an unfinished message that are kept to move with its connection.
CARRIED = 1 << 20

_FIN, _MASKED = 0x80, 0x80
_CLOSE = 0x8  # an opcode; from here on they are control frames
_TWO_BYTES, _EIGHT_BYTES = 126, 127  # what stands for a length that follows
_MASK = 4  # bytes


class Frames:
    """What has come since the opening handshake.

    `messages` counts those that have come whole. `rest` is what has come since the last of them, of an
    unfinished message or frame; None if that is more than `CARRIED` bytes. `closing` is set once a
    close frame has come.
    """

    __slots__ = ("_head", "_in_message", "_left", "_opcode", "closing", "messages", "rest")

    def __init__(self) -> None:
        self.messages = 0
        self.closing = False
        self.rest: bytearray | None = bytearray()
        self._head = b""  # of a frame whose head has not come whole
        self._left = 0  # bytes of a frame that are still to come
        self._opcode = 0  # of that frame, with its FIN bit
        self._in_message = False  # a fragment has come, and not the last one

    def feed(self, data: bytes) -> None:
        """Take what has come next."""
        begin = at = 0  # of what belongs to the rest; of what is looked at
        size = len(data)
        while at < size:
            if self._left:
                step = min(self._left, size - at)
                self._left -= step
                at += step
            else:
                before = len(self._head)
                head = self._head + data[at : at + 14 - before] if before else data[at : at + 14]
                length = _head_length(head)
                if len(head) < length:
                    self._head = head
                    break
                self._head = b""
                at += length - before
                self._opcode = head[0] & 0x8F
                self._left = _data_length(head)
            if not self._left and self._ends():
                begin, self.rest = at, bytearray()
        if self.rest is not None and begin < size:
            self.rest += data[begin:]
            if len(self.rest) > CARRIED:
                self.rest = None

    def _ends(self) -> bool:
        """A frame has come whole; whether nothing is unfinished then."""
        kind = self._opcode & 0xF
        if kind >= _CLOSE:
            self.closing |= kind == _CLOSE
            return not self._in_message
        self._in_message = not self._opcode & _FIN
        self.messages += not self._in_message
        return not self._in_message


def _head_length(head: bytes) -> int:
    """How long the head of a frame is, as far as it is known; at least 2 bytes."""
    if len(head) < 2:
        return 2
    kind = head[1] & 0x7F
    extended = 2 if kind == _TWO_BYTES else 8 if kind == _EIGHT_BYTES else 0
    return 2 + extended + (_MASK if head[1] & _MASKED else 0)


def _data_length(head: bytes) -> int:
    kind = head[1] & 0x7F
    if kind == _TWO_BYTES:
        return int.from_bytes(head[2:4], "big")
    return int.from_bytes(head[2:10], "big") if kind == _EIGHT_BYTES else kind
