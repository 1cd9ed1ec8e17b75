# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where an instance is reached: paths and abstract names, and who has them when."""

import os
import socket
import threading
from pathlib import Path

import pytest

from tests.unit.control import DESCRIBE, Instance, describe, named
from upgrader.instance.control_listener import Places, remove_dead
from upgrader.instance.control_socket import Control
from upgrader.protocol.varlink_client import call


def test_an_abstract_name(instance: Instance) -> None:
    """Of a unit without RuntimeDirectory=: this user is answered, as at a path, and nothing is left
    behind."""
    with named(instance) as sock:
        name = sock.getpeername()
        assert "x" == call(sock, DESCRIBE, {})["service"]
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ConnectionRefusedError):
        sock.connect(name)


def test_a_second_path(tmp_path: Path, control_path: Path, instance: Instance) -> None:
    """An instance that is replaced answers beside the new one, whose path stays when it ends."""
    old = Control(Places(str(control_path)), instance, "1.0")
    old.open()
    beside = tmp_path / "draining-1.sock"
    new = Control(Places(str(control_path)), instance, "1.0")
    new.open()
    old.also_at(str(beside))
    assert "x" == describe(beside)["service"] == describe(control_path)["service"]

    old.close()

    assert not beside.exists()
    assert "x" == describe(control_path)["service"]
    new.close()


def test_one_that_comes_as_another_ends_keeps_its_path(
    tmp_path: Path, control_path: Path, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new instance takes the path just when the old one has seen its own socket there: it is
    the new one's from then on."""
    old = Control(Places(str(control_path)), instance, "1.0")
    old.open()
    new = Control(Places(str(control_path)), instance, "1.0")
    look = os.stat

    def stat(place: str) -> os.stat_result:
        found = look(place)
        monkeypatch.undo()
        new.open()
        return found

    monkeypatch.setattr(os, "stat", stat)
    old.close()

    assert "x" == describe(control_path)["service"]
    assert {control_path, control_path.with_name("status.sock")} == set(tmp_path.iterdir())
    new.close()
    assert [] == list(tmp_path.iterdir())


def test_nobody_reaches_what_is_not_open(tmp_path: Path, instance: Instance) -> None:
    """A new instance has its socket ready, and the old one answers until it takes the place; what
    one that was killed has left is removed."""
    path = tmp_path / "upgrader.sock"
    old = Control(Places(str(path)), instance, "1.0")
    old.open()
    place = path.stat().st_ino
    failed = Control(Places(str(path)), instance, "1.0")
    failed.close()
    both = {path, path.with_name("status.sock")}
    assert (both, place) == (set(tmp_path.iterdir()), path.stat().st_ino)

    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / ".upgrader.sock.1"))
    new = Control(Places(str(path)), instance, "1.0")
    new.open()

    assert both == set(tmp_path.iterdir())
    assert place != path.stat().st_ino
    old.close()
    assert "x" == describe(path)["service"]
    new.close()


def test_an_instance_may_end_before_it_answers(tmp_path: Path, instance: Instance) -> None:
    """At whatever moment: nothing is left, and nobody is reached."""
    control = Control(Places(str(tmp_path / "upgrader.sock")), instance, "1.0")
    control.close()
    control.open()
    control.close()
    assert [] == list(tmp_path.iterdir())
    for _ in range(20):
        control = Control(Places(str(tmp_path / "upgrader.sock")), instance, "1.0")
        opening = threading.Thread(target=control.open)
        opening.start()
        control.close()
        opening.join()
        assert [] == list(tmp_path.iterdir())


def test_sockets_of_the_dead_are_removed(tmp_path: Path, control_path: Path) -> None:
    """Only those on which nobody listens."""
    dead = tmp_path / "draining-1.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))

    remove_dead(str(tmp_path), "*.sock")

    assert (False, True) == (dead.exists(), control_path.exists())
