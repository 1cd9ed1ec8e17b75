# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs of the distribution behind a runner, as units; asserts nothing."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.support import cannot_run, php_fpm
from tests.system.program_texts import KINDS, PHP_FPM, SLOW, STREAM, filled
from tests.system.reloading import processes
from tests.system.serving import Install, Service
from upgrader.lab.private_systemd import PrivateSystemd


def needs(program: str) -> str:
    """The path of a program of the distribution."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if program == "php-fpm":
        path = php_fpm()
    if not path:
        cannot_run(f"{program} is not installed: packaging/bootstrap matrix")
    return path


def runner_unit(
    service: Service,
    *options: str,
    program: str,
    listeners: Sequence[str] = ("tcp",),
    more: Sequence[str] = (),
) -> list[str]:
    """The lines of a unit whose program has listeners: at the port of the service, and at a path."""
    python = " ".join(service.machine.python)
    addresses = {
        "tcp": f"127.0.0.1:{service.port}",
        "unix": f"unix:/run/{service.name}/socket",
    }
    listen = " ".join(f"--listen {each}={addresses[each]}" for each in listeners)
    return [
        "ExecStart=",
        f"ExecStart={python} -m upgrader.run {listen} {' '.join(options)} -- {program}",
        f"ExecStopPost={python} -m upgrader.run --after-stop",
        f"ExecReload={python} -m upgrader.takeover",
        "KillMode=process",
        "OOMPolicy=continue",
        f"RuntimeDirectory={service.name}",
        "RuntimeDirectoryPreserve=restart",
        *more,
    ]


def program(
    machine: PrivateSystemd, install: Install, kind: str, name: str = "", *options: str
) -> Service:
    """One of them, of version 1, not started yet; `options` are more of its runner."""
    what = KINDS[kind]
    service: Service = install(machine, name or f"other{kind}", "holder")
    service.stop()
    machine.run(["mkdir", "-p", f"/srv/{service.name}", f"/run/{service.name}"])
    write_version(service, kind, 1)
    words = filled(
        what.command,
        NAME=service.name,
        PORT=service.port,
        BIN=os.path.dirname(machine.python[0]),
        LISTENER=what.listeners[0],
    ).split()
    if not words[0].startswith("/"):
        words[0] = needs(words[0])
    more = [
        # Bytecode is told by the second, and two versions come in one.
        "Environment=PYTHONDONTWRITEBYTECODE=1",
    ]
    if kind == "php-fpm":
        machine.write(f"/srv/{service.name}/fpm.conf", _text(service, PHP_FPM))
    file, text = what.settings
    if file:
        machine.write(f"/srv/{service.name}/{file}", text)
    if kind == "haproxy":
        _serve_slowly(service)
    service.configure(
        *runner_unit(
            service,
            *(_text(service, each) for each in what.options),
            *options,
            program=" ".join(words),
            listeners=what.listeners,
            more=more,
        )
    )
    return service


def _serve_slowly(service: Service) -> None:
    """What HAProxy has behind it, as a unit of its own."""
    machine, unit, place = service.machine, f"{service.name}-slow", f"/srv/{service.name}"
    machine.write(f"{place}/slow.py", _text(service, SLOW))
    machine.run(["systemctl", "stop", f"{unit}.service"], check=False)
    machine.run(["rm", "-f", f"{place}/slow"])
    command = [*machine.python, f"{place}/slow.py", f"{place}/slow"]
    machine.run(["systemd-run", "--collect", f"--unit={unit}", *command])


def _text(service: Service, text: str, number: int = 1) -> str:
    return filled(text, NAME=service.name, PORT=service.port, VERSION=number)


def write_version(service: Service, kind: str, number: int) -> None:
    """Have the next start answer with another version, and something to stream."""
    what = KINDS[kind]
    path = _text(service, what.file)
    path = path if path.startswith("/") else f"/srv/{service.name}/{path}"
    content = _text(service, what.text, number)
    if kind == "nginx":
        service.machine.write(f"/run/{service.name}/stream", "x" * STREAM)
    if kind != "go":
        service.machine.write(path, content)
        return
    with tempfile.TemporaryDirectory() as place:
        source, built = Path(place, "main.go"), Path(place, "main")
        source.write_text(content)
        environment = {**os.environ, "GOCACHE": "/tmp/upgrader-tests-go", "GO111MODULE": "off"}
        go = [needs("go"), "build", "-o", str(built), str(source)]
        subprocess.run(go, check=True, env=environment)
        service.machine.copy_in(built, f"/srv/{service.name}/new")
    service.machine.run(["chmod", "755", f"/srv/{service.name}/new"])
    service.machine.run(["mv", f"/srv/{service.name}/new", f"/srv/{service.name}/main"])


def stored(kind: str) -> int:
    """How many FDs PID 1 keeps for it: its listeners, and the program that serves."""
    return len(KINDS[kind].listeners) + 1


def command_line(service: Service, pid: int | str) -> str:
    """How a process of the machine was started, or calls itself."""
    with contextlib.suppress(OSError):
        text = service.inside(f"/proc/{pid}/cmdline").read_bytes()
        return text.replace(b"\0", b" ").decode().strip()
    return ""


def masters(service: Service) -> list[int]:
    """The processes of the unit that are no runner and no worker of nginx."""
    lines = {int(pid): command_line(service, pid) for pid in processes(service)}
    return [
        p for p, line in lines.items() if line and "upgrader." not in line and "worker" not in line
    ]


def pid_file(service: Service) -> Path:
    return service.inside(f"/run/{service.name}/nginx.pid")
