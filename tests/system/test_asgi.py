# SPDX-License-Identifier: LGPL-2.1-or-later
"""A FastAPI application that nobody changed, under `python -m upgrader.asgi` and a real systemd."""

import contextlib
import http.client
import json
import re
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.support import SETTLE, eventually
from tests.system.reloading import live, processes, reload
from tests.system.serving import Install, Service, network_of
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.lab.private_systemd.command import InsideCommand
from upgrader.protocol.status_text import Origin

CERTIFICATE = Path(__file__).parents[1] / "unit" / "tls.pem"
TLS = "/opt/upgrader-tests/tls.pem"

#: Two interpreters on a busy CI machine are slow; what is waited for is not longer than otherwise.
PATIENT = "Environment=UPGRADER_DOWNTIME_LIMIT=5s"
IMPATIENT = ["Environment=UPGRADER_DOWNTIME_LIMIT=1us"]  # the destination is hardly ever so quick


def asgi(machine: PrivateSystemd, name: str, *options: str) -> list[str]:
    """A unit that serves webapp.py, and can be upgraded live."""
    python = " ".join(machine.python)
    command = f"{python} -m upgrader.asgi webapp:app --app-dir /opt/upgrader-tests"
    return [
        *live(machine, name),
        PATIENT,
        "ExecStart=",
        f"ExecStart={command} --port ${{PORT}} {' '.join(options)}",
    ]


@contextlib.contextmanager
def websocket(service: Service) -> Iterator[ClientConnection]:
    with (
        service.connect() as client,
        connect("ws://x/ws", sock=client.sock, open_timeout=SETTLE) as opened,
    ):
        yield opened


class Get:
    """A keep-alive connection of the machine's network."""

    def __init__(self, service: Service, *, tls: ssl.SSLContext | None = None) -> None:
        address = "127.0.0.1", service.port
        self.connection = http.client.HTTPConnection(*address, timeout=SETTLE)
        if tls:
            self.connection = http.client.HTTPSConnection(*address, timeout=SETTLE, context=tls)
        with network_of(service.machine):
            self.connection.connect()

    def version(self) -> str:
        self.connection.request("GET", "/")
        answer = self.connection.getresponse()
        return str(json.load(answer)["version"])

    def close(self) -> None:
        self.connection.close()


def upgrade(service: Service, number: int) -> None:
    """Reload into another version, and wait for the socket of the new one."""
    assert eventually(service.answers)
    service.environment(ROUND=str(number))
    assert reload(service), service.messages()


@pytest.mark.parametrize(
    ("reloads", "url", "options"),
    [
        (10, "http://127.0.0.1:{}/quick", "--http httptools --loop uvloop"),
        (3, "http://127.0.0.1:{}/slow", "--http h11 --loop asyncio"),
        (3, "https://127.0.0.1:{}/quick", f"--ssl-keyfile {TLS} --ssl-certfile {TLS}"),
    ],
    ids=["quick", "slow", "tls"],
)
def test_reloads_under_load(
    host_machine: PrivateSystemd,
    install: Install,
    tmp_path: Path,
    reloads: int,
    url: str,
    options: str,
) -> None:
    """wrk on keep-alive connections, curl on new ones: not one request fails. Those that are too
    slow to be waited for, and those over TLS, are answered by the old process."""
    host_machine.copy_in(CERTIFICATE, TLS)
    command = asgi(host_machine, "asgi", options, "--no-access-log")
    service = install(host_machine, "asgi", "webapp", *command)
    url = url.format(service.port)
    over = tmp_path / "over"
    loop = f"until [ -e {over} ]; do curl -ksSf -m 20 -o /dev/null {url} || echo failed; done"
    wrk = ["wrk", "-t1", "-c8", "-d600", "--timeout", "20", url]
    with load(host_machine, wrk) as keeping, load(host_machine, ["sh", "-c", loop]) as dialling:
        for number in range(1, reloads + 1):
            upgrade(service, number)
        keeping.send_signal(signal.SIGINT)
        said = keeping.communicate(timeout=SETTLE)[0]
        over.touch()
        errors = dialling.communicate(timeout=SETTLE)[0]
    assert "" == errors
    assert "errors" not in said, said
    assert "Non-2xx" not in said, said
    found = re.search(r"(\d+) requests in", said)
    assert found
    assert int(found[1]) >= 10 * reloads, said
    assert (reloads + 1, Origin.LIVE) == (service.status.generation, service.status.origin)
    assert eventually(lambda: [str(service.pid)] == processes(service))


