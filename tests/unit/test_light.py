# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is loaded by whom: takeover gets by on a part of the standard library, and a program loads
what it uses."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import SETTLE, eventually
from upgrader.protocol.values import Value

README = Path(__file__).parents[2] / "README.md"
#: All of ours that takeover loads.
TAKEOVER = {
    "codes",
    "errors",
    "protocol",
    "protocol.collector",
    "protocol.fd",
    "protocol.later",
    "protocol.rendezvous",
    "protocol.systemd_syntax",
    "protocol.takeover_line",
    "protocol.values",
    "protocol.varlink",
    "protocol.varlink_client",
    "systemd",
    "systemd.bus",
    "systemd.bus_values",
    "systemd.cgroup",
    "systemd.journal",
    "systemd.live_limits",
    "systemd.main_command",
    "systemd.notify",
    "systemd.precedence",
    "systemd.process_start",
    "systemd.unit",
    "systemd.unit_settings",
    "takeover",
    "takeover.__main__",
    "takeover.launch",
    "takeover.running_instance",
}
#: Each of them takes longer to import than all of ours together.
HEAVY = {"msgspec", "dataclasses", "typing", "logging", "pathlib", "importlib", "inspect", "shutil"}
HEAVY |= {"asyncio", "subprocess", "threading", "datetime", "argparse", "tempfile", "ssl"}
_SHOW = "print(*sys.modules)\nsys.stdout.flush()\nos._exit(0)"


