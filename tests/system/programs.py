# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs of the distribution behind a runner, and HTTP clients that note how they fare; asserts
nothing."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tests import fastcgi
from tests.support import SETTLE, cannot_run, php_fpm
from tests.system.reloading import processes
from tests.system.serving import Install, Service, network_of
from upgrader.lab.private_systemd import PrivateSystemd

#: Bytes of what nginx sends slowly, and how many of them in a second.
STREAM = 120_000
RATE = 40_000

NGINX = """\
worker_processes 2;
pid /run/{name}/nginx.pid;
error_log stderr;
daemon off;
events {{ worker_connections 512; }}
http {{
  access_log off;
  server {{
    listen 127.0.0.1:{port};
    location = / {{ return 200 "$pid {version}\\n"; }}
    location = /stream {{ limit_rate {rate}; alias /run/{name}/stream; }}
  }}
}}
"""
GUNICORN = """\
import os
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"%d {version}\\n" % os.getpid()]
"""


def needs(program: str) -> str:
    """The path of a program of the distribution."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if program == "php-fpm":
        path = php_fpm()
    if not path:
        cannot_run(f"{program} is not installed: packaging/bootstrap test")
    return path


def runner_unit(
    service: Service, *options: str, program: str, more: Sequence[str] = ()
) -> list[str]:
    """The lines of a unit whose program has one listener, at the port of the service."""
    python = " ".join(service.machine.python)
    listen = f"--listen http=127.0.0.1:{service.port}"
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


def nginx(machine: PrivateSystemd, install: Install, name: str) -> Service:
    """nginx, not started yet."""
    path = needs("nginx")
    service: Service = install(machine, name, "holder")
    service.stop()
    configure_nginx(service, 1)
    pid_file = f"--pid-file /run/{name}/nginx.pid"
    program = f"{path} -c /etc/{name}.conf"
    service.configure(*runner_unit(service, pid_file, program=program))
    return service


def configure_nginx(service: Service, version: int) -> None:
    """Write a configuration that answers with a version, and what is streamed."""
    text = NGINX.format(name=service.name, port=service.port, version=version, rate=RATE)
    service.machine.write(f"/etc/{service.name}.conf", text)
    service.machine.run(["mkdir", "-p", f"/run/{service.name}"])
    service.machine.write(f"/run/{service.name}/stream", "x" * STREAM)


PHP_FPM = """\
[global]
error_log = /srv/{name}/log
[www]
listen = 127.0.0.1:{port}
user = nobody
group = nogroup
pm = static
pm.max_children = 4
"""
#: The binaries of the distribution.
BINARIES = {"gunicorn": "gunicorn", "haproxy": "haproxy", "node": "node", "php-fpm": "php-fpm"}
#: For each program: what is written where, with its version, and its command line.
OTHERS = {
    "gunicorn": (
        "app.py",
        GUNICORN,
        "{gunicorn} --preload --workers 2 --chdir /srv/{name} app:app",
    ),
    "haproxy": (
        "haproxy.cfg",
        """\
global
  master-worker
defaults
  mode http
  timeout connect 5s
  timeout client 5s
  timeout server 5s
frontend http
  bind 127.0.0.1:{port}
  http-request return status 200 content-type text/plain lf-string "%pid {version}"
""",
        "{haproxy} -Ws -f /srv/{name}/haproxy.cfg",
    ),
    "node": (
        "app.js",
        """\
const server = require("http").createServer((request, response) => {{
  response.end(`${{process.pid}} {version}\\n`);
}});
server.listen({{ fd: 3 }});
process.on("SIGTERM", () => server.close());
""",
        "{node} /srv/{name}/app.js",
    ),
    "go": (
        "main.go",
        """\
package main

import ("context"; "fmt"; "net"; "net/http"; "os"; "os/signal"; "syscall")

func main() {{
	listener, _ := net.FileListener(os.NewFile(3, "http"))
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {{
		fmt.Fprintf(w, "%d {version}", os.Getpid())
	}})
	server := &http.Server{{}}
	go server.Serve(listener)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	<-stop
	server.Shutdown(context.Background())
}}
""",
        "/srv/{name}/main",
    ),
    "php-fpm": (
        "index.php",
        "<?php echo getmypid() . ' {version}';",
        "{php-fpm} --nodaemonize --fpm-config /srv/{name}/fpm.conf",
    ),
    "uvicorn": (
        "app.py",
        """\
import os
async def app(scope, receive, send):
    if scope["type"] == "http":
        body = b"%d {version}" % os.getpid()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({{"type": "http.response.start", "status": 200, "headers": headers}})
        await send({{"type": "http.response.body", "body": body}})
