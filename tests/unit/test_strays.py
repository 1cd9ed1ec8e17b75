# SPDX-License-Identifier: LGPL-2.1-or-later
"""What writes to a state that another instance owns is found, and the state is named."""

import dataclasses

import pytest

import upgrader
from upgrader.errors import Retired
from upgrader.instance import save
from upgrader.instance.parts import InstanceParts


@upgrader.state("ledger")
class Ledger:
    count: int = 0
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    names: set[str] = dataclasses.field(default_factory=lambda: {f"name {n}" for n in range(50)})


@upgrader.state("quiet")
class Quiet:
    count: int = 0


@pytest.mark.parametrize("written", [True, False])
def test_r25_a_stray_writer_is_named(written: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A field cannot be set any more; a dict can, and nothing in it reaches the other instance."""
    parts = InstanceParts("strays", "1", {})
    ledger, quiet = Ledger(), Quiet()
    for value in (ledger, quiet):
        parts.declarations.add_state(type(value)).fill(value)
    ledger.rows["before"] = 1
    manifest, _ = save.build(parts.declarations, 1, "1", [], [])

    parts.source.retire(manifest)
    if written:
        ledger.rows["after"] = 2
    with pytest.raises(Retired):
        ledger.count = 1
    parts.source.tell_strays()

    assert ("state 'ledger' was written to after" in caplog.text) == written
    assert "quiet" not in caplog.text
