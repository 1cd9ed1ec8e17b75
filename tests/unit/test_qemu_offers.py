# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a QEMU offers is read from its schema, in which types have numbers for names."""

import asyncio
from typing import Any

import pytest

from upgrader.programs.qemu.monitor import QemuError
from upgrader.programs.qemu.offers import offers


class Asked:
    """A session with a QEMU that has this schema."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema

    async def ask(self, command: str) -> Any:
        assert "query-qmp-schema" == command
        if isinstance(self._schema, Exception):
            raise self._schema
        return self._schema


def schema(parameters: list[str], modes: list[str]) -> list[dict[str, Any]]:
    return [
        {"name": "quit", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
        {"name": "migrate-set-parameters", "meta-type": "command", "arg-type": "17"},
        {"name": "17", "meta-type": "object", "members": [
            {"name": each, "default": None, "type": "9" if each == "mode" else "bool"}
            for each in parameters
        ]},
        {"name": "8", "meta-type": "alternate", "members": [{"type": "int"}]},
        {"name": "9", "meta-type": "enum", "values": modes, "members": [{"name": m} for m in modes]},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "modes", "found"),
    [
        (["max-bandwidth"], [], ()),  # 7.2
        (["mode"], ["normal", "cpr-reboot", "cpr-transfer"], ("cpr-transfer",)),  # 10.0
        (["mode"], ["cpr-transfer", "cpr-exec"], ("cpr-transfer", "cpr-exec")),  # 11.1
        (["mode", "local"], ["cpr-exec"], ("cpr-exec", "local")),
    ],
)
def test_what_a_qemu_offers(
    parameters: list[str], modes: list[str], found: tuple[str, ...]
) -> None:
    assert found == asyncio.run(offers(Asked(schema(parameters, modes))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "told", [QemuError("no"), [], {}, [1], [{"name": "migrate-set-parameters"}], None]
)
def test_a_qemu_that_cannot_say(told: Any) -> None:
    """Nothing is known of it, and nothing is made of that."""
    assert () == asyncio.run(offers(Asked(told)))  # type: ignore[arg-type]
