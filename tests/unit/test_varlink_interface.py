# SPDX-License-Identifier: LGPL-2.1-or-later
"""The description of the interface: it says what is sent."""

import re

import msgspec
import pytest

from upgrader.protocol import varlink_interface
from upgrader.protocol.varlink_types import (
    Backend,
    Connection,
    Description,
    Last,
    Loaded,
    Migration,
    Refusal,
    ReplayCounts,
    RunProgram,
    Started,
    Trial,
)

STRUCTS = [
    Backend, Connection, Migration, Last, Loaded, Refusal, ReplayCounts, RunProgram, Started, Trial, Description,
]  # fmt: skip


@pytest.mark.parametrize("struct", STRUCTS)
def test_the_interface_has_the_fields_of_the_values(struct: type[msgspec.Struct]) -> None:
    """What is described is what is sent, in the types of Varlink."""
    kinds = {str: "string", int: "int", float: "float", bool: "bool"}
    match = re.search(
        r"method Describe\(\) -> \(\n(.*?)\n\)"
        if struct is Description
        else rf"type {struct.__name__} \(\n(.*?)\n\)",
        varlink_interface.DESCRIPTION,
        re.DOTALL,
    )
    assert match is not None
    described = dict(line.strip().rstrip(",").split(": ") for line in match[1].splitlines())

    assert list(struct.__struct_fields__) == list(described)
    for field in msgspec.structs.fields(struct):
        if field.type in kinds:
            assert kinds[field.type] == described[field.name]
