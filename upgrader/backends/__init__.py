# SPDX-License-Identifier: LGPL-2.1-or-later
"""Backends: named FDs plus the state that goes with them, one module a kind.

An FD is recognised by what it is (`Identity`), never by its number or its place in a list.
"""

from upgrader.backends.connection import ConnectionState, Waiting
from upgrader.backends.fd import Identity, Kind, identify
from upgrader.backends.listener import Address, bind, path_inode
from upgrader.fd import Fd

__all__ = [
    "Address",
    "ConnectionState",
    "Fd",
    "Identity",
    "Kind",
    "Waiting",
    "bind",
    "identify",
    "path_inode",
]
