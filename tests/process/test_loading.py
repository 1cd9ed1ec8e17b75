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
#: Writes down what is loaded, and when something is sent on a channel.
WATCH = """
import os, socket, sys

def heard(event, arguments):
    # As importlib does; looking at the files of the program is something else.
    if event == "open" and arguments[1] and str(arguments[0]).endswith((".py", ".pyc")):
        told(arguments[0].rpartition("/")[2].partition(".")[0])
    elif event == "socket.sendmsg" and arguments[0].type == socket.SOCK_STREAM:
        told("sent")

def told(what):
    with open(sys.argv[1], "a") as file:
        print(os.getpid(), what, file=file)

sys.addaudithook(heard)
exec(compile(open(sys.argv[2]).read(), sys.argv[2], "exec"))
"""


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as service:
        yield service


def test_nothing_is_loaded_in_the_pause(tmp_path: Path, service: Service) -> None:
    """From the moment at which a source can be asked, and from Go on in a destination, clients wait for
    nothing that is read from disk, until the commit. What the destination needs to give away everything comes
    later; who asks for it meanwhile is answered then."""
    text = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert text
    program, listed = tmp_path / "program.py", tmp_path / "listed"
    program.write_text(text[1].replace("127.0.0.1:7000", f"unix:{tmp_path}/listener"))
    command = [sys.executable, "-c", WATCH, str(listed), str(program)]
    service.start(command)
    assert eventually((service.runtime_directory / "upgrader.sock").exists)
    source = service.describe()["pid"]
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SETTLE)
        client.connect(f"{tmp_path}/listener")
        client.sendall(b"one\n")
        assert client.recv(100)
        listed.write_text("")
        service.live(command)
        client.sendall(b"two\n")
        assert client.recv(100)

    destination = service.describe()["pid"]
    told = [line.split() for line in listed.read_text().splitlines()]
    assert [str(source), "sent"] == next(each for each in told if each[0] == str(source))
    loaded = [what for pid, what in told if pid == str(destination)]
    to_go, rest = loaded.index("sent"), loaded[loaded.index("sent") + 1 :]
    assert "sent" == rest[0]  # the Ack
    later = {"live_source", "save", "control_answers"}
    assert later <= {*rest}
    assert set() == later & {*loaded[:to_go]}
    assert 3 == service.live(command).generation