""",
        "{python_bin}/uvicorn --workers 2 --lifespan off --no-access-log --app-dir /srv/{name} --fd {{fd:http}} app:app",
    ),
}


def other(machine: PrivateSystemd, install: Install, kind: str) -> Service:
    """One of the others, not started yet."""
    service: Service = install(machine, f"other{kind}", "holder")
    service.stop()
    machine.run(["mkdir", "-p", f"/srv/{service.name}"])
    write_version(service, kind, 1)
    places = {kind: needs(BINARIES[kind])} if kind in BINARIES else {}
    if kind == "php-fpm":
        text = PHP_FPM.format(name=service.name, port=service.port)
        machine.write(f"/srv/{service.name}/fpm.conf", text)
    places |= {"name": service.name, "python_bin": os.path.dirname(machine.python[0])}
    # Bytecode is told by the second, and two versions come in one.
    more = ["Environment=PYTHONDONTWRITEBYTECODE=1"]
    options = ["--ready", "listening"] if kind == "go" else []
    program = OTHERS[kind][2].format(**places)
    service.configure(*runner_unit(service, *options, program=program, more=more))
    return service


def write_version(service: Service, kind: str, number: int) -> None:
    """Have the next start answer with another version."""
    file, text, _ = OTHERS[kind]
    content = text.format(port=service.port, version=number)
    if kind != "go":
        service.machine.write(f"/srv/{service.name}/{file}", content)
        return
    with tempfile.TemporaryDirectory() as place:
        source, built = Path(place, file), Path(place, "main")
        source.write_text(content)
        environment = {**os.environ, "GOCACHE": f"{place}/cache", "GO111MODULE": "off"}
        go = [needs("go"), "build", "-o", str(built), str(source)]
        subprocess.run(go, check=True, env=environment)
        service.machine.copy_in(built, f"/srv/{service.name}/new")
    service.machine.run(["chmod", "755", f"/srv/{service.name}/new"])
    service.machine.run(["mv", f"/srv/{service.name}/new", f"/srv/{service.name}/main"])


class Addressed(Protocol):
    """Whatever answers at a port inside a machine."""

    @property
    def machine(self) -> PrivateSystemd: ...
    @property
    def port(self) -> int: ...


def get(service: Addressed, path: str = "/") -> bytes:
    """The body of an answer on a new connection; raises OSError or ValueError."""
    if isinstance(service, Service) and "php-fpm" in service.name:
        with network_of(service.machine):
            sock = socket.create_connection(("127.0.0.1", service.port), SETTLE)
        with sock:
            sock.sendall(fastcgi.request(f"/srv/{service.name}/index.php"))
            return fastcgi.answer(b"".join(iter(lambda: sock.recv(65536), b"")))
    with network_of(service.machine):
        sock = socket.create_connection(("127.0.0.1", service.port), SETTLE)
    with sock:
        sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end or b" 200 " not in head.split(b"\r\n")[0]:
        raise ValueError(f"answered {answer[:200]!r}")
    return body


def version(service: Addressed) -> int:
    """The version that answers."""
    return int(get(service).split()[1])


@dataclass
class Load:
    """What clients have seen: answers, failures, and the longest wait in seconds."""

    answers: int = 0
    failures: list[str] = field(default_factory=list)
    longest: float = 0.0
    streams: list[int] = field(default_factory=list)  #: bytes of each stream that has ended


@contextlib.contextmanager
def load(service: Addressed, *, streams: int = 0) -> Iterator[Load]:
    """One new connection after the other, and streams; at the end all are over."""
    seen, over = Load(), threading.Event()
    begun = threading.Barrier(streams + 2)

    def asks() -> None:
        begun.wait(SETTLE)
        while not over.is_set():
            began = time.monotonic()
            try:
                get(service)
                seen.answers += 1
            except (OSError, ValueError) as error:
                seen.failures.append(repr(error))
            seen.longest = max(seen.longest, time.monotonic() - began)
            time.sleep(0.005)

    def streamed() -> None:
        begun.wait(SETTLE)
        try:
            seen.streams.append(len(get(service, "/stream")))
        except (OSError, ValueError) as error:
            seen.failures.append(repr(error))

    threads = [threading.Thread(target=streamed) for _ in range(streams)]
    threads.append(threading.Thread(target=asks))
    for thread in threads:
        thread.start()
    begun.wait(SETTLE)
    try:
        yield seen
    finally:
        for thread in threads[:-1]:
            thread.join(SETTLE)
        over.set()
        threads[-1].join(SETTLE)


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
