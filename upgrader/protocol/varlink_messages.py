# SPDX-License-Identifier: LGPL-2.1-or-later
"""Varlink messages as an instance reads and writes them; https://varlink.org/Method-Call."""

import json
from typing import Any

import msgspec


class Call(msgspec.Struct, frozen=True, omit_defaults=True):
    """A method call."""

    method: str
    parameters: dict[str, Any] = {}
    upgrade: bool = False
    more: bool = False
    oneway: bool = False


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """A reply, or an error if `error` is its full name."""

    parameters: dict[str, Any] = {}
    error: str = ""
    continues: bool = False


def encode(message: Call | Reply) -> bytes:
    """A message with its NUL. What is no Unicode, such as a part of a path, is replaced."""
    try:
        return msgspec.json.encode(message) + b"\0"
    except UnicodeEncodeError:
        text = json.dumps(msgspec.to_builtins(message), ensure_ascii=False)
        return text.encode(errors="replace") + b"\0"
