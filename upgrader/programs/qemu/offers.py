# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which ways of its own a QEMU has to go on in another QEMU on the same host, as its QMP schema says.

None of them is used; docs/qemu.md has the reasons. An admin sees them in `upgrader status`.
"""

from collections.abc import Mapping

import msgspec

from upgrader.programs.qemu.monitor import Monitor, QemuError

_COMMAND = "migrate-set-parameters"
#: Of its parameter `mode`, CPR in the documentation of QEMU: with the RAM, in a new process or in the same.
_MODES = ("cpr-transfer", "cpr-exec")
#: Its parameter by which backends such as a TAP are sent along.
_LOCAL = "local"


class _Member(msgspec.Struct, frozen=True):
    name: str = ""
    type: str = ""


class _Entity(msgspec.Struct, frozen=True, rename="kebab"):
    """SchemaInfo of the QMP reference, as far as it is read here."""

    name: str
    meta_type: str
    arg_type: str = ""
    members: list[_Member] = []


async def offers(monitor: Monitor) -> tuple[str, ...]:
    """Ask a QEMU; nothing if it cannot say."""
    try:
        entities = msgspec.convert(await monitor.ask("query-qmp-schema"), list[_Entity])
    except (QemuError, msgspec.ValidationError):
        return ()
    commands = {each.name: each for each in entities if each.meta_type == "command"}
    types = {each.name: each for each in entities if each.meta_type != "command"}
    parameters = _members(types, commands[_COMMAND].arg_type) if _COMMAND in commands else {}
    modes = _members(types, parameters.get("mode", ""))
    return (*(n for n in _MODES if n in modes), *([_LOCAL] if _LOCAL in parameters else []))


def _members(types: Mapping[str, _Entity], name: str) -> dict[str, str]:
    """The types of the members of a type, by their names."""
    found = types.get(name)
    return {each.name: each.type for each in found.members} if found else {}
