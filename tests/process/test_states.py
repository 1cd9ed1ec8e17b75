# SPDX-License-Identifier: LGPL-2.1-or-later
"""State between versions of a program, up and down: nothing is reset, dropped or lost in silence."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.keys import Kv
from tests.support import eventually
from upgrader.codes import Code
from upgrader.protocol.status_text import Origin
from upgrader.testing import ServiceError


@pytest.fixture
def kv(tmp_path: Path) -> Iterator[Kv]:
    kv = Kv(tmp_path)
    with kv.service:
        yield kv


def test_p6_a_renamed_field_survives_up_and_down(kv: Kv) -> None:
    """It counts on in every direction, and what a downgrade drops is named at its depth."""
    kv.start(1)
    with kv.connect() as client:
        assert "OK" == client.ask("set a 1")
        for number, version in enumerate((2, 1, 2, 2, 1), 2):
            status = kv.upgrade(version)

            assert (Origin.RESTART, 0) == (status.origin, status.left_behind)
            assert str(number) == client.ask("count")
            dropped = "state 'kv': dropped, unknown to this version: values[...].note"
            assert (dropped in kv.service.stderr) == (version == 1)
        assert "1" == client.ask("get a")


@pytest.mark.parametrize(
    ("versions", "without", "message"),
    [
        ((2, 1), "convert_back", r"state 'kv': version 2 has saved no commands, .*convert_back"),
        ((1, 2), "since", r"state 'kv': version 1 has saved no values\[...\].note, .*since\(2"),
    ],
)
def test_p6_a_field_that_nothing_explains_refuses_the_version(
    versions: tuple[int, int], without: str, message: str, kv: Kv
) -> None:
    """It is named, and the version before goes on with all that it had."""
    old, new = versions
    kv.start(old, without=without)
    with kv.connect() as client:
        assert "OK" == client.ask("set a 1")
        with pytest.raises(ServiceError, match=message):
            kv.upgrade(new, without=without)
        kv.start(old)

        assert "1" == client.ask("get a")
        assert "3" == client.ask("count")


def test_p5_a_state_that_cannot_be_saved_takes_nothing_else_down(kv: Kv) -> None:
    """A restart parks all but that state: it is named, counted, and begins anew; the testing kit
    raises."""
    kv.start(1)
    with kv.connect() as client:
        assert "OK" == client.ask("task a")
        assert "2" == client.ask("lines")
        with pytest.raises(ServiceError, match=r"could not save kv: values\['a'\]\.more: .*Task"):
            kv.upgrade(1)
        said = kv.service.stderr
        assert "left behind: state of 'kv': values['a'].more: Encoding objects of type" in said
        status = kv.start(1)

        assert (Origin.RESTART, 1) == (status.origin, status.left_behind)
        assert "3" == client.ask("lines")
        assert "nil" == client.ask("get a")


def test_p5_a_state_that_cannot_be_saved_is_told_as_soon_as_it_serves(kv: Kv) -> None:
    """Not at the first upgrade, months later."""
    kv.start(1, odd=True)

    said = "state 'kv' cannot be saved: values['first'].more: "
    assert eventually(lambda: said in kv.service.stderr)


def test_p5_what_can_be_saved_again_is(kv: Kv) -> None:
    """The state is looked at anew each time."""
    kv.start(1)
    with kv.connect() as client:
        assert "OK" == client.ask("task a")
        assert "OK" == client.ask("drop a")

        assert 0 == kv.upgrade(1).left_behind
        assert "3" == client.ask("count")


def test_p5_no_version_is_blamed_for_a_number_that_its_own_could_not_load(kv: Kv) -> None:
    """A counter that was annotated as an int, and holds half of one: a live upgrade fails for that."""
    kv.start(1)
    with kv.connect() as client:
        assert "OK" == client.ask("half")
        with pytest.raises(ServiceError, match="could not be loaded again") as caught:
            kv.service.live(kv.command(1))

        assert Code.SOURCE_FAILED is caught.value.code
        assert "nil" == client.ask("get a")


def test_p5_the_testing_kit_says_that_nothing_was_parked(kv: Kv) -> None:
    """A plain service: nothing moves, and that is no upgrade."""
    kv.service.environment["UPGRADER"] = "off"
    kv.start(1)

    with pytest.raises(ServiceError, match="has parked nothing"):
        kv.upgrade(1)
