# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking PID 1: against bytes recorded from systemd 252 (its own socket) and 257 (the system bus)."""

import contextlib
import json
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import SETTLE
from upgrader.errors import BusError
from upgrader.systemd import bus, bus_values, own_unit
from upgrader.systemd.bus import Bus, QueuedJob
from upgrader.systemd.cgroup import unit_of
from upgrader.systemd.own_unit import StopReason, judge

RECORDED = json.loads(Path(__file__).with_name("recorded").joinpath("bus.json").read_text())
UIDS = {"private": 0, "system": 65534}
BOTH = pytest.mark.parametrize("name", ["private", "system"])


@contextlib.contextmanager
def replay(
    name: str, path: Path, monkeypatch: pytest.MonkeyPatch, *, change: Any = None, piece: int = 0
) -> Iterator[list[bytes]]:
    """A server that gives the recorded answers, `piece` bytes at a time; yields what it was sent."""
    monkeypatch.setattr(bus, "PRIVATE", str(path) if name == "private" else "/no/such/socket")
    monkeypatch.setattr(bus, "SYSTEM_BUS", str(path) if name == "system" else "/no/such/socket")
    monkeypatch.setattr(os, "geteuid", lambda: UIDS[name])
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    requests = [bytes.fromhex(text) for text in RECORDED[name]["sent"]]
    answers = [bytes.fromhex(text) for text in RECORDED[name]["received"]]
    if change:
        answers = change(answers)
    heard: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError), server.accept()[0] as sock:
            for request, answer in zip(requests, answers, strict=False):
                heard.append(sock.recv(len(request), socket.MSG_WAITALL))
                step = piece or len(answer) or 1
                for at in range(0, len(answer), step):
                    sock.sendall(answer[at : at + step])
            sock.shutdown(socket.SHUT_WR)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield heard
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@BOTH
@pytest.mark.parametrize("piece", [0, 1, 7])
def test_the_recorded_conversation(
    name: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte sent is as it was, and the answers are read however they are cut."""
    with replay(name, tmp_path / "s", monkeypatch, piece=piece) as heard, Bus(5) as asked:
        assert [QueuedJob("9a-b@x.service", "start")] == asked.list_jobs()
        assert 0 == asked.stored_fds("dbus.service")
        assert 90.0 == asked.stop_timeout("dbus.service")

    assert RECORDED[name]["sent"] == [request.hex() for request in heard]


@BOTH
def test_damaged_answers_are_errors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes back: BusError or some answer, and nothing else; the whole ones are read."""
    source = random.Random(3)

    def damage(answers: list[bytes]) -> list[bytes]:
        changed = []
        for answer in answers:
            data = bytearray(answer)
            for _ in range(source.choice([0, 1, 4])):
                data[source.randrange(len(data))] = source.randrange(256)
            changed.append(bytes(data[: source.choice([len(data)] * 5 + [len(data) // 2])]))
        return changed

    outcomes: Counter[tuple[bool, bool]] = Counter()
    for number in range(75):
        whole = number % 5 == 0
        with replay(name, tmp_path / f"{number}", monkeypatch, change=None if whole else damage):
            try:
                with Bus(SETTLE if whole else 0.02) as asked:
                    asked.list_jobs()
                    asked.stored_fds("dbus.service")
                    asked.stop_timeout("dbus.service")
            except BusError:
                outcomes[(whole, False)] += 1
            else:
                outcomes[(whole, True)] += 1
    # Some damage is where nobody looks; on a busy machine the patience may be over first.
    assert 15 == outcomes[(True, True)]
    assert outcomes[(False, False)] > 30, outcomes


@pytest.mark.parametrize("signature", ["a()", "a{}", "aa()"])
def test_an_array_of_nothing_ends(signature: str) -> None:
    """Its elements take no bytes, and it says that it has some."""
    variant = bytes([len(signature)]) + signature.encode() + b"\0"
    body = variant.ljust(-(-len(variant) // 4) * 4, b"\0") + (b"\x10" + bytes(3)) * 8
    with pytest.raises(ValueError, match="no bytes"):
        bus_values.read("v", body)


@BOTH
def test_no_answer_is_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PID 1 is busy: the error comes in time, and names the socket."""
    path = tmp_path / "s"
    monkeypatch.setattr(bus, "PRIVATE", str(path))
    monkeypatch.setattr(bus, "SYSTEM_BUS", str(path))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        with pytest.raises(BusError, match=f"{path}: .*time"):
            Bus(0.01)
    with pytest.raises(BusError, match=f"{path}: .*refused"):
        Bus(5)
    os.unlink(path)
    with pytest.raises(BusError, match=f"{path}: .*No such file"):
        Bus(5)


def test_a_refusal_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PID 1 knows no such unit, say."""

    def refuse(answers: list[bytes]) -> list[bytes]:
        return [b"REJECTED EXTERNAL\r\n", *answers[1:]]

    refused = pytest.raises(BusError, match="authentication refused: b'REJECTED")
    with replay("private", tmp_path / "s", monkeypatch, change=refuse), refused:
        Bus(5)


def test_no_answer_means_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a bus the reason is unknown, and nothing fails."""
    monkeypatch.setattr(bus, "PRIVATE", "/no/such/socket")
    monkeypatch.setattr(bus, "SYSTEM_BUS", "/no/such/socket")

    assert StopReason.UNKNOWN is own_unit.ask("web.service").reason


@pytest.mark.parametrize(
    ("unit", "label"),
    [
        ("dbus.service", "dbus_2eservice"),
        ("9a-b@x.service", "_39a_2db_40x_2eservice"),  # as systemd 252 gave it
        ("a_b\\x2d.service", "a_5fb_5cx2d_2eservice"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}", "_c3_a9"),
        ("", "_"),
    ],
)
def test_object_paths(unit: str, label: str) -> None:
    """Letters and digits stay, except a digit in front."""
    assert label == bus._escape(unit)


@pytest.mark.parametrize(
    ("jobs", "reason"),
    [
        ([], StopReason.NO_JOB),
        ([("other.service", "stop")], StopReason.NO_JOB),
        ([("web.service", "stop")], StopReason.STOP),
        ([("web.service", "restart")], StopReason.RESTART),
        ([("web.service", "try-restart")], StopReason.RESTART),
        ([("web.service", "start")], StopReason.RESTART),
        ([("web.service", "stop"), ("soft-reboot.target", "start")], StopReason.SOFT_REBOOT),
        ([("soft-reboot.target", "start"), ("web.service", "stop")], StopReason.SOFT_REBOOT),
        ([("web.service", "stop"), ("reboot.target", "start")], StopReason.STOP),
        ([("web.service", "stop"), ("soft-reboot.target", "stop")], StopReason.STOP),
        ([("web.service", "restart"), ("soft-reboot.target", "start")], StopReason.RESTART),
    ],
)
def test_jobs_are_judged(jobs: list[tuple[str, str]], reason: StopReason) -> None:
    """Stop, restart and soft-reboot are told apart by the jobs there are."""
    assert reason is judge("web.service", [QueuedJob(*job) for job in jobs])


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/web.service\n", "web.service"),
        ("0::/system.slice/system-web.slice/web@1.service\n", "web@1.service"),
        ("0::/system.slice/web.service/.control\n", "web.service"),
        ("0::/system.slice/web.service/worker/1\n", "web.service"),
        ("0::/system.slice/docker-1.scope/system.slice/web.service\n", "web.service"),
        ("0::/user.slice/user-1.slice/user@1.service/app.slice/web.service\n", "web.service"),
        ("0::/user.slice/user-1.slice/session-2.scope\n", "session-2.scope"),
        ("0::/system.slice/_memory.service\n", "memory.service"),
        ("0::/system.slice/__a.service\n", "_a.service"),
        ("0::/system.slice/a\\x2db.service\n", "a\\x2db.service"),
        ("0::/system.slice/web.service.d/x\n", ""),
        ("0::/system.slice/web.services\n", ""),
        ("0::/\n", ""),
        ("", ""),
        ("12:memory:/a.service\n1:name=systemd:/system.slice/web.service\n0::/\n", "web.service"),
        ("12:memory:/system.slice/web.service\n", ""),
        ("nonsense", ""),
    ],
)
def test_units_are_found_in_cgroups(cgroup: str, unit: str) -> None:
    """The last unit on the path, whatever groups it made below, on both versions of cgroups."""
    assert unit == unit_of(cgroup)