@contextlib.contextmanager
def load(machine: PrivateSystemd, command: list[str]) -> Iterator[InsideCommand]:
    """A client in the machine's network, whose output is kept; killed if the test has failed."""
    with machine.popen(
        command, network_only=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as started:
        try:
            yield started
        finally:
            started.kill()


def test_tls_connections_move(host_machine: PrivateSystemd, install: Install) -> None:
    """With UPGRADER_TLS=move, in a sandbox that hides /proc and kills at a system call that it does not
    list: the same connections of TLS 1.3 are answered by three versions; one of TLS 1.2 is drained, and
    counted with its reason."""
    host_machine.copy_in(CERTIFICATE, TLS)
    service = install(
        host_machine, "asgi-tls", "webapp",
        *asgi(host_machine, "asgi-tls", f"--ssl-keyfile {TLS} --ssl-certfile {TLS}"),
        "Environment=UPGRADER_TLS=move",
        "ProtectProc=invisible",
        "ProcSubset=pid",
        "SystemCallFilter=@system-service",
    )  # fmt: skip
    context, old = (ssl.create_default_context(cafile=CERTIFICATE) for _ in range(2))
    context.check_hostname = old.check_hostname = False
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    gets = [Get(service, tls=context) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        stays = Get(service, tls=old)
        for get in (*gets, stays):
            stack.callback(get.close)
        assert ["0"] * 4 == [get.version() for get in (*gets, stays)]
        for number in (1, 2):
            upgrade(service, number)
            assert [str(number)] * 3 == [get.version() for get in gets]
            if number == 1:
                said = service.machine.run(["upgrader", "status", service.unit]).stdout
                assert "it speaks TLSv1.2" in said
                assert "0" == stays.version()


def test_what_cannot_move(host_machine: PrivateSystemd, install: Install) -> None:
    """A WebSocket and a long answer go on in the old process, `upgrader status` names them, the
    answer is complete, and the WebSocket is closed with 1012 when websocket-timeout is over."""
    times = "UPGRADER_LIVE_DRAIN_TIMEOUT=10min UPGRADER_WEBSOCKET_TIMEOUT=8s"
    more = [*asgi(host_machine, "held"), f"Environment={times}"]
    service = install(host_machine, "held", "webapp", *more)
    stream, get = Get(service), Get(service)
    with contextlib.closing(stream), contextlib.closing(get), websocket(service) as opened:
        opened.send("one")
        assert "0 one" == opened.recv(SETTLE)
        stream.connection.request("GET", "/until-marked")
        answer = stream.connection.getresponse()
        before = time.monotonic()

        upgrade(service, 1)

        assert "1" == get.version()
        opened.send("two")
        assert "0 two" == opened.recv(SETTLE)
        said = service.machine.run(["upgrader", "status", service.unit]).stdout
        assert "WebSocket /ws" in said
        assert "GET /until-marked" in said
        assert re.search(r"is draining: 2 open, for (9min|10min)", said), said
        service.inside("/run/held/mark").touch()
        assert ["begin", "end"] == answer.read().decode().split()
        upgrade(service, 2)  # while the first one still drains
        assert "2" == get.version()
        opened.send("three")
        assert "0 three" == opened.recv(SETTLE)
        with pytest.raises(ConnectionClosed) as closed:
            opened.recv(SETTLE)
        assert 1012 == closed.value.rcvd.code
        assert time.monotonic() - before > 7.0  # websocket-timeout is 8 s
    assert eventually(lambda: [str(service.pid)] == processes(service))
    assert "WebSocket /ws" in service.messages()
    assert "end of" in service.messages()


def test_a_restart(host_machine: PrivateSystemd, install: Install) -> None:
    """Idle connections cross it, a request in flight is answered first, a WebSocket is told."""
    service = install(host_machine, "asgi-restart", "webapp", *asgi(host_machine, "asgi-restart"))
    stream, get = Get(service), Get(service)
    with contextlib.closing(stream), contextlib.closing(get), websocket(service) as opened:
        assert "0" == get.version()
        stream.connection.request("GET", "/stream/5")
        answer = stream.connection.getresponse()
        service.environment(ROUND="1")

        service.restart()

        assert [str(number) for number in range(5)] == answer.read().decode().split()
        assert ["1", "1"] == [get.version(), stream.version()]
        with pytest.raises(ConnectionClosed) as closed:
            opened.recv(SETTLE)
        assert 1012 == closed.value.rcvd.code
    assert Origin.RESTART is service.status.origin
    assert "WebSocket /ws" in service.messages()


def test_websockets_that_move(host_machine: PrivateSystemd, install: Install) -> None:
    """Live and over a restart; a stop closes them with 1012. PID 1 keeps nothing of their handshakes
    once the new instance serves."""
    service = install(
        host_machine, "moving", "webapp", *asgi(host_machine, "moving", "--websockets move")
    )
    with websocket(service) as opened:
        opened.send("one")
        assert "0 one" == opened.recv(SETTLE)
        upgrade(service, 1)
        opened.send("two")
        assert "1 two" == opened.recv(SETTLE)
        service.environment(ROUND="2")
        service.restart()
        opened.send("three")
        assert "2 three" == opened.recv(SETTLE)
        assert eventually(lambda: "goes on with 1 connections" in service.messages())
        stored = service.machine.run(
            ["systemctl", "show", "-P", "NFileDescriptorStore", service.unit]
        )
        assert "1" == stored.stdout.strip()  # the listener
        service.machine.run(["systemctl", "stop", service.unit])
        with pytest.raises(ConnectionClosed) as closed:
            opened.recv(SETTLE)
        assert 1012 == closed.value.rcvd.code


@pytest.mark.parametrize("identifier", ["", "shop"], ids=["none", "set"])
def test_p12_all_lines_of_a_unit_have_one_identifier(
    host_machine: PrivateSystemd, install: Install, identifier: str
) -> None:
    """What the application writes, and what the library tells of an upgrade, in both instances. Until
    an instance has asked systemd for SyslogIdentifier=, its process names what it tells."""
    name = f"asgi-named{identifier}"
    more = [f"SyslogIdentifier={identifier}"] if identifier else []
    service = install(host_machine, name, "webapp", *asgi(host_machine, name), *more)
    upgrade(service, 1)
    upgrade(service, 2)
    assert eventually(lambda: [str(service.pid)] == processes(service))
    python = Path(host_machine.python[0]).name

    found = {
        str(entry.get("SYSLOG_IDENTIFIER") or entry["_COMM"])
        for entry in service.journal()
        if entry.get("_SYSTEMD_UNIT") == service.unit
    }

    assert {identifier or python} <= found <= {identifier or python, python}
    replaced = [
        entry for entry in service.journal() if "has been replaced" in str(entry["MESSAGE"])
    ]
    assert {identifier or python} == {str(entry["SYSLOG_IDENTIFIER"]) for entry in replaced}


class Newcomers(threading.Thread):
    """One new client after the other; notes how long the slowest waits for its answer."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.service = service
        self.longest = 0.0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            asked = time.monotonic()
            with contextlib.closing(Get(self.service)) as get:
                get.version()
            self.longest = max(self.longest, time.monotonic() - asked)

    def longest_in(self, work: Callable[[], object]) -> float:
        self.start()
        work()
        self.over.set()
        self.join(SETTLE)
        return self.longest


def test_p4_what_others_wait_in_a_restart(host_machine: PrivateSystemd, install: Install) -> None:
    """Half a request, an endless answer, a slow reader and a silent WebSocket lengthen the restart, and
    nobody's wait."""
    more = [
        *asgi(host_machine, "p4"),
        "Environment=UPGRADER_DRAIN_TIMEOUT=11s UPGRADER_DOWNTIME_LIMIT=",
    ]
    service = install(host_machine, "p4", "webapp", *more)
    assert eventually(service.answers)
    plain = Newcomers(service).longest_in(service.restart)
    half, stream, slow = Get(service), Get(service), Get(service)
    with (
        contextlib.closing(half), contextlib.closing(stream), contextlib.closing(slow),
        websocket(service),
    ):  # fmt: skip
        half.connection.sock.send(b"GE")
        stream.connection.request("GET", "/until-marked")
        stream.connection.getresponse()
        slow.connection.request("GET", "/big")
        begin = time.monotonic()
        longest = Newcomers(service).longest_in(service.restart)
        took = time.monotonic() - begin
    print(
        f"longest wait in a restart: plain {plain:.2f} s, beside what does not end {longest:.2f} s"
    )

    assert took > 10.0
    assert longest < 10.0  # as long as stop and start, not as drain-timeout
    assert 3 <= service.status.left_behind


def test_p7_a_restart_waits_for_what_the_generation_before_drains(
    host_machine: PrivateSystemd, install: Install
) -> None:
    """`upgrader upgrade --mode restart` says for what, and nothing is cut."""
    times = "UPGRADER_DRAIN_TIMEOUT=60s UPGRADER_LIVE_DRAIN_TIMEOUT=60s"
    more = [*asgi(host_machine, "drains"), f"Environment={times}"]
    service = install(host_machine, "drains", "webapp", *more)
    stream = Get(service)
    with contextlib.closing(stream):
        stream.connection.request("GET", "/until-marked")
        answer = stream.connection.getresponse()
        upgrade(service, 1)
        command = ["upgrader", "upgrade", service.unit, "--mode", "restart"]
        told = service.machine.run([*command, "--dry-run", "--json"]).stdout
        assert "generation 1 still drains 1 connection (GET /until-marked" in told
        with service.machine.popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as upgrading:
            assert upgrading.stdout
            told = ""
            while "generation 1 still drains 1 connection (GET /until-marked" not in told:
                told = upgrading.stdout.readline()
                assert told
            service.inside("/run/drains/mark").touch()
            assert ["begin", "end"] == answer.read().decode().split()
            assert "has cut" not in upgrading.stdout.read()
        assert 0 == upgrading.returncode
    assert 3 == service.status.generation


def test_what_does_not_end(host_machine: PrivateSystemd, install: Install) -> None:
    """A restart waits for it up to drain-timeout, then it is cut, and named in both instances."""
    more = [*asgi(host_machine, "asgi-cut"), "Environment=UPGRADER_DRAIN_TIMEOUT=1s"]
    service = install(host_machine, "asgi-cut", "webapp", *more)
    stream, get = Get(service), Get(service)
    with contextlib.closing(stream), contextlib.closing(get):
        assert "0" == get.version()
        stream.connection.request("GET", "/until-marked")
        answer = stream.connection.getresponse()
        service.environment(ROUND="1")

        service.restart()

        with pytest.raises(http.client.IncompleteRead):
            answer.read()
        assert "1" == get.version()
    assert 1 == service.status.left_behind
    named = [line for line in service.messages().splitlines() if "GET /until-marked of" in line]
    assert 2 == len(named)


def test_a_stop(host_machine: PrivateSystemd, install: Install) -> None:
    """It is for good: a request in flight is answered, a WebSocket told, a newcomer refused."""
    service = install(host_machine, "asgi-stop", "webapp", *asgi(host_machine, "asgi-stop"))
    stream, idle = Get(service), Get(service)
    with contextlib.closing(stream), contextlib.closing(idle), websocket(service) as opened:
        assert "0" == idle.version()
        stream.connection.request("GET", "/stream/5")
        answer = stream.connection.getresponse()

        service.stop()

        assert [str(number) for number in range(5)] == answer.read().decode().split()
        with pytest.raises(ConnectionClosed) as closed:
            opened.recv(SETTLE)
        assert closed.value.rcvd is not None
        assert 1012 == closed.value.rcvd.code
        with pytest.raises(ConnectionRefusedError):
            service.connect()
    assert "end of" in service.messages()


def test_failed_reloads_under_load(
    host_machine: PrivateSystemd, install: Install, tmp_path: Path
) -> None:
    """A source that gives up after the freeze serves on: no request fails, none is lost."""
    more = [*asgi(host_machine, "asgi-failing", "--no-access-log"), *IMPATIENT]
    service = install(host_machine, "asgi-failing", "webapp", *more)
    url = f"http://127.0.0.1:{service.port}/quick"
    done: list[bool] = []
    with load(host_machine, ["wrk", "-t1", "-c8", "-d600", "--timeout", "20", url]) as wrk:
        while done.count(False) < 3:
            assert eventually(service.answers)
            service.environment(ROUND=str(len(done) + 1))
            done.append(reload(service))
            assert len(done) < 10, done
        wrk.send_signal(signal.SIGINT)
        said = wrk.communicate(timeout=SETTLE)[0]
    assert "no progress within" in service.messages()
    assert "errors" not in said, said
    assert "Non-2xx" not in said, said
    assert 1 + done.count(True) == service.status.generation


def test_in_the_same_process(host_machine: PrivateSystemd, install: Install) -> None:
    """Mode exec: a request in flight is answered first, since nobody could do so afterwards."""
    service = install(host_machine, "asgi-exec", "webapp", *asgi(host_machine, "asgi-exec"))
    stream, get = Get(service), Get(service)
    with contextlib.closing(stream), contextlib.closing(get):
        assert "0" == get.version()
        stream.connection.request("GET", "/stream/5")
        answer = stream.connection.getresponse()
        before = service.pid
        assert eventually(service.answers)

        service.machine.run(["upgrader", "upgrade", "--mode", "exec", service.unit])

        assert [str(number) for number in range(5)] == answer.read().decode().split()
        assert ["0", "0"] == [get.version(), stream.version()]
        assert (before, 2) == (service.pid, service.status.generation)


def test_a_version_that_does_not_start(host_machine: PrivateSystemd, install: Install) -> None:
    """Its start-up runs before anything is disturbed: the reload fails, and nobody notices."""
    service = install(host_machine, "asgi-bad", "webapp", *asgi(host_machine, "asgi-bad"))
    get = Get(service)
    with contextlib.closing(get):
        assert "0" == get.version()
        before = service.pid
        assert eventually(service.answers)
        service.environment(MODE="refusing")

        assert not reload(service)

        assert "no database" in service.messages()
        assert (before, "0") == (service.pid, get.version())


def test_p11_limit_max_requests(host_machine: PrivateSystemd, install: Install) -> None:
    """A web service that has had enough is upgraded live; no request fails, no connection ends."""
    lines = asgi(host_machine, "enough", "--limit-max-requests", "20")
    service = install(host_machine, "enough", "webapp", *lines, "Restart=on-failure")
    get = Get(service)
    generations = set()
    try:
        while max(generations, default=0) < 3:
            assert {get.version() for _ in range(10)} == {"0"}
            generations.add(service.status.generation)
    finally:
        get.close()
    assert ["0"] == service.show("NRestarts")
    assert Origin.LIVE is service.status.origin
