# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a client of the socket cannot do to the others: limits of size, number and time."""

import array
import contextlib
import json
import os
import resource
import select
import socket
import threading
from pathlib import Path

import pytest

from tests.support import SETTLE, eventually
from tests.unit.control import DESCRIBE, Instance, connected, describe, is_dropped
from upgrader.instance import control_socket
from upgrader.protocol import varlink
from upgrader.protocol.varlink import INTERFACE
from upgrader.protocol.varlink_client import call, watch
from upgrader.protocol.varlink_messages import Call, encode

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
