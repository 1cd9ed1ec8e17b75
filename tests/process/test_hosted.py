# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs whose connections other libraries own, restarted into other versions and libraries."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.chat import DEADLINE, Client
from tests.support import eventually
from upgrader.codes import Code
from upgrader.protocol.status_text import Origin
from upgrader.testing import Service, ServiceError

HERE = Path(__file__).parent
GET = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Web:
    """One service, whose versions are programs of different kinds."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "socket"
        self.service = Service(environment={"PYTHONPATH": str(HERE)}, timeout=DEADLINE)

    def command(self, kind: str, version: str) -> list[str]:
        program, *options = kind.split()
        if program != "asgi":
            return [sys.executable, str(HERE / "hosted.py"), program, str(self.path), version]
        run = [sys.executable, "-m", "upgrader.asgi", "asgi_app:app", "--uds", str(self.path)]
        return ["env", f"VERSION={version}", *run, *options]

    def ask(self, client: Client, text: str = GET) -> str:
        client.send(text)
        length = 0
        while line := client.line():
            if line.lower().startswith("content-length:"):
                length = int(line.split(":")[1])
            if line == "\r":
                break
        return client.take(length)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    web = Web(tmp_path)
    with web.service:
        yield web


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("asgi --http h11 --loop asyncio", "asgi --http httptools --loop uvloop"),
        ("asgi --http httptools --loop uvloop", "aiohttp"),
        ("aiohttp", "asgi --http h11 --loop uvloop"),
        ("streams", "streams"),
    ],
)
def test_idle_connections_cross(web: Web, first: str, second: str) -> None:
    """To the next version and back, even from one server to another: HTTP is HTTP."""
    web.service.start(web.command(first, "one"))
    with Client(web.path) as client, Client(web.path) as new:
        assert "one" == web.ask(client)
        status = web.service.upgrade(web.command(second, "two"))
        assert (Origin.RESTART, 3, 0) == (status.origin, status.fds, status.left_behind)
        assert ["two", "two"] == [web.ask(client), web.ask(new)]
        web.service.upgrade(web.command(first, "three"))
        assert ["three", "three"] == [web.ask(client), web.ask(new)]
        assert "three" == web.ask(client)


@pytest.mark.parametrize(
    ("first", "second"),
    [("handler", "aiohttp"), ("aiohttp", "streams"), ("streams", "asgi --loop uvloop")],
)
def test_a_program_of_another_kind(web: Web, first: str, second: str) -> None:
    """Connections that would be misunderstood refuse the upgrade; the one before loads them."""
    web.service.start(web.command(first, "one"))
    with Client(web.path) as client:
        assert "one" == web.ask(client)
        web.service.stop()
        with pytest.raises(ServiceError, match="in place of protocol") as refused:
            web.service.start(web.command(second, "two"))
        assert ("lifespan shutdown" in refused.value.stderr) == second.startswith("asgi")
        web.service.start(web.command(first, "three"))
        assert "three" == web.ask(client)


@pytest.mark.parametrize(
    "kind", ["asgi --http h11", "asgi --http httptools --loop uvloop", "aiohttp"]
)
def test_p4_a_restart_serves_everybody_while_something_has_no_end(web: Web, kind: str) -> None:
    """Half a request, an event stream and a reader that does not read keep nobody else waiting; after
    `drain-timeout` they are cut, and counted."""
    web.service.environment["UPGRADER_DRAIN_TIMEOUT"] = "2s"
    web.service.start(web.command(kind, "one"))
    process = web.service.process
    assert process is not None
    with Client(web.path) as half, Client(web.path) as stream, Client(web.path) as slow:
        half.send("GE")
        for client, path in (stream, "events"), (slow, "big"):
            client.send(GET.replace("/", f"/{path}", 1))
            assert client.line().startswith("HTTP/1.1 200")
        begin = last = time.monotonic()
        process.terminate()
        while process.poll() is None:
            with Client(web.path) as other:
                other.sock.settimeout(1)
                try:
                    web.ask(other)
                except TimeoutError:  # it is for the next instance to answer
                    continue
            last = time.monotonic()

        assert last - begin > 0.5  # else none at all is answered
        assert time.monotonic() - begin < DEADLINE / 2
    assert 3 == web.service.start(web.command(kind, "two")).left_behind


def test_p4_nothing_holds_a_process_that_has_parked(web: Web) -> None:
    """A shutdown of its own may take what is left of the time to stop, and a second at least."""
    web.service.environment["UPGRADER_DRAIN_TIMEOUT"] = "200ms"
    web.service.start(web.command("stubborn", "one"))
    with Client(web.path) as client:
        assert "one" == web.ask(client)
        web.service.upgrade(web.command("handler", "two"))
        assert "two" == web.ask(client)


def test_p4_a_task_that_outlives_its_answer_is_waited_for(web: Web) -> None:
    """While all are served."""
    web.service.start(web.command("asgi", "one"))
    with Client(web.path) as client, Client(web.path) as other:
        assert "one" == web.ask(client, GET.replace("/ ", "/later "))
        assert web.service.process is not None
        web.service.process.terminate()
        assert "one" == web.ask(other)
        web.service.stop()
        told = web.service.stderr
        assert 0 < told.index("later is done") < told.index("lifespan shutdown")


def test_half_a_request_ends_here(web: Web) -> None:
    """It is waited for, answered before the end, and the rest of the connection moves."""
    web.service.start(web.command("asgi", "one"))
    with Client(web.path) as client:
        client.send(GET[:20])
        assert web.service.process is not None
        web.service.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            web.service.process.wait(0.2)
        assert "one" == web.ask(client, GET[20:])
        web.service.stop()
        web.service.start(web.command("asgi", "two"))
        assert "two" == web.ask(client)


def test_p3_a_restart_that_takes_longer_than_keep_alive(web: Web) -> None:
    """While half a request is waited for, others are served; while nobody serves, an idle connection
    does not time out, and what its client sends meanwhile is answered."""
    web.service.start(web.command("asgi --timeout-keep-alive 1", "one"))
    with Client(web.path) as half, Client(web.path) as idle:
        half.send(GET[:20])
        assert web.service.process is not None
        web.service.process.terminate()
        assert "one" == web.ask(idle)
        assert "one" == web.ask(half, GET[20:])
        web.service.stop()
        idle.sock.settimeout(1.5)
        with pytest.raises(TimeoutError):
            idle.sock.recv(1)
        idle.sock.settimeout(DEADLINE)
        idle.send(GET)
        web.service.start(web.command("asgi --timeout-keep-alive 1", "two"))
        assert "two" == web.ask(idle, "")
        assert "two" == web.ask(idle)


SLOW = GET.replace("/ ", "/slow ")
WEBSOCKET = (
    "GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
#: An attempt that does not wait long for what does not end.
IMPATIENT = {"UPGRADER_DRAIN_TIMEOUT": "500ms", "UPGRADER_MIGRATION_TIMEOUT": "3s"}


def test_p1_a_request_that_may_write_to_a_state_is_waited_for(web: Web) -> None:
    """Others are served meanwhile; what it has written is there afterwards. Half a request is not
    waited for: its client is told, before anything of it was done."""
    web.service.start(web.command("stateful", "one"))
    with Client(web.path) as slow, Client(web.path) as other, Client(web.path) as half:
        assert "one 0" == web.ask(half)
        half.send(GET[:20])
        slow.send(SLOW)
        upgrade = web.service.begin_live(web.command("stateful", "two"))
        assert "one 0" == web.ask(other)
        Path(f"{web.path}.go").touch()
        assert "one 1" == web.ask(slow, "")
        assert 1 == upgrade.wait().left_behind
        assert half.gone()
        assert ["two 1", "two 1"] == [web.ask(slow), web.ask(other)]


@pytest.mark.parametrize("request_", [SLOW, WEBSOCKET], ids=["slow", "websocket"])
def test_p1_a_request_that_does_not_end_refuses_the_upgrade(web: Web, request_: str) -> None:
    """It is named, and goes on as if nothing had happened."""
    web.service.environment |= IMPATIENT
    web.service.start(web.command("stateful", "one"))
    with Client(web.path) as busy, Client(web.path) as other:
        busy.send(request_)
        assert "one 0" == web.ask(other)
        with pytest.raises(ServiceError, match=request_.split()[1]) as refused:
            web.service.live(web.command("stateful", "two"))
        assert Code.BUSY_WORK is refused.value.code
        assert "one 0" == web.ask(other)
        Path(f"{web.path}.go").touch()
        assert (
            "HTTP/1.1 101" in busy.line() if request_ is WEBSOCKET else "one 1" == web.ask(busy, "")
        )


def test_p1_what_an_author_lets_drain_is_left_behind(web: Web) -> None:
    """A request without an end, in a program that says that it may end in the old instance."""
    web.service.environment |= IMPATIENT
    web.service.start(web.command("drains", "one"))
    with Client(web.path) as busy, Client(web.path) as other:
        busy.send(WEBSOCKET)
        assert "one 0" == web.ask(other)
        assert 1 == web.service.live(web.command("drains", "two")).left_behind
        assert "two 0" == web.ask(other)


def test_p12_websockets_can_be_closed_at_the_commit(web: Web) -> None:
    """With 1012: their clients meet the new version, and the old process ends, however long it might
    drain anything else."""
    web.service.environment |= {
        "UPGRADER_WEBSOCKET_TIMEOUT": "0",
        "UPGRADER_WEBSOCKET_SPREAD": "0",
        "UPGRADER_LIVE_DRAIN_TIMEOUT": "1h",
    }
    web.service.start(web.command("drains", "one"))
    with Client(web.path) as chatting:
        assert "" == web.ask(chatting, WEBSOCKET)
        web.service.live(web.command("drains", "two"))
        assert b"\x88\x02\x03\xf4" == chatting.rest()
    assert eventually(lambda: not web.service.draining)


def test_a_drain_after_a_live_upgrade_has_a_limit_of_its_own(web: Web) -> None:
    """Longer than drain-timeout, which others wait for; what is open at its end is cut and named."""
    web.service.environment |= {
        "UPGRADER_DRAIN_TIMEOUT": "100ms",
        "UPGRADER_WEBSOCKET_TIMEOUT": "500ms",
        "UPGRADER_LIVE_DRAIN_TIMEOUT": "3s",
    }
    web.service.start(web.command("drains", "one"))
    go = Path(f"{web.path}.go")
    with Client(web.path) as chatting, Client(web.path) as slow:
        assert "" == web.ask(chatting, WEBSOCKET)
        slow.send(SLOW)
        assert 2 == web.service.live(web.command("drains", "two")).left_behind
        assert chatting.rest()  # so websocket-timeout has passed, and drain-timeout long before
        go.touch()
        assert "HTTP/1.1 500" in slow.line()  # its state is the new instance's by now
    assert eventually(lambda: not web.service.draining)
    go.unlink()
    with Client(web.path) as endless:
        endless.send(SLOW)
        assert 1 == web.service.live(web.command("drains", "three")).left_behind
        assert endless.gone()
    assert eventually(lambda: not web.service.draining)


def test_the_lifespan_of_an_application(web: Web) -> None:
    """It begins before the instance is ready, and ends with it, also when everything has moved. What
    its state names is called before a freeze, and at the end of a replaced instance."""
    web.service.start(web.command("asgi", "one"))
    assert "lifespan startup" in web.service.stderr
    assert 0o666 == stat.S_IMODE(os.stat(web.path).st_mode)  # a proxy is another user
    assert "quiesced" not in web.service.stderr
    web.service.stop()
    told = web.service.stderr
    assert 0 < told.index("quiesced") < told.index("replaced") < told.index("lifespan shutdown")


def test_an_instance_that_has_served_enough(web: Web) -> None:
    """--limit-max-requests ends it as systemd would: everything is parked for the next one."""
    web.service.start(web.command("asgi --limit-max-requests 2", "one"))
    with Client(web.path) as client:
        assert ["one", "one"] == [web.ask(client), web.ask(client)]
        assert web.service.process is not None
        assert 0 == web.service.process.wait(DEADLINE)
        assert 2 == web.service.start(web.command("asgi", "two")).generation
        assert "two" == web.ask(client)


def test_signal_handlers_of_others(web: Web) -> None:
    """They run, but it is not they who end the process."""
    web.service.start(web.command("signals", "one"))
    with Client(web.path) as client:
        assert "one" == web.ask(client)
        web.service.stop()
        assert "theirs" in web.service.stderr
        web.service.start(web.command("handler", "two"))
        assert "two" == web.ask(client)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        (["--workers", "2"], "template units"),
        (["--reload"], "systemctl reload"),
        (["--fd", "3"], "PID 1 passed none of that name"),
    ],
)
def test_options_that_cannot_be(web: Web, option: list[str], why: str) -> None:
    """Refused before anything is touched, with the reason."""
    command = [sys.executable, "-m", "upgrader.asgi", "asgi_app:app", *option]
    with pytest.raises(ServiceError) as refused:
        web.service.start(command)
    assert why in " ".join(refused.value.stderr.split())
