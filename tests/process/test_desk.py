# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program at a desk, without systemd: what its author sees."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process.chat import DEADLINE, Client
from tests.support import eventually

PROGRAM = Path(__file__).with_name("hosted.py")
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("NOTIFY_SOCKET", "SYSTEMD_EXEC_PID")
}


def command(path: Path, kind: str = "handler") -> list[str]:
    return [sys.executable, str(PROGRAM), kind, str(path), "1"]


def test_a_terminal_is_told_where_it_serves(tmp_path: Path) -> None:
    """There is no systemd to ask; Ctrl-C stops it without an error."""
    path = tmp_path / "socket"
    terminal, theirs = pty.openpty()
    with (
        open(terminal, "rb", buffering=0) as told,
        open(theirs, "wb", buffering=0) as stderr,
        subprocess.Popen(command(path), stderr=stderr, env=ENVIRONMENT) as process,
    ):
        said = b""
        while not said.endswith(b"\n"):
            said += told.read(1)
        process.send_signal(signal.SIGINT)

        assert f"asgi: serves on {path}; Ctrl-C stops it\r\n" == said.decode()
        assert 0 == process.wait(DEADLINE)


def test_p12_an_address_in_use_is_told_before_an_application_starts_up(tmp_path: Path) -> None:
    """One line, and nothing of the application has run but its import."""
    with socket.socket(socket.AF_INET) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        directory = str(PROGRAM.parent)
        options = ["--app-dir", directory, "--port", str(port)]
        done = subprocess.run(
            [sys.executable, "-m", "upgrader.asgi", "asgi_app:app", *options],
            capture_output=True,
            text=True,
            env=ENVIRONMENT | {"VERSION": "one"},
            check=False,
        )

    assert 1 == done.returncode
    assert (
        f"asgi: listener 'http': cannot bind 127.0.0.1:{port}: Address already in use\n"
        == done.stderr
    )


def test_an_address_in_use_is_one_line(tmp_path: Path) -> None:
    """Nobody has to look into a program because of that: there is no traceback."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        done = subprocess.run(
            command(path), capture_output=True, text=True, env=ENVIRONMENT, check=False
        )

    assert 1 == done.returncode
    assert (
        f"asgi: listener 'http': cannot bind unix:{path}: Address already in use\n" == done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["upgrader.asgi", "nosuch:app"], "asgi: the application cannot be loaded\n"),
        (["upgrader.run", "--", "true"], "upgrader.run: --listen: the program is given no listener\n"),
        (["upgrader.run", "--listen", "http=:99999", "--", "true"], "python -m upgrader.run: :99999: "),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_told_last(arguments: list[str], said: str) -> None:
    """Without a traceback through a program that nobody at the desk has written."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)

    assert 1 == done.returncode
    assert said in done.stderr.splitlines(keepends=True)[-1]


def test_a_child_ends_with_its_program(tmp_path: Path) -> None:
    """There is no systemd to end it, and no next instance to have it."""
    holder = Path(__file__).with_name("holder.py")
    options = {
        "face": "blocking",
        "bind": f"unix:{tmp_path}/socket",
        "backends": {"worker": ["child", [["sleep", "1000"]], {}]},
    }
    command = [sys.executable, str(holder), json.dumps(options)]
    with subprocess.Popen(command, env=ENVIRONMENT) as process:
        assert eventually((tmp_path / "socket").exists)
        with Client(tmp_path / "socket") as client:
            child = os.pidfd_open(int(client.ask("do worker pid").split()[0]))
        with os.fdopen(child, "rb") as pidfd:
            process.send_signal(signal.SIGINT)
            assert 0 == process.wait(DEADLINE)
            assert select.select([pidfd], [], [], DEADLINE)[0]
