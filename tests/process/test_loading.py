# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a destination loads while clients wait for it, and what it loads once they are served."""

import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import SETTLE, eventually
from upgrader.testing import Service

README = Path(__file__).parents[2] / "README.md"
#: Writes down what is loaded, whenever something is sent on a channel.
WATCH = """
import socket, sys

def heard(event, arguments):
    if event == "socket.sendmsg" and arguments[0].type == socket.SOCK_STREAM:
        with open(sys.argv[1], "a") as file:
            print(*sys.modules, file=file)

sys.addaudithook(heard)
exec(compile(open(sys.argv[2]).read(), sys.argv[2], "exec"))
"""


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as service:
        yield service


def test_a_destination_has_what_it_loads_with(tmp_path: Path, service: Service) -> None:
    """From Go to its Ack clients wait, and nothing is read from disk. What it needs to give away
    everything comes later; who asks for it meanwhile is answered then."""
    text = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert text
    program, listed = tmp_path / "program.py", tmp_path / "listed"
    program.write_text(text[1].replace("127.0.0.1:7000", f"unix:{tmp_path}/listener"))
    plain = [sys.executable, str(program)]
    service.start(plain)
    assert eventually((service.runtime_directory / "upgrader.sock").exists)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SETTLE)
        client.connect(f"{tmp_path}/listener")
        client.sendall(b"one\n")
        assert client.recv(100)
        service.live([sys.executable, "-c", WATCH, str(listed), str(program)])
        client.sendall(b"two\n")
        assert client.recv(100)

    assert 2 == service.describe()["generation"]
    at_go, at_ack = (set(line.split()) for line in listed.read_text().splitlines()[:2])
    assert set() == at_ack - at_go
    source = {f"upgrader.instance.{name}" for name in ("live_source", "save", "control_answers")}
    assert set() == source & at_ack
    assert 3 == service.live(plain).generation
