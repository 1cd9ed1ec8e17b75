# SPDX-License-Identifier: LGPL-2.1-or-later
"""Units of Debian 13 (and of the documentation of gunicorn and Puma) as systemd 257 has them, while they
serve; asserts nothing."""

import json
import socket
from pathlib import Path
from typing import Any

from upgrader.systemd.unit import Unit
from upgrader.tool.adopt_facts import UnitFacts
from upgrader.tool.unit_sockets import OpenSocket

RECORDED = json.loads(Path(__file__).with_name("recorded").joinpath("units.json").read_text())


def facts(name: str, sockets: list[OpenSocket] | None = None, **properties: Any) -> UnitFacts:
    """A recorded unit, with other sockets or properties."""
    recorded = RECORDED[name]
    values = recorded["properties"] | properties
    if sockets is None:
        sockets = [
            OpenSocket(number, socket.SocketKind(kind), address, frozenset({7}), removed)
            for number, (kind, address, removed) in enumerate(recorded["sockets"])
        ]
    return UnitFacts(
        Unit.from_properties("/x", values),
        values,
        tuple(sockets),
        recorded["executable"],
        recorded["pid_file"],
        recorded["activated"],
        "/usr/bin/python3",
    )


def listening(*addresses: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> list[OpenSocket]:
    return [OpenSocket(n, kind, each, frozenset({7})) for n, each in enumerate(addresses)]
