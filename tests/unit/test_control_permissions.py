# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may ask what of an instance: its user everything, everybody what all may know."""

import contextlib
import os
import socket
from pathlib import Path

import pytest

from tests.support import SETTLE
from tests.unit.control import DESCRIBE, Instance, connected, is_dropped, named
from upgrader.instance import control_socket
from upgrader.instance.control_listener import Caller, Places
from upgrader.instance.control_socket import Control
from upgrader.instance.self_description import public
from upgrader.protocol import varlink
from upgrader.protocol.rendezvous import socket_name
from upgrader.protocol.varlink import INTERFACE, VarlinkError
from upgrader.protocol.varlink_client import call, watch
from upgrader.protocol.varlink_types import Connection, Description, Last, Loaded, Started, Trial


def test_only_the_user_gets_in(control_path: Path) -> None:
    """The socket's own mode is 0600, whatever the directory allows."""
    assert 0o600 == control_path.stat().st_mode & 0o777


WHOLE = [
    "QueryMigration", "SetParameters", "Cancel", "TryStates", "Settle", "Withdraw", "Execute",
    "Expect", "Preflight", "Rehearse", "Reload", "Register", "Revoke", "Migrate", "Lend",
]  # fmt: skip


def refused_to_readers(sock: socket.socket) -> None:
    """One who may only read is told what everybody may know, and does nothing."""
    for name in WHOLE:
        with pytest.raises(VarlinkError, match="PermissionDenied"):
            call(sock, f"{INTERFACE}.{name}", {"pid": 1}, upgrade=name in ("Migrate", "Lend"))
    with pytest.raises(VarlinkError, match="PermissionDenied"):
        next(watch(sock, f"{INTERFACE}.QueryMigration"))
    assert {"service": "x", "partial": True} == call(sock, DESCRIBE, {})
    assert "upgrader" == call(sock, f"{varlink.SERVICE}.GetInfo", {})["product"]


def test_everybody_may_read(control_path: Path, instance: Instance) -> None:
    """At a socket beside the other one, whoever calls: root is told no more there, either."""
    beside = control_path.with_name("status.sock")
    assert 0o666 == beside.stat().st_mode & 0o777
    with connected(beside) as sock:
        refused_to_readers(sock)
    with connected(control_path) as sock:
        assert "partial" not in call(sock, DESCRIBE, {})
    assert [] == instance.callers + instance.upgrades + instance.channels


def test_readers_take_nobody_s_place(
    control_path: Path, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many connect: of one user few are kept, and of all users not many more."""
    beside = control_path.with_name("status.sock")
    monkeypatch.setattr(control_socket, "MAX_CLIENTS", 3)
    uids = [0, *[5] * 20, 6]
    monkeypatch.setattr(control_socket, "caller_at", lambda sock: Caller(1, uids.pop(0)))
    with contextlib.ExitStack() as clients:
        own = clients.enter_context(connected(control_path))
        assert "x" == call(own, DESCRIBE, {})["service"]
        flood = [clients.enter_context(connected(beside)) for _ in range(20)]
        honest = clients.enter_context(connected(beside))
        assert call(honest, DESCRIBE, {})["partial"]
        assert all(is_dropped(sock) for sock in flood[: -control_socket.MAX_READERS_OF_ONE])
        assert call(flood[-1], DESCRIBE, {})["partial"]
        uids += range(100, 100 + 2 * control_socket.MAX_READERS)
        others = [
            clients.enter_context(connected(beside)) for _ in range(2 * control_socket.MAX_READERS)
        ]
        assert all(is_dropped(sock) for sock in others[: -control_socket.MAX_READERS])
        assert "x" == call(own, DESCRIBE, {})["service"]


def test_what_everybody_may_know() -> None:
    """Nothing of who is connected, of variables and modules, of what root has set, or of a state."""
    secret = Trial("s", problem="secret", bytes=77)
    given = Started(environment={"secret": "secret"}, command="c", credentials=["key"])
    said = Description(
        "web", unit="web.service", pid=7, credentials="secret", late=["secret"], trials=[secret],
        held=[Connection("b", peer="secret", what="secret")], overrides={"secret": "secret"},
        upgrade="secret", started=given, last=Last("id", reason="why"), interface=2, loaded=Loaded(stayed={"secret": 1}),
        changed=[f"/{number}" for number in range(1000)],
    )  # fmt: skip
    told = public(said)

    assert "secret" not in repr(told)
    assert ("web.service", 7, "why", "c") == (told.unit, told.pid, told.last.reason, given.command)
    assert (True, 100, "s", 0) == (
        told.partial,
        len(told.changed),
        told.trials[0].name,
        told.trials[0].bytes,
    )


def test_an_abstract_name_is_read_by_all(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can connect to it, and is told what everybody may know."""
    monkeypatch.setattr(control_socket, "caller_at", lambda sock: Caller(1, os.geteuid() + 1))
    with named(instance) as sock:
        refused_to_readers(sock)


def test_who_may_not_ask_takes_nobody_s_place(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often somebody connects who may not, few of them are kept, and one who may is served."""
    uids = [os.geteuid(), *[os.geteuid() + 1] * 50]
    monkeypatch.setattr(control_socket, "caller_at", lambda sock: Caller(1, uids.pop(0)))
    name = socket_name(os.urandom(16).hex())
    answering = Control(Places(name), instance, "1.0")
    answering.open()
    with contextlib.ExitStack() as stack:
        stack.callback(answering.close)
        own, *others = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(51)]
        for sock in (own, *others):
            sock.connect(name)  # which waits while the backlog is full
            sock.settimeout(SETTLE)
        assert "x" == call(own, DESCRIBE, {})["service"]
        assert all(is_dropped(sock) for sock in others[: -control_socket.MAX_READERS_OF_ONE])
        assert call(others[-1], DESCRIBE, {})["partial"]
