# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking an instance that means harm: one deadline a question, and no answer that is none."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support import SETTLE
from tests.unit.units import unit
from upgrader.protocol import varlink
from upgrader.protocol.parameters import Mode
from upgrader.protocol.rendezvous import DRAINING, SOCKET
from upgrader.protocol.varlink import INTERFACE
from upgrader.protocol.varlink_client import call, watch
from upgrader.protocol.varlink_types import Description
from upgrader.systemd.cgroup import own_unit
from upgrader.tool import instance_client
from upgrader.tool.attempt import Attempt
from upgrader.tool.before_restart import await_drains, settle
from upgrader.tool.instance_client import SILENT, InstanceError
from upgrader.tool.presence import look_at_all
from upgrader.tool.systemd_client import Systemd

DESCRIBE = f"{INTERFACE}.Describe"
PATIENCE = 0.3
#: As much longer than a deadline as a busy machine may take.
FAR = 20 * PATIENCE

NOT_READABLE = [
    b"{",
    b"[]",
    b"1",
    b"\xff",
    b'{"parameters": []}',
    b'{"error": 1}',
    b'{"parameters": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    b'{"parameters": ' + b'{"a":' * 20 + b"1" + b"}" * 20 + b"}",
    b'{"parameters": {"a": ' + b"9" * 400 + b"}}",
    b'{"parameters": {"a": ' + b"9" * 5000 + b"}}",
    b'{"parameters": {"a": 9007199254740993}}',
    b'{"parameters": {"a": -1e300}}',
    b'{"parameters": {"a": 1e999}}',
    b'{"parameters": {"a": NaN}}',
    b'{"parameters": {"a": -Infinity}}',
    b'{"parameters": {"a": "\\ud800"}}',
    b'{"parameters": {"\\udfff": 1}}',
    b'{"parameters": {"a": "\xed\xa0\x80"}}',
]


@contextlib.contextmanager
def played(pieces: Iterator[bytes], pause: float = 0.0) -> Iterator[socket.socket]:
    """A connection to somebody who sends these pieces, and then nothing."""
    here, there = socket.socketpair()
    over = threading.Event()

    def play() -> None:
        with contextlib.suppress(OSError):
            for piece in pieces:
                there.sendall(piece)
                if over.wait(pause):
                    return

    thread = threading.Thread(target=play)
    thread.start()
    try:
        here.settimeout(PATIENCE)
        yield here
    finally:
        over.set()
        there.shutdown(socket.SHUT_RDWR)
        thread.join(SETTLE)
        there.close()
        here.close()


def drip() -> Iterator[bytes]:
    """An answer that has no end, one byte at a time."""
    while True:
        yield b" "


def test_an_answer_byte_by_byte_has_one_deadline() -> None:
    """Each byte is in time, and the whole is not."""
    began = time.monotonic()
    with played(drip(), PATIENCE / 20) as sock:
        with pytest.raises(TimeoutError):
            call(sock, DESCRIBE, {})
        assert sock.gettimeout() == PATIENCE
    assert time.monotonic() - began < FAR


def test_each_phase_byte_by_byte_has_one_deadline() -> None:
    """Also of those after the first."""

    def one_and_a_drip() -> Iterator[bytes]:
        yield b'{"continues": true}\0'
        yield from drip()

    with played(one_and_a_drip(), PATIENCE / 20) as sock:
        replies = watch(sock, DESCRIBE)
        assert next(replies) == {}
        with pytest.raises(TimeoutError):
            next(replies)


@pytest.mark.parametrize("bad", NOT_READABLE, ids=lambda bad: repr(bad[:30]))
def test_what_is_no_reply(bad: bytes) -> None:
    """It is one error, of a kind that everybody who asks expects."""
    with played(iter((bad + b"\0",))) as sock, pytest.raises(ConnectionError, match="no answer"):
        call(sock, DESCRIBE, {})


def test_what_is_as_deep_and_as_large_as_allowed() -> None:
    """The limits are those that are documented."""
    deep: Any = varlink.LARGEST
    for _ in range(varlink.DEPTH - 1):
        deep = [deep]
    message = json.dumps({"a": deep, "b": -float(varlink.LARGEST), "c": "\N{SNOWMAN}"}).encode()
    assert varlink.decode(message)["a"] == deep
    with pytest.raises(ValueError, match="nested"):
        varlink.decode(json.dumps({"a": [deep]}).encode())


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen()
        yield sock


def test_silent_sockets_are_asked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many a service has put into its directory, they take the time of one, and the newest
    that answers is found."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(instance_client, "_PATIENCE", PATIENCE)
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / SOCKET).touch()
    web = unit(names=(own_unit(),), main_pid=os.getpid())
    with contextlib.ExitStack() as stack:
        for number in range(60):
            stack.enter_context(listening(tmp_path / "web" / DRAINING.format(number)))
        listener = stack.enter_context(listening(tmp_path / "web" / DRAINING.format(100)))

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                sock.sendall(b'{"parameters": {"service": "x", "generation": 100}}\0')

        thread = threading.Thread(target=answer)
        thread.start()
        began = time.monotonic()
        found = instance_client.describe_draining(web, user=True)
        assert time.monotonic() - began < FAR
        assert [each.generation for each in found] == [100]
        thread.join(SETTLE)


def test_all_units_have_one_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More units than there are threads, each silent on all its sockets, take the time of one answer."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    patience = 1.0
    monkeypatch.setattr(instance_client, "_PATIENCE", patience)
    monkeypatch.setattr("upgrader.tool.at_once._MOST", 2)
    units = []
    with contextlib.ExitStack() as stack:
        for number in range(15):
            (tmp_path / f"web{number}").mkdir()
            for name in (SOCKET, DRAINING.format(1), DRAINING.format(2)):
                stack.enter_context(listening(tmp_path / f"web{number}" / name))
            units.append(
                unit(names=(own_unit(),), active_state="active", main_pid=os.getpid(),
                     runtime_directories=(f"web{number}",))
            )  # fmt: skip
        client = SimpleNamespace(user=True, fd_store=lambda unit: SimpleNamespace(names=None))
        began = time.monotonic()
        found = look_at_all(cast(Systemd, client), units)
        took = time.monotonic() - began

    assert all(present.silent and old == () for present, old in found)
    assert patience <= took < 10 * patience  # one after the other: 22 times


def test_a_silent_instance_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it for ever, not even for an execve(2)."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "web").mkdir()
    web = unit(names=(own_unit(),))
    with listening(tmp_path / "web" / SOCKET), pytest.raises(InstanceError) as raised:
        instance_client.execute(web, timeout=PATIENCE, user=True)
    assert raised.value.name == SILENT


def test_a_full_backlog_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as for an answer: whoever asks much keeps nobody else from it at once."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(instance_client, "_PATIENCE", PATIENCE)
    (tmp_path / "web").mkdir()
    web = unit(names=(own_unit(),))
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "web" / SOCKET))
        listener.listen(0)
        first = stack.enter_context(socket.socket(socket.AF_UNIX))
        first.connect(str(tmp_path / "web" / SOCKET))
        with pytest.raises(InstanceError, match="too many ask") as raised:
            instance_client.describe(web, user=True)
        assert raised.value.name == SILENT
        monkeypatch.setattr(instance_client, "_PATIENCE", SETTLE)

        def answer() -> None:
            for said in (b"", b'{"parameters": {"service": "x"}}\0'):
                sock, _ = listener.accept()
                with sock:
                    if said:
                        sock.recv(65536)
                        sock.sendall(said)

        thread = threading.Timer(PATIENCE, answer)
        thread.start()
        assert "x" == instance_client.describe(web, user=True).service
        thread.join(SETTLE)


def test_one_that_wants_to_be_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says of its drains and its work is believed for as long as an upgrade may take."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(instance_client, "_PATIENCE", PATIENCE)
    (tmp_path / "web").mkdir()
    said = Description("web", parameters={"drain-timeout": "infinity"})
    systemd: Any = SimpleNamespace(user=True)
    web = unit(names=(own_unit(),))
    over = threading.Event()
    with (
        listening(tmp_path / "web" / DRAINING.format(1)) as draining,
        listening(tmp_path / "web" / SOCKET),
    ):

        def drain_for_ever() -> None:
            while True:
                sock, _ = draining.accept()
                with sock:
                    if over.is_set():
                        return
                    sock.recv(65536)
                    sock.sendall(b'{"parameters": {"service": "x", "connections": 1}}\0')

        thread = threading.Thread(target=drain_for_ever)
        thread.start()
        began = time.monotonic()
        attempt = Attempt(systemd, web, said, Mode.RESTART, "0" * 32, 2 * PATIENCE, print)
        assert len(await_drains(attempt)) == 1
        assert settle(attempt) == ()
        assert time.monotonic() - began < FAR
        over.set()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(tmp_path / "web" / DRAINING.format(1)))
        thread.join(SETTLE)
