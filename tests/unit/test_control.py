# SPDX-License-Identifier: LGPL-2.1-or-later
"""The instance's socket: calls, limits, and what a client cannot do to the others."""

import array
import contextlib
import json
import os
import re
import resource
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support import SETTLE, eventually
from upgrader.codes import Code
from upgrader.instance import control_socket
from upgrader.instance.control_listener import Caller, Places, remove_dead
from upgrader.instance.control_socket import Control
from upgrader.instance.phases import News, Phases
from upgrader.instance.self_description import public
from upgrader.protocol import varlink, varlink_interface
from upgrader.protocol.phase import Phase
from upgrader.protocol.rendezvous import socket_name
from upgrader.protocol.varlink import INTERFACE, VarlinkError
from upgrader.protocol.varlink_client import call, watch
from upgrader.protocol.varlink_messages import Call, encode
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

DESCRIBE = f"{INTERFACE}.Describe"


class Instance:
    """Answers as told."""

    def __init__(self) -> None:
        self.callers: list[Caller] = []
        self.progress = Phases()
        self.reloading = threading.Event()
        self.reloaded = threading.Event()
        self.channels: list[socket.socket] = []
        self.big = ""
        self.upgrades: list[str] = []
        self.revoked = ("", Code.UNKNOWN)

    def describe(self) -> dict[str, Any]:
        return {"service": "x", "version": self.big}

    def describe_to_all(self) -> dict[str, Any]:
        return {"service": "x", "partial": True}

    def query(self) -> News:
        return self.progress.news

    def set_parameters(self, caller: Caller, parameters: dict[str, Any]) -> dict[str, Any]:
        raise varlink.invalid("parameters")

    def cancel(self, caller: Caller) -> dict[str, Any]:
        raise varlink.denied()

    def expect(self, caller: Caller, upgrade: str) -> None:
        self.callers.append(caller)
        self.upgrades.append(upgrade)

    def preflight(self, caller: Caller, upgrade: str) -> None:
        self.upgrades.append(upgrade)

    def withdraw(self, caller: Caller, upgrade: str) -> dict[str, Any]:
        raise varlink.denied()

    def reload(self, caller: Caller) -> None:
        self.reloading.set()
        self.reloaded.wait(SETTLE)

    def register(self, caller: Caller, pid: int, upgrade: str) -> None:
        self.callers.append(Caller(pid, caller.uid))

    def revoke(self, caller: Caller, pid: int, why: str, code: Code) -> None:
        self.revoked = why, code

    def try_states(self, caller: Caller) -> dict[str, Any]:
        return {"trials": []}

    def negotiate(self, caller: Caller, parameters: dict[str, Any]) -> dict[str, Any]:
        return {"generation": 7}

    def migrate(self, sock: socket.socket) -> None:
        self.channels.append(sock)


@pytest.fixture
def instance() -> Instance:
    return Instance()


@pytest.fixture
def control_path(tmp_path: Path, instance: Instance) -> Iterator[Path]:
    """The path of a socket that answers."""
    path = tmp_path / "upgrader.sock"
    answering = Control(Places(str(path)), instance, "1.0")
    answering.open()
    instance.progress.on_change(answering.announce)
    yield path
    answering.close()
    assert not path.exists()
    instance.callers.clear()
    for sock in instance.channels:
        sock.close()


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(path))  # which waits while the backlog is full
        sock.settimeout(SETTLE)
        yield sock


def describe(path: Path) -> Any:
    with connected(path) as sock:
        return call(sock, DESCRIBE, {})


def is_dropped(sock: socket.socket) -> bool:
    """Whether the connection is closed by the other side, whatever was in flight."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def test_only_the_user_gets_in(control_path: Path) -> None:
    """The socket's own mode is 0600, whatever the directory allows."""
    assert 0o600 == control_path.stat().st_mode & 0o777


def test_calls_are_answered_in_order(control_path: Path, instance: Instance) -> None:
    """Several at once, in pieces; one with oneway gets no answer, and is done."""
    with connected(control_path) as sock:
        data = b"".join(
            encode(each)
            for each in (
                Call(f"{INTERFACE}.Expect", oneway=True),
                Call(DESCRIBE),
                Call(f"{INTERFACE}.Register", {"pid": 5}),
                Call(f"{varlink.SERVICE}.GetInfo", more=True),
            )
        )
        for byte in range(0, len(data), 7):
            sock.sendall(data[byte : byte + 7])
        with sock.makefile("rb") as file:
            buffer = b""
            while buffer.count(b"\0") < 3:
                buffer += file.read1()
    first, second, third, _ = buffer.split(b"\0")

    assert "x" == json.loads(first)["parameters"]["service"]
    assert "error" not in json.loads(second)
    assert "upgrader" == json.loads(third)["parameters"]["product"]
    assert [os.getpid(), 5] == [caller.pid for caller in instance.callers]
    assert not instance.callers[0].gone


