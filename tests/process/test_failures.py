# SPDX-License-Identifier: LGPL-2.1-or-later
"""Versions that do not come up, at every step of loading: the next good one has everything."""

import pytest

from tests.process.chat import Chat, Client
from upgrader.protocol.status_text import Origin

#: Where a version can break, in order, and what of it can be seen.
PLACES = ["start", "attach", "state", "session", "verify"]


def loaded(chat: Chat) -> Client:
    """A connection with state, and half a request on its way."""
    client = chat.connect()
    assert "1 1" == client.ask("add")
    client.send("ad")
    return client


def intact(client: Client) -> None:
    """The request goes on, the counters do, and nobody was told goodbye."""
    client.send("d\n")
    assert "2 2" == client.line()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", ["die", "leave", "refuse"])
def test_a_version_that_breaks(how: str, place: str, chat: Chat) -> None:
    """Killed, gone or refusing at any step: twice in a row, and nothing is lost."""
    chat.start()
    with loaded(chat) as client:
        chat.stop()
        for _ in range(2):
            stderr = chat.fails(version=2, **{"break": f"{how}-{place}"})
            if how == "refuse" and place in ("state", "session", "verify"):
                assert "as told" in stderr
                assert "Traceback" not in stderr.split("During handling")[0].split("chat: ")[-1]
        status = chat.start(version=2)

        assert (2, Origin.RESTART, 1, 0) == (
            status.generation, status.origin, status.source_generation, status.left_behind,
        )  # fmt: skip
        intact(client)


@pytest.mark.parametrize("place", ["start", "state", "verify"])
def test_a_version_that_hangs(place: str, chat: Chat) -> None:
    """It is killed, and nothing is lost."""
    chat.start()
    with loaded(chat) as client:
        chat.stop()
        chat.service.timeout = 1.5
        chat.fails(**{"break": f"hang-{place}"})
        chat.service.timeout = 30
        chat.start()
        intact(client)


def test_a_state_that_cannot_be_read(chat: Chat) -> None:
    """Version 1 cannot read what version 3 says only 2 can: it says both, version 2 loads it."""
    chat.start(version=3, readable_from=2)
    with loaded(chat) as client:
        chat.stop()
        stderr = chat.fails(version=1)
        assert "state 'counters': saved as version 3, readable from version 2 on" in stderr
        assert "this program has version 1" in stderr
        assert "Traceback" not in stderr
        assert 2 == chat.start(version=2).generation
        intact(client)


def test_an_item_that_is_not_declared(chat: Chat) -> None:
    """A version without the listener names what it does not know; the next one has everything."""
    chat.start()
    with loaded(chat) as client:
        chat.stop()
        stderr = chat.fails(no_door=True)
        assert "connection of 'chat', listener of 'chat': in the image, but not declared" in stderr
        chat.start()
        intact(client)


def test_dropped_items_are_let_go(chat: Chat) -> None:
    """A version that says so starts without the door; its connections are closed."""
    chat.start()
    with loaded(chat) as client:
        status = chat.restart(no_door=True, drop=["chat"])

        assert Origin.RESTART is status.origin
        assert client.gone()
    assert "ResourceWarning" not in chat.service.stderr


def test_connections_get_state_for_the_first_time(chat: Chat) -> None:
    """A version that gives its connections state takes over those of one that did not."""
    chat.start(no_session=True)
    with chat.connect() as client:
        assert "1 1" == client.ask("add")
        chat.restart()

        assert "2 1" == client.ask("add")


def test_the_state_of_connections_is_claimed(chat: Chat) -> None:
    """A version without it refuses it by name, or lets it go."""
    chat.start()
    with chat.connect() as client:
        assert "1 1" == client.ask("add")
        chat.stop()
        assert "state 'session' of connections of 'chat': in the image" in chat.fails(
            no_session=True
        )
        chat.start(no_session=True, drop=["session"])

        assert "2 1" == client.ask("add")


def test_a_state_that_cannot_be_saved(chat: Chat) -> None:
    """One connection has it: that one is left behind and named, the others move."""
    chat.start()
    with chat.connect() as odd, chat.connect() as client:
        assert "1 1" == client.ask("add")
        assert "odd" == odd.ask("odd")
        status = chat.restart()

        assert 1 == status.left_behind
        assert "2 2" == client.ask("add")
        assert b"goodbye\n" not in odd.rest()


def test_an_image_that_nobody_can_load(chat: Chat) -> None:
    """After so many attempts the instance starts without it, and keeps and names it."""
    chat.service.environment["UPGRADER_LOAD_ATTEMPTS"] = "3"
    chat.start()
    with loaded(chat) as client:
        chat.stop()
        for _ in range(3):
            chat.fails(**{"break": "die-state"})
        status = chat.start(**{"break": "die-state"})

        assert (2, Origin.COLD, 1) == (status.generation, status.origin, status.set_aside)
        assert "3 attempts to load it have failed" in chat.service.stderr
        assert ["upgrader-aside-1", "upgrader-listener-chat"] == chat.stored
        assert client.gone()
    with chat.connect() as client:
        assert "1 1" == client.ask("add")
        assert 3 == chat.restart().generation
        assert "2 2" == client.ask("add")


@pytest.mark.parametrize("discard", ["all", "1"])
def test_discarding_by_hand(discard: str, chat: Chat) -> None:
    """UPGRADER_DISCARD sets the image aside at once; another generation does not."""
    chat.start()
    with chat.connect() as client:
        assert "1 1" == client.ask("add")
        chat.service.environment["UPGRADER_DISCARD"] = "7"
        chat.restart()
        assert "2 2" == client.ask("add")
        chat.service.environment["UPGRADER_DISCARD"] = "2" if discard == "1" else discard
        status = chat.restart()

        assert (3, Origin.COLD, 2) == (status.generation, status.origin, status.set_aside)
        assert "UPGRADER_DISCARD" in chat.service.stderr
        assert client.gone()


def test_the_kill_switch(chat: Chat) -> None:
    """UPGRADER=off: a plain service, which sets aside what is there, and parks nothing."""
    chat.start()
    with chat.connect() as client:
        assert "1 1" == client.ask("add")
        chat.service.environment["UPGRADER"] = "off"
        status = chat.restart()
        assert Origin.COLD is status.origin
        assert client.gone()
    with chat.connect() as client:
        assert "1 1" == client.ask("add")
        chat.stop()
        assert b"" == client.rest().removesuffix(b"goodbye\n")
    assert ["upgrader-aside-1"] == chat.stored


def test_a_bad_parameter_is_named(chat: Chat) -> None:
    """The variable and its value, without a traceback."""
    chat.service.environment["UPGRADER_DRAIN_TIMEOUT"] = "soon"
    stderr = chat.fails()

    assert "UPGRADER_DRAIN_TIMEOUT: 'soon' is not a time span" in stderr
    assert "Traceback" not in stderr


def test_an_occupied_address_is_named(chat: Chat) -> None:
    """What, and why not, without a traceback."""
    chat.path.write_text("a file")
    stderr = chat.fails()

    assert f"cannot bind unix:{chat.path}: Address already in use" in stderr
    assert "Traceback" not in stderr
    assert "a file" == chat.path.read_text()
