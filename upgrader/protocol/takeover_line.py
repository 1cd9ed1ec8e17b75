# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a new process says to takeover: a datagram a word, on a SEQPACKET socket."""

from __future__ import annotations

import json
import socket
from enum import StrEnum

from upgrader.codes import Code
from upgrader.protocol.values import Value

#: Longest datagram, in bytes; a longer reason is cut.
LIMIT = 4096


class Said(StrEnum):
    """How far the new process has come; on the wire."""

    PREPARED = "prepared"  #: the running instance agrees
    COMMITTED = "committed"  #: it owns everything
    FAILED = "failed"  #: it does not take over, and ends


class Word(Value):
    """One datagram; `reason` is for people, and `code` for programs, where it has failed."""

    said: Said
    code: Code = Code.UNKNOWN
    reason: str = ""


def encode(word: Word) -> bytes:
    """A JSON object of at most LIMIT bytes."""
    reason = word.reason
    while True:
        fields = {"said": word.said, "code": word.code, "reason": reason}
        data = json.dumps(fields, ensure_ascii=False).encode(errors="replace")
        if len(data) <= LIMIT:
            return data
        reason = reason[: len(reason) // 2]


def decode(data: bytes) -> Word | None:
    """What was said, or None for what makes no sense."""
    if not data.startswith(b"{"):
        return _decode_1(data)
    try:
        fields = json.loads(data)
        said, code, reason = Said(fields["said"]), fields.get("code"), fields.get("reason", "")
    except (ValueError, RecursionError, LookupError):
        return None
    return Word(said, Code(code), reason if isinstance(reason, str) else "")


def encode_1(word: Word) -> bytes:
    """The same for a takeover of library 0.1.0, which gives no UPGRADER_UPGRADE."""
    text = f"failed: {word.reason}" if word.said is Said.FAILED else word.said
    return text.encode(errors="replace")[:LIMIT]


def _decode_1(data: bytes) -> Word | None:
    said, _, reason = data.decode(errors="replace").partition(": ")
    return Word(Said(said), reason=reason) if said in [*Said] else None


def hear(line: socket.socket) -> tuple[list[Word], bool]:
    """What the new process has said by now, and whether it may say more."""
    words: list[Word] = []
    while True:
        try:
            data = line.recv(LIMIT, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return words, True
        except OSError:
            return words, False
        if not data:
            return words, False
        if word := decode(data):
            words.append(word)
