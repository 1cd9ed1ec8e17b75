# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes down each call of a function of upgrader, in every Python that finds this module first.

A line is `about module:function` or `. module:function`: the first kind has the connection whose inode is
in the file `inode` among its arguments.
"""

import os
import sys
import threading
from types import FrameType
from typing import Any

CO_OPTIMIZED = 1  # a function; inspect has it, and is not loaded for that
PLACE = os.environ.get("WALK", "")
INODE: list[int] = []


def ours(frame: FrameType) -> str:
    """The module and the name of a function of upgrader; empty for another one."""
    code = frame.f_code
    _, found, path = code.co_filename.rpartition("/upgrader/")
    if not found or not code.co_flags & CO_OPTIMIZED or "<" in code.co_qualname.rpartition(".")[2]:
        return ""  # the body of a class or of a module, or a comprehension
    return f"{path.removesuffix('.py').removesuffix('/__init__')}:{code.co_qualname}"


def inode() -> int:
    """Of the connection, once there is one."""
    if not INODE:
        try:
            with open(f"{PLACE}/inode") as file:
                INODE.append(int(file.read()))
        except (OSError, ValueError):
            return -1
    return INODE[0]


def is_about(value: object, deep: int = 1) -> bool:
    """Whether it is the connection, or has it: as an attribute, or as an item."""
    if isinstance(value, int | str | bytes | float | bool | None):
        return False
    if isinstance(value, list | tuple | set | dict):
        items = list(value.values() if isinstance(value, dict) else value)
        return any(is_about(each, deep) for each in items[:50])
    try:
        number = value.fileno()  # type: ignore[attr-defined]
        if number >= 0 and os.fstat(number).st_ino == inode():
            return True
    except Exception:  # it has none, or that is closed
        pass
    if not deep or not type(value).__module__.startswith(("upgrader.", "_socket", "socket")):
        return False
    names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
    names += getattr(type(value), "__struct_fields__", ())
    parts = [getattr(value, name, None) for name in names]
    return any(is_about(part, 0) for part in parts if not isinstance(part, list | dict))


def heard(frame: FrameType, event: str, argument: Any) -> None:
    """Write down one call."""
    if event == "call" and (name := ours(frame)):
        values = [frame.f_locals.get(each) for each in frame.f_code.co_varnames[:8]]
        kind = "about" if inode() >= 0 and any(map(is_about, values)) else "."
        os.write(OUT, f"{kind} {name}\n".encode())


if PLACE:
    OUT = os.open(f"{PLACE}/{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.setprofile(heard)
    threading.setprofile(heard)
