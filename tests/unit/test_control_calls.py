# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls on the instance's socket: what is answered, in which order, and what is an error."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support import SETTLE, eventually
from tests.unit.control import DESCRIBE, Instance, connected, describe
from upgrader.codes import Code
from upgrader.instance.control_listener import Caller
from upgrader.protocol import varlink
from upgrader.protocol.varlink import INTERFACE, VarlinkError
from upgrader.protocol.varlink_client import call
from upgrader.protocol.varlink_messages import Call, encode


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


def test_what_is_no_unicode_is_replaced(control_path: Path, instance: Instance) -> None:
    """In a question and in an answer: a path may have anything in it."""
    instance.big = "/srv/caf\udce9"
    assert "/srv/caf?" == describe(control_path)["version"]
    with connected(control_path) as sock, pytest.raises(VarlinkError) as raised:
        call(sock, f"{INTERFACE}.\udce9", {"\udce9": "\udce9"})
    assert raised.value.parameters == {"method": f"{INTERFACE}.?"}


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


def test_a_slow_call_holds_up_nobody(control_path: Path, instance: Instance) -> None:
    """While the service is busy with a reload, others are answered; then the reload is."""
    with connected(control_path) as sock:
        sock.sendall(encode(Call(f"{INTERFACE}.Reload")))
        assert instance.reloading.wait(SETTLE)
        assert "x" == describe(control_path)["service"]
        instance.reloaded.set()
        assert b"{}\0" == sock.recv(100)


def test_a_connection_becomes_a_channel(control_path: Path, instance: Instance) -> None:
    """Nothing that follows the call is read with it."""
    with connected(control_path) as sock:
        sock.sendall(encode(Call(f"{INTERFACE}.Migrate", upgrade=True)))
        assert b'{"parameters":{"generation":7}}\0' == sock.recv(1000)
        assert eventually(lambda: bool(instance.channels))
        sock.sendall(b"the stream")
        assert b"the stream" == instance.channels[0].recv(100)