@pytest.mark.parametrize(
    ("method", "parameters", "name"),
    [
        (f"{INTERFACE}.Nothing", {}, "MethodNotFound"),
        ("Describe", {}, "InterfaceNotFound"),
        ("x.y.Describe", {}, "InterfaceNotFound"),
        (f"{INTERFACE}.Register", {"pid": True}, "InvalidParameter"),
        (f"{INTERFACE}.Register", {"pid": "1"}, "InvalidParameter"),
        (f"{INTERFACE}.Migrate", {}, "InvalidParameter"),
        (f"{INTERFACE}.Cancel", {}, "PermissionDenied"),
        (f"{INTERFACE}.Expect", {"upgrade": 3}, "InvalidParameter"),
        (f"{INTERFACE}.Expect", {"upgrade": "a b"}, "InvalidParameter"),
        (f"{INTERFACE}.Register", {"pid": 1, "upgrade": "0" * 31}, "InvalidParameter"),
        (f"{INTERFACE}.Revoke", {"pid": 1, "why": 1}, "InvalidParameter"),
        (f"{varlink.SERVICE}.GetInterfaceDescription", {"interface": 3}, "InvalidParameter"),
        (f"{varlink.SERVICE}.GetInterfaceDescription", {"interface": "a.b"}, "InterfaceNotFound"),
    ],
)
def test_errors_have_a_name(control_path: Path, method: str, parameters: Any, name: str) -> None:
    """What is wrong has the name that the standard gives it, and the connection goes on."""
    with connected(control_path) as sock:
        with pytest.raises(VarlinkError) as caught:
            call(sock, method, parameters)
        assert name == caught.value.name
        assert "x" == call(sock, DESCRIBE, {})["service"]


def test_what_interface_1_does_not_say(control_path: Path, instance: Instance) -> None:
    """A tool and a takeover of it name no upgrade and give no code, and call a preflight otherwise."""
    with connected(control_path) as sock:
        for method in ("Expect", "Preflight", "Rehearse"):
            call(sock, f"{INTERFACE}.{method}", {})
            call(sock, f"{INTERFACE}.{method}", {"upgrade": "0" * 32})
        call(sock, f"{INTERFACE}.Revoke", {"pid": 1, "why": "no"})
        assert ("no", Code.UNKNOWN) == instance.revoked
        call(sock, f"{INTERFACE}.Revoke", {"pid": 1, "why": "no", "code": "verify-failed"})
        assert ("no", Code.VERIFY_FAILED) == instance.revoked

    assert ["", "0" * 32] * 3 == instance.upgrades


def test_an_abstract_name(instance: Instance) -> None:
    """Of a unit without RuntimeDirectory=: this user is answered, as at a path, and nothing is left
    behind."""
    name = socket_name(os.urandom(16).hex())
    answering = Control(Places(name), instance, "1.0")
    answering.open()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(SETTLE)
        sock.connect(name)
        assert "x" == call(sock, DESCRIBE, {})["service"]
    answering.close()
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ConnectionRefusedError):
        sock.connect(name)


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
    name = socket_name(os.urandom(16).hex())
    answering = Control(Places(name), instance, "1.0")
    answering.open()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(SETTLE)
        sock.connect(name)
        refused_to_readers(sock)
    answering.close()


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


def test_what_is_no_unicode_is_replaced(control_path: Path, instance: Instance) -> None:
    """In a question and in an answer: a path may have anything in it."""
    instance.big = "/srv/caf\udce9"
    assert "/srv/caf?" == describe(control_path)["version"]
    with connected(control_path) as sock, pytest.raises(VarlinkError) as raised:
        call(sock, f"{INTERFACE}.\udce9", {"\udce9": "\udce9"})
    assert raised.value.parameters == {"method": f"{INTERFACE}.?"}


