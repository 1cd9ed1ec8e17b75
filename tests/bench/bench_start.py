# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long takeover takes to its fork, the program of the README to READY=1, and new code to its commit;
measured, not tested."""

import compileall
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import upgrader
from tests.support import eventually
from tests.system.reloading import live, reload
from tests.system.serving import Service
from tests.system.tool import upgrade
from upgrader.lab.private_systemd import PrivateSystemd

ROUNDS = 15
README = Path(__file__).parents[2] / "README.md"
PLAIN = """
import asyncio
import os
import socket
from dataclasses import dataclass


@dataclass
class Room:
    messages: int = 0


room = Room()


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        room.messages += 1
        writer.write(b"%d %s" % (room.messages, line))
        await writer.drain()


async def main() -> None:
    server = await asyncio.start_server(talk, "127.0.0.1", 7000)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(os.environ["NOTIFY_SOCKET"])
        notify.send(b"READY=1")
    async with server:
        await server.serve_forever()


asyncio.run(main())
"""
#: Tells how long a run of the measure takes.
RUN = """
import os, subprocess, sys, time
environment = {**os.environ, "PYTHONPATH": "/opt/watch"}
begin = time.perf_counter()
subprocess.run([sys.executable, "-c", "import asyncio"], env=environment, check=True)
print(time.perf_counter() - begin)
"""
#: Writes down when this process first forks.
WATCH = """
import sys, time

def heard(event, arguments):
    if event == "os.fork" and "upgrader.takeover" in " ".join(sys.orig_argv):
        with open("{there}", "a") as file:
            file.write(str(time.time_ns()) + " ")

sys.addaudithook(heard)
"""


@pytest.fixture(autouse=True)
def _compiled() -> None:
    """As an installed package is."""
    compileall.compile_dir(Path(upgrader.__file__).parent, quiet=1)


def compared(actions: Mapping[str, Callable[[], float]]) -> str:
    """The shortest and the median of each of these, measured in turns, and as ratios to those of the
    first: other work on the machine makes both longer."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(ROUNDS):
        for name, action in actions.items():
            times[name].append(action() * 1000)
    first = next(iter(times.values()))
    shown = []
    for name, each in times.items():
        pairs = [(of(each), of(each) / of(first)) for of in (min, statistics.median)]
        shown.append(
            f"{name} " + ", ".join(f"{took:.0f} ms ({ratio:.2f})" for took, ratio in pairs)
        )
    return "; ".join(shown)


def test_takeover(tmp_path: Path) -> None:
    """From the start of its process by PID 1 to the fork of the new version."""
    name = "measured"
    began, forked = f"/run/{name}/began", f"/run/{name}/forked"
    with PrivateSystemd.boot("host") as machine:
        python = " ".join(machine.python)
        machine.write("/opt/watch/sitecustomize.py", WATCH.format(there=forked))
        lines = [line for line in live(machine, name) if not line.startswith("ExecReload=")]
        command = f"date +%%s%%N > {began}; exec {python} -m upgrader.takeover"
        lines += [f"ExecReload=/bin/sh -c '{command}'", "Environment=PYTHONPATH=/opt/watch"]
        service = Service(machine, name, "lively", lines)
        service.start()

        def takeover() -> float:
            assert eventually(service.answers)
            service.inside(forked).unlink(missing_ok=True)
            service.environment(ROUND=str(time.monotonic()))
            assert reload(service), service.messages()
            first, start = (service.inside(path).read_text().split()[0] for path in (forked, began))
            return (int(first) - int(start)) / 1e9

        def asyncio() -> float:
            return float(machine.run([*machine.python, "-c", RUN]).stdout)

        print(f"\n{compared({'import asyncio': asyncio, 'takeover to its fork': takeover})}")


def test_ready(tmp_path: Path) -> None:
    """The program of the README, and the same without upgrader, to READY=1."""
    match = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert match
    programs = {"without upgrader": PLAIN, "with": match[1]}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}

        def started(text: str) -> Callable[[], float]:
            program = tmp_path / f"{hash(text)}.py"
            program.write_text(text)

            def start() -> float:
                begin = time.perf_counter()
                with subprocess.Popen([sys.executable, program], env=environment) as process:
                    until_ready(notify)
                    took = time.perf_counter() - begin
                    process.kill()
                return took

            return start

        print(f"\n{compared({name: started(text) for name, text in programs.items()})}")


def until_ready(notify: socket.socket) -> None:
    """Wait for READY=1, and close what comes with it."""
    data = b""
    while b"READY=1" not in data:
        data, fds, _, _ = socket.recv_fds(notify, 4096, 8)
        for number in fds:
            os.close(number)


def test_behind_a_runner() -> None:
    """A program to READY=1 by itself and behind a runner, and the memory that is the runner's alone."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)  # as /run: the program knows no abstract names
        behind_a_runner(Path(name))


def behind_a_runner(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PLAIN)
    runner = [sys.executable, "-m", "upgrader.run", "--listen", "main=unix:@bench", "--"]
    memory: list[int] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "notify"))
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "RUNTIME_DIRECTORY": str(tmp_path),
            "XDG_RUNTIME_DIR": str(tmp_path),
        }

        def started(*before: str) -> float:
            begin = time.perf_counter()
            with subprocess.Popen(
                [*before, sys.executable, str(program)], env=environment, stderr=subprocess.DEVNULL
            ) as process:
                until_ready(notify)
                took = time.perf_counter() - begin
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                if before:
                    memory.append(private(process.pid))
                process.kill()
                for pid in map(int, children.split()):
                    os.kill(pid, signal.SIGKILL)
            return took

        print(f"\n{compared({'by itself': started, 'behind a runner': lambda: started(*runner)})}")
        print(f"memory of the runner alone: {statistics.median(memory) / 1024:.1f} MB")


def private(pid: int) -> int:
    """KiB that no other process has; proc_pid_smaps(5)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def test_new_code() -> None:
    """A live upgrade, from systemd's job to the commit, and a start of the same program; then where the
    time of upgrades went, as medians."""
    parts: dict[str, list[float]] = {}
    with PrivateSystemd.boot("host") as machine:
        service = Service(machine, "measured", "lively", live(machine, "measured"))
        service.start()

        def start() -> float:
            service.stop()
            service.start()
            assert eventually(service.answers)
            began, ready = service.show(
                "ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic"
            )
            return (int(ready) - int(began)) / 1e6

        def upgraded() -> float:
            times = upgrade(service)["times"]
            for part, seconds in times.items():
                parts.setdefault(part, []).append(seconds * 1000)
            return sum(times.values()) - times["asked"] - times["committed"]

        print(f"\n{compared({'start': start, 'live upgrade': upgraded})}")
        print(", ".join(f"{part} {statistics.median(each):.0f} ms" for part, each in parts.items()))