def loaded(code: str) -> set[str]:
    """The modules that this code loads, until it says SHOW."""
    code = f"import os, sys\nsys.path[:] = {sys.path!r}\n{code}"
    command = [sys.executable, "-S", "-c", code.replace("SHOW", _SHOW)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return set(done.stdout.split())


def ours(modules: set[str]) -> set[str]:
    return {name.removeprefix("upgrader.") for name in modules if name.startswith("upgrader.")}


def test_takeover_at_its_first_question() -> None:
    """When it asks systemd about the unit, all is there that it needs; and no more."""
    modules = loaded(
        """
def heard(event, arguments):
    if event == "socket.connect":
        exec(shown)
shown = '''SHOW'''
sys.addaudithook(heard)
from upgrader.takeover import __main__ as takeover
takeover.main([])
"""
    )

    assert TAKEOVER == ours(modules)
    assert not HEAVY & modules


def test_the_package_alone() -> None:
    """A name is loaded when somebody asks for it."""
    alone = loaded("import upgrader\nSHOW")
    assert {"protocol", "protocol.collector", "protocol.later"} == ours(alone)
    assert not HEAVY & alone
    one = loaded("from upgrader import VerifyError\nSHOW")
    assert {"codes", "errors"} == ours(one) - ours(alone)


#: What the program of the README has loaded of ours when it is ready.
PROGRAM = {
    "aio",
    "aio.acceptor",
    "aio.all_connections",
    "aio.handled_connection",
    "aio.handled_listener",
    "aio.instance",
    "aio.loop_signals",
    "aio.peer",
    "aio.runtime",
    "aio.safe_points",
    "aio.unheard",
    "aio.waiting",
    "attach",
    "backends",
    "backends.listener",
    "codes",
    "errors",
    "instance",
    "instance.base",
    "instance.connection",
    "instance.control",
    "instance.declarations",
    "instance.declared_socket",
    "instance.declared_state",
    "instance.handled",
    "instance.handles",
    "instance.destination_side",
    "instance.fork_guard",
    "instance.inbox",
    "instance.load",
    "instance.notify_relay",
    "instance.commit",
    "instance.open_sockets",
    "instance.parts",
    "instance.process",
    "instance.self_report",
    "instance.turns",
    "protocol",
    "protocol.collector",
    "protocol.fd",
    "protocol.kinds",
    "protocol.later",
    "protocol.parameters",
    "protocol.rendezvous",
    "protocol.state",
    "protocol.status_text",
    "protocol.systemd_syntax",
    "protocol.values",
    "systemd",
    "systemd.cgroup",
    "systemd.fdstore",
    "systemd.listen_fds",
    "systemd.notifications",
    "systemd.notify",
}
#: Writes down what is loaded, whenever something is sent to systemd.
WATCH = """
import sys

def heard(event, arguments):
    if event == "socket.sendmsg":
        with open(sys.argv[1], "w") as file:
            file.write(" ".join(sys.modules))

sys.addaudithook(heard)
exec(compile(open(sys.argv[2]).read(), sys.argv[2], "exec"))
"""


def at_ready(program: str, place: Path) -> set[str]:
    """The modules that a program has loaded at READY=1; it has msgspec in a moment."""
    file, listed = place / "program.py", place / "listed"
    file.write_text(program)
    command = [sys.executable, "-c", WATCH, str(listed), str(file)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(place / "notify"))
        notify.settimeout(SETTLE)
        environment = {**os.environ, "NOTIFY_SOCKET": str(place / "notify")}
        environment.pop("RUNTIME_DIRECTORY", None)
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            try:
                ready = done = False
                while not done:
                    data, fds, _, _ = socket.recv_fds(notify, 4096, 8)
                    ready = ready or b"READY=1" in data
                    done = ready and b"BARRIER=1" in data
                    modules = set(listed.read_text().split())
                    for fd in fds:  # what the barrier waits for
                        os.close(fd)
                maps = Path(f"/proc/{process.pid}/maps")
                assert eventually(lambda: "/msgspec/" in maps.read_text())
            finally:
                process.kill()
    return modules


def test_a_program_at_ready(tmp_path: Path) -> None:
    """It has what it needs to serve, and msgspec is not part of that; in a moment it has the rest, as
    the files may be another version's later."""
    text = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert text
    modules = at_ready(text[1].replace("127.0.0.1:7000", f"unix:{tmp_path}/listener"), tmp_path)

    assert PROGRAM == ours(modules)
    assert not {"msgspec", "pathlib", "shutil"} & modules


#: A runner, and a program that is ready at once.
BEHIND = """
import sys

from upgrader.runner.main import main

program = "import os, socket; address = os.environ['NOTIFY_SOCKET'];"
program += "address = chr(0) + address[1:] if address[0] == '@' else address;"
program += "notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); notify.connect(address);"
program += "notify.send(b'READY=1'); os.read(0, 1)"
main(["--listen", "main=unix:@upgrader-light", "--", sys.executable, "-c", program])
"""


def test_a_runner_at_ready(tmp_path: Path) -> None:
    """It is between PID 1 and the start of each program."""
    modules = at_ready(BEHIND, tmp_path)

    assert not {"msgspec", "hashlib", "shutil", "tempfile", "tomllib", "random"} & modules
    beside = ours(modules) - PROGRAM
    assert {"instance.watched_files", "protocol.programs"} == {
        name for name in beside if not name.startswith(("runner", "systemd"))
    }


def test_a_destination_before_it_says_go() -> None:
    """What it loads by then is time to new code, on top of a start."""
    modules = loaded(
        """
from upgrader.instance import control_listener, live_destination, parts
from upgrader.protocol.later import load_for_loading
load_for_loading()
SHOW"""
    )

    assert "msgspec" in modules
    assert not {"pathlib", "asyncio", "shutil", "tempfile", "argparse", "ssl"} & modules


def test_a_name_is_not_lost_to_its_module() -> None:
    """`upgrader.attach` is the class, whichever is imported first."""
    code = "import upgrader.attach; from upgrader.attach import attach; assert upgrader.attach is attach"
    assert "attach" in ours(loaded(f"{code}\nSHOW"))


def test_the_help_of_takeover() -> None:
    """It is asked for by people, and is no upgrade that has failed; nor is another argument."""
    for argument, code in ("--help", 0), ("-h", 0), ("--now", 2):
        command = [sys.executable, "-m", "upgrader.takeover", argument]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert code == done.returncode
        told, silent = (done.stdout, done.stderr) if code == 0 else (done.stderr, done.stdout)
        assert "ExecReload=/usr/bin/python3 -m upgrader.takeover" in told
        assert "" == silent


class Point(Value):
    x: int
    y: int = 0


class Other(Value):
    x: int
    y: int = 0


def test_values() -> None:
    """They are like frozen dataclasses."""
    assert Point(1) == Point(x=1, y=0) == Point(3).replace(x=1)
    assert Point(1) != Other(1)  # type: ignore[comparison-overlap]
    assert 1 == len({Point(1), Point(1, 0), Point(y=0, x=1)})
    assert "Point(x=1, y=0)" == repr(Point(1))
    with pytest.raises(AttributeError, match="frozen"):
        Point(1).x = 2  # type: ignore[misc]
    for values, named in ((), {}), ((1, 2, 3), {}), ((1,), {"x": 2}), ((1,), {"z": 2}):
        with pytest.raises(TypeError, match="Point has the fields x, y"):
            Point(*values, **named)  # type: ignore[arg-type]