NO_CALLS = [
    b"{\0",
    b"[]\0",
    b'{"method": 1}\0',
    b"\xff\0",
    b"\0",
    b"[" * 100_000 + b"\0",
    b'{"method": "x", "parameters": {"a": ' + b"[" * 500 + b"]" * 500 + b"}}\0",
    b'{"method": "x", "parameters": {"a": ' + b"9" * 400 + b"}}\0",
    b'{"method": "x", "parameters": {"a": NaN}}\0',
    b'{"method": "\\ud800"}\0',
]


@pytest.mark.parametrize("data", NO_CALLS, ids=lambda data: repr(data[:20]))
def test_what_is_no_call_ends_the_connection(control_path: Path, data: bytes) -> None:
    """Others are answered as ever."""
    with connected(control_path) as sock:
        sock.sendall(data)
        assert is_dropped(sock)
    assert "x" == describe(control_path)["service"]


def test_an_answer_that_fails_ends_no_thread(
    control_path: Path,
    instance: Instance,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever has asked is told; others are answered as ever."""

    def fail(caller: Caller, upgrade: str = "") -> None:
        raise RecursionError("too deep")

    for name, method in (("expect", "Expect"), ("reload", "Reload")):
        monkeypatch.setattr(instance, name, fail)
        with connected(control_path) as sock, pytest.raises(VarlinkError, match="RecursionError"):
            call(sock, f"{INTERFACE}.{method}", {})
    assert "x" == describe(control_path)["service"]
    caplog.clear()  # a traceback keeps what its frames have open


def test_a_message_without_end(control_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken up to a limit only."""
    monkeypatch.setattr(varlink, "LIMIT", 1000)
    with connected(control_path) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(b"x" * 5000)
        assert is_dropped(sock)


def test_more_calls_than_answers(
    control_path: Path, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that asks on while its call is not answered is cut off at a limit, too."""
    monkeypatch.setattr(varlink, "LIMIT", 1000)
    with connected(control_path) as sock:
        sock.sendall(encode(Call(f"{INTERFACE}.Reload")))
        assert instance.reloading.wait(SETTLE)
        with contextlib.suppress(OSError):
            for _ in range(100):
                sock.sendall(encode(Call(DESCRIBE)))
        assert is_dropped(sock)
        instance.reloaded.set()
    assert "x" == describe(control_path)["service"]
    assert eventually(lambda: "upgrader-call" not in {t.name for t in threading.enumerate()})


def test_answers_that_nobody_reads(
    control_path: Path, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not kept without a limit."""
    monkeypatch.setattr(control_socket, "MAX_UNREAD", 100_000)
    instance.big = "x" * 300_000
    with connected(control_path) as sock:
        with contextlib.suppress(OSError):
            for _ in range(20):
                sock.sendall(encode(Call(DESCRIBE)))
        hangup = select.poll()
        hangup.register(sock, 0)  # reading, even to the end, would take what must not be taken
        assert hangup.poll(SETTLE * 1000)


def test_an_answer_larger_than_a_socket_buffer(control_path: Path, instance: Instance) -> None:
    """It arrives whole, and nobody waits for the one who reads it slowly."""
    instance.big = "x" * 900_000
    with connected(control_path) as slow:
        slow.sendall(encode(Call(DESCRIBE)))
        assert instance.big == describe(control_path)["version"]
        buffer = bytearray()
        while (message := varlink.take(buffer)) is None:
            buffer += slow.recv(4096)
        assert instance.big == json.loads(message)["parameters"]["version"]


def test_a_slow_call_holds_up_nobody(control_path: Path, instance: Instance) -> None:
    """While the service is busy with a reload, others are answered; then the reload is."""
    with connected(control_path) as sock:
        sock.sendall(encode(Call(f"{INTERFACE}.Reload")))
        assert instance.reloading.wait(SETTLE)
        assert "x" == describe(control_path)["service"]
        instance.reloaded.set()
        assert b"{}\0" == sock.recv(100)


def test_one_connection_too_many(control_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has been silent for longest goes, so that nobody can keep others out."""
    monkeypatch.setattr(control_socket, "MAX_CLIENTS", 3)
    with contextlib.ExitStack() as clients:
        first, *_ = [clients.enter_context(connected(control_path)) for _ in range(3)]
        assert "x" == call(first, DESCRIBE, {})["service"]
        second = clients.enter_context(connected(control_path))
        assert "x" == call(second, DESCRIBE, {})["service"]
        assert "x" == call(first, DESCRIBE, {})["service"]


def test_a_silent_connection(control_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed after a while; one that waits for the phases of a migration is not."""
    monkeypatch.setattr(control_socket, "IDLE", 0.05)
    with connected(control_path) as watching, connected(control_path) as silent:
        phases = watch(watching, f"{INTERFACE}.QueryMigration")
        assert next(phases)
        assert is_dropped(silent)
        watching.setblocking(False)
        with pytest.raises(BlockingIOError):
            watching.recv(1)


def test_every_phase_is_told_once(control_path: Path, instance: Instance) -> None:
    """To all who asked with `more`, however fast one follows the other; the last reply says that it
    is the last, and then the connection takes calls again."""
    phases = [Phase.COLLECTING, Phase.FROZEN, Phase.LOADING, Phase.COMMITTED, Phase.DONE]
    with connected(control_path) as one, connected(control_path) as two:
        told = [watch(sock, f"{INTERFACE}.QueryMigration") for sock in (one, two)]
        assert ["none", "none"] == [next(each)["migration"]["phase"] for each in told]
        instance.progress.begin("live", 3)
        for phase in phases:
            instance.progress.enter(phase)
        for each in told:
            assert ["setup", *phases] == [reply["migration"]["phase"] for reply in each]
        assert "x" == call(one, DESCRIBE, {})["service"]
        assert "done" == call(two, f"{INTERFACE}.QueryMigration", {})["migration"]["phase"]


def test_who_asks_late_is_not_told_twice(control_path: Path, instance: Instance) -> None:
    """News that are still on their way are older than what the first reply says."""
    instance.progress.begin("live", 3)
    for _ in range(50):
        with connected(control_path) as sock:
            instance.progress.enter(Phase.FROZEN)
            sock.sendall(encode(Call(f"{INTERFACE}.QueryMigration", more=True)))
            instance.progress.enter(Phase.LOADING, fds=1)
            instance.progress.enter(Phase.DONE)
            buffer, seen = bytearray(), []
            while not seen or seen[-1] != "done":
                buffer += sock.recv(65536)
                while message := varlink.take(buffer):
                    seen.append(json.loads(message)["parameters"]["migration"]["phase"])
        assert sorted(set(seen), key=seen.index) == seen
        instance.progress.begin("live", 3)


def test_the_last_news_come_before_the_end(tmp_path: Path, instance: Instance) -> None:
    """Who waits for the end of a migration is told, although the process ends with it."""
    path = tmp_path / "a.sock"
    answering = Control(Places(str(path)), instance, "1.0")
    answering.open()
    instance.progress.on_change(answering.announce)
    instance.progress.begin("live", 1)
    with connected(path) as sock:
        told = watch(sock, f"{INTERFACE}.QueryMigration")
        assert "setup" == next(told)["migration"]["phase"]
        instance.progress.enter(Phase.DONE)
        answering.close()

        assert ["done"] == [each["migration"]["phase"] for each in told]


def test_a_connection_becomes_a_channel(control_path: Path, instance: Instance) -> None:
    """Nothing that follows the call is read with it."""
    with connected(control_path) as sock:
        sock.sendall(encode(Call(f"{INTERFACE}.Migrate", upgrade=True)))
        assert b'{"parameters":{"generation":7}}\0' == sock.recv(1000)
        assert eventually(lambda: bool(instance.channels))
        sock.sendall(b"the stream")
        assert b"the stream" == instance.channels[0].recv(100)


def test_fds_are_not_taken(control_path: Path, instance: Instance) -> None:
    """FDs that come with a call are closed, not kept."""
    read, write = os.pipe()
    with connected(control_path) as sock:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write]))]
        sock.sendmsg([encode(Call(DESCRIBE))], rights)
        assert b"x" in sock.recv(1000)
        os.close(write)
        assert b"" == os.read(read, 1)
    os.close(read)


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


def test_a_process_without_free_fds_answers(control_path: Path) -> None:
    """Its clients may use up all numbers but those for the ones who ask, one after the other."""
    with contextlib.ExitStack() as stack:
        asking = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(20)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        last = os.dup(asking[0].fileno())
        os.close(last)
        resource.setrlimit(resource.RLIMIT_NOFILE, (last, hard))
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        for sock in asking:
            sock.settimeout(SETTLE)
            sock.connect(str(control_path))
            assert "x" == call(sock, DESCRIBE, {})["service"]
            sock.close()
