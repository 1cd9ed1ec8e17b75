# SPDX-License-Identifier: LGPL-2.1-or-later
"""What becomes of a state if the QEMU that is asked over QMP hangs, lies or ends."""

import array
import asyncio
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import eventually
from upgrader.programs.qemu import monitor
from upgrader.programs.qemu.monitor import Monitor, QemuError
from upgrader.protocol.fd import Fd

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}
STATE = b"what devices hold"
ERROR = {"error": {"class": "GenericError", "desc": "in QEMU's own words"}}


class Qemu:
    """A process that speaks QMP: `answers` has what it does at a command instead of what QEMU would."""

    def __init__(self, path: Path) -> None:
        self.answers: dict[str, Callable[[], Any]] = {}
        self.asked: list[str] = []
        self.status = "running"
        self.given: list[int] = []
        self.read = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        try:
            while True:
                self.sock, _ = self._listener.accept()
                with self.sock:
                    self._talk()
        except OSError:
            return

    def _talk(self) -> None:
        self.send(GREETING)
        while True:
            data, ancillary, _, _ = self.sock.recvmsg(1 << 16, socket.CMSG_SPACE(64))
            for _, _, fds in ancillary:
                numbers = array.array("i")
                numbers.frombytes(fds)
                self.given += numbers
            if not data:
                return
            text = data.decode().strip()
            while text:  # messages stand one after the other
                message, end = json.JSONDecoder().raw_decode(text)
                text = text[end:].lstrip()
                self._answer(message)

    def _answer(self, message: dict[str, Any]) -> None:
        command = message["execute"]
        self.asked.append(command)
        answer = self.answers.get(command, getattr(self, command.replace("-", "_"), dict))()
        if answer is not None:
            reply = answer if "error" in answer else {"return": answer}
            self.send({**reply, **({"id": message["id"]} if "id" in message else {})})
        if command == "migrate-incoming" and answer == {}:
            self.read_state()
        if command == "migrate" and answer == {}:
            self.send({"event": "STOP"})
        if command in ("migrate", "migrate-incoming") and answer == {}:
            self.send({"event": "MIGRATION", "data": {"status": "completed"}})

    def send(self, message: dict[str, Any]) -> None:
        self.sock.sendall(json.dumps(message).encode() + b"\r\n")

    def fails(self) -> dict[str, Any]:
        """The stream ends, and it says that it has failed."""
        self.close_given()
        self.send({"event": "MIGRATION", "data": {"status": "failed"}})
        self.answers["query-migrate"] = lambda: {"error-desc": "in QEMU's own words"}
        return {"never": "mind"}

    def ends(self) -> None:
        """It is killed."""
        self.close_given()
        self.sock.shutdown(socket.SHUT_RDWR)

    def hangs(self) -> None:
        """It says nothing."""

    def close_given(self) -> None:
        while self.given:
            os.close(self.given.pop())

    def query_status(self) -> dict[str, Any]:
        return {"status": self.status}

    def cont(self) -> dict[str, Any]:
        self.status = "running"
        return {}

    def migrate(self) -> dict[str, Any]:
        os.write(self.given[0], STATE)
        self.close_given()
        self.status = "postmigrate"
        return {}

    def read_state(self) -> None:
        """What it has answered `migrate-incoming` for."""
        while data := os.read(self.given[0], 1 << 16):
            self.read += data
        self.close_given()
        self.status = "paused"


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Qemu]:
    qemu = Qemu(tmp_path / "qmp")
    yield qemu
    qemu.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "_PATIENCE", 1.0)


def save(path: Path) -> bytes:
    """The state that a QEMU gives."""

    async def saved() -> bytes:
        with Fd(os.memfd_create("state")) as state:
            async with Monitor.open(path, 5) as asked:
                await asked.save(state)
            return os.pread(state.fileno(), 1 << 20, 0)

    return asyncio.run(saved())


def load(path: Path, data: bytes) -> None:
    async def loaded() -> None:
        with Fd(os.memfd_create("state")) as state:
            os.write(state.fileno(), data)
            async with Monitor.open(path, 5) as asked:
                await asked.load(state)

    asyncio.run(loaded())


def test_a_state_goes_from_one_to_the_other(qemu: Qemu, tmp_path: Path) -> None:
    assert STATE == save(tmp_path / "qmp")
    load(tmp_path / "qmp", STATE)

    assert STATE == qemu.read
    assert "paused" == qemu.status


def test_who_saves_a_machine_hears_that_it_stands_still(qemu: Qemu, tmp_path: Path) -> None:
    """Once, and before its state is whole; an earlier stop does not count."""
    heard: list[str] = []

    def query_status() -> dict[str, Any]:
        qemu.send({"event": "STOP"})
        return {"status": qemu.status}

    qemu.answers["query-status"] = query_status

    async def saved() -> None:
        with Fd(os.memfd_create("state")) as state:
            async with Monitor.open(tmp_path / "qmp", 5) as asked:
                asked.on_stop = lambda: heard.append(qemu.asked[-1])
                await asked.save(state)

    asyncio.run(saved())
    assert ["migrate"] == heard


def test_little_is_asked_while_a_machine_stands_still(qemu: Qemu, tmp_path: Path) -> None:
    """A QEMU that expects a state is given it, and told to go on."""

    async def goes_on() -> tuple[list[str], list[str]]:
        with Fd(os.memfd_create("state")) as state:
            os.write(state.fileno(), STATE)
            async with Monitor.open(tmp_path / "qmp", 5) as asked:
                await asked.expect()
                before = [*qemu.asked]
                await asked.load(state)
                await asked.resume()
        return before, qemu.asked[len(before) :]

    before, asked = asyncio.run(goes_on())
    assert "migrate-incoming" == before[-1]
    assert ["cont", "query-status"] == asked
    assert STATE == qemu.read


def test_a_state_that_never_comes(qemu: Qemu, tmp_path: Path) -> None:
    """A QEMU that expects one is told so by the end of the session."""

    async def nothing() -> None:
        async with Monitor.open(tmp_path / "qmp", 5) as asked:
            await asked.expect()

    asyncio.run(nothing())
    assert eventually(lambda: not qemu.given)
    assert b"" == qemu.read


@pytest.mark.parametrize(
    ("status", "answer", "told"),
    [("shutdown", ERROR, "in QEMU's own words"), ("paused", {}, "the machine is paused")],
)
def test_a_machine_that_does_not_go_on(
    qemu: Qemu,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    answer: dict[str, Any],
    told: str,
) -> None:
    """It is not taken for one that runs, whatever it has answered."""
    monkeypatch.setattr(monitor, "_FINAL", 0.1)
    qemu.status = status
    qemu.answers["cont"] = lambda: answer

    async def goes_on() -> None:
        async with Monitor.open(tmp_path / "qmp", 5) as asked:
            await asked.resume()

    with pytest.raises(QemuError, match=told):
        asyncio.run(goes_on())


@pytest.mark.parametrize("command", ["query-status", "getfd", "migrate"])
@pytest.mark.parametrize("how", ["error", "ends", "hangs"])
def test_a_machine_that_cannot_be_saved_goes_on(
    qemu: Qemu, tmp_path: Path, command: str, how: str
) -> None:
    """Whatever it does instead of what it was asked for, nobody waits for it for ever."""
    qemu.answers[command] = {"error": lambda: ERROR, "ends": qemu.ends, "hangs": qemu.hangs}[how]

    with pytest.raises(QemuError) as refused:
        save(tmp_path / "qmp")

    assert "running" == qemu.status
    assert ("in QEMU's own words" in str(refused.value)) is (how == "error")
    qemu.close_given()


def test_a_save_that_fails_is_undone(qemu: Qemu, tmp_path: Path) -> None:
    """The cause is QEMU's own."""
    qemu.status = "running"

    def fails() -> dict[str, Any]:
        qemu.status = "postmigrate"
        return qemu.fails()

    qemu.answers["migrate"] = fails
    with pytest.raises(QemuError, match="in QEMU's own words"):
        save(tmp_path / "qmp")

    assert "running" == qemu.status


@pytest.mark.parametrize("status", ["postmigrate", "internal-error", "inmigrate", "shutdown"])
def test_only_a_machine_that_lives_is_saved(qemu: Qemu, tmp_path: Path, status: str) -> None:
    qemu.status = status

    with pytest.raises(QemuError, match=status):
        save(tmp_path / "qmp")

    assert "migrate" not in qemu.asked


@pytest.mark.parametrize("how", ["error", "ends", "fails", "hangs"])
def test_a_state_that_cannot_be_loaded(qemu: Qemu, tmp_path: Path, how: str) -> None:
    """It says so, and is not taken for one that has loaded it."""
    answers = {"error": lambda: ERROR, "ends": qemu.ends, "fails": qemu.fails, "hangs": qemu.hangs}
    qemu.answers["migrate-incoming"] = answers[how]

    with pytest.raises(QemuError):
        load(tmp_path / "qmp", STATE * 10_000)

    assert "running" == qemu.status
    qemu.close_given()


def test_a_state_that_is_too_large(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is not shared would come with it."""
    monkeypatch.setattr(monitor, "_LARGEST", 3)

    with pytest.raises(QemuError, match="is the memory shared"):
        save(tmp_path / "qmp")

    assert "running" == qemu.status


@pytest.mark.parametrize("greeting", [b"", b"nonsense\r\n", b'{"QMP": 1}\r\n'])
def test_no_qemu(tmp_path: Path, greeting: bytes) -> None:
    """Nobody, or another program, is there."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "x"))
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(greeting)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(QemuError, match="does not answer"):
            save(tmp_path / "x")
        thread.join()
    with pytest.raises(QemuError, match="does not answer"):
        save(tmp_path / "y")
