# SPDX-License-Identifier: LGPL-2.1-or-later
"""TLS connections of unchanged ASGI applications cross live upgrades, whoever the client is."""

import contextlib
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.chat import DEADLINE
from tests.process.tls_clients import CERTIFICATE, OpenSsl, PythonTls, free_port
from upgrader.protocol.status_text import Status
from upgrader.testing import Service, ServiceError

HERE = Path(__file__).parent


class Web:
    """`python -m upgrader.asgi --ssl-...`, in the versions that a test asks for."""

    def __init__(self, *options: str, **environment: str) -> None:
        self.port = free_port()
        self.options = options
        self.service = Service(
            environment={"PYTHONPATH": str(HERE), "UPGRADER_TLS": "move", **environment},
            timeout=DEADLINE,
        )

    def command(self, version: str, *options: str) -> list[str]:
        run = [
            sys.executable, "-m", "upgrader.asgi", "asgi_app:app", "--port", str(self.port),
            "--ssl-certfile", str(CERTIFICATE), "--ssl-keyfile", str(CERTIFICATE),
        ]  # fmt: skip
        return ["env", f"VERSION={version}", *run, *(options or self.options)]

    def start(self, version: str) -> Status:
        return self.service.start(self.command(version))

    def live(self, version: str, *options: str) -> Status:
        return self.service.live(self.command(version, *options))


@contextlib.contextmanager
def web(*options: str, **environment: str) -> Iterator[Web]:
    made = Web(*options, **environment)
    with made.service:
        yield made


def python_context() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=CERTIFICATE)
    context.check_hostname = False
    return context


SUITES = [
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
]


@pytest.mark.parametrize("loop", ["asyncio", pytest.param("uvloop", marks=pytest.mark.matrix)])
def test_openssl_with_key_updates(loop: str) -> None:
    """In each suite, with a KeyUpdate before the move, after it, and with small fragments: no new
    handshake, and every answer is right."""
    with web("--loop", loop) as service, contextlib.ExitStack() as stack:
        service.start("one")
        clients = [
            stack.enter_context(OpenSsl(service.port, "-ciphersuites", suite, *options))
            for suite in SUITES
            for options in ([], ["-maxfraglen", "512"])
        ]
        assert {"one"} == {client.ask() for client in clients}
        for client in clients:
            client.update_keys(both=True)
        assert {"one"} == {client.ask() for client in clients[::2]}  # the others have one to come
        for client in clients:
            client.update_keys(both=False)

        assert 0 == service.live("two").left_behind

        assert {"two"} == {client.ask() for client in clients}
        for client in clients:
            client.update_keys(both=True)
        assert {"two"} == {client.ask() for client in clients}
        assert 0 == service.live("three").left_behind
        assert {"three"} == {client.ask() for client in clients}
        assert [1 << 20] * 2 == [len(client.ask("/wide")) for client in clients[:2]]
        for client in clients:  # only at its end does it tell of each handshake
            assert b"ew, TLSv1.3" not in client.seen


def test_curl_keeps_its_connection() -> None:
    """The first request connects, and those after the upgrade need no other connection."""
    with web() as service:
        service.start("one")
        url = f"https://127.0.0.1:{service.port}/"
        curl = subprocess.Popen(
            ["curl", "-sk", "--rate", "1/s", "-w", " %{num_connects}\n", *[url] * 60],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert curl.stdout
        with curl, curl.stdout:
            assert "one 1\n" == curl.stdout.readline()
            service.live("two")
            line = "one 0\n"
            while line == "one 0\n":
                line = curl.stdout.readline()
            curl.kill()
        assert "two 0\n" == line


NODE = """
const https = require("https");
const agent = new https.Agent({keepAlive: true, maxSockets: 1, rejectUnauthorized: false});
const ask = () => https.get({port: process.argv[1], agent}, answer => {
  let text = "";
  answer.on("data", data => text += data);
  answer.on("end", () => console.log(text, answer.req.reusedSocket));
}).on("error", error => console.log(String(error)));
require("readline").createInterface({input: process.stdin}).on("line", ask);
ask();
"""


@pytest.mark.matrix
@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_node_keeps_its_connection() -> None:
    """As curl does."""
    with web() as service:
        service.start("one")
        node = subprocess.Popen(
            ["node", "-e", NODE, str(service.port)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert node.stdin
        assert node.stdout
        with node:
            assert "one false\n" == node.stdout.readline()
            for version in ("two", "three"):
                service.live(version)
                node.stdin.write("\n")
                node.stdin.flush()
                assert f"{version} true\n" == node.stdout.readline()
            node.kill()


def test_certificates_of_clients() -> None:
    """A client that has shown one moves while the same authorities are trusted, and so does one that
    has resumed its session; and not when certificates are not asked for any more."""
    ask = ("--ssl-ca-certs", str(CERTIFICATE), "--ssl-cert-reqs", "2")
    with web(*ask) as service:
        service.start("one")
        context = python_context()
        context.load_cert_chain(CERTIFICATE)
        with PythonTls(service.port, context) as client:
            assert "one" == client.ask()
            with PythonTls(service.port, context, client.sock.session) as resumed:
                assert resumed.sock.session_reused
                assert "one" == resumed.ask()
                assert 0 == service.live("two").left_behind
                assert ["two"] * 2 == [client.ask(), resumed.ask()]
            assert 1 == service.live("three", *ask[:3], "0").left_behind
            assert "two" == client.ask()  # its last answer
            with pytest.raises((ConnectionError, ssl.SSLError)):
                client.ask()


@contextlib.contextmanager
def attacker(port: int, copied: bytes, keys: Path) -> Iterator[Callable[[], str]]:
    """A client that has made a whole handshake under a copied random; asks for `/`."""
    script = [sys.executable, HERE / "tls_attacker.py", str(port), copied.hex(), keys]
    with subprocess.Popen(
        script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        told, answers = process.stdin, process.stdout
        assert told
        assert answers

        def ask() -> str:
            told.write("\n")
            told.flush()
            return answers.readline().strip()

        yield ask
        told.close()
        process.wait(DEADLINE)


def key_lines(log: Path) -> dict[str, list[str]]:
    """Of a key log: the random, and the secret, by label."""
    lines = [line.split() for line in log.read_text().splitlines() if line[0] != "#"]
    return {label: [random, secret] for label, random, secret in lines}


def test_a_copied_random(tmp_path: Path) -> None:
    """Whoever makes a handshake of his own under the random of another client gets his own keys, and the
    other keeps hers: both move, and both get the right answers."""
    context = python_context()
    context.keylog_filename = str(tmp_path / "hers")
    with web() as service:
        service.start("one")
        with PythonTls(service.port, context) as client:
            assert "one" == client.ask()
            hers = key_lines(tmp_path / "hers")
            copied = bytes.fromhex(hers["SERVER_TRAFFIC_SECRET_0"][0])
            with attacker(service.port, copied, tmp_path / "his") as ask:
                assert "one" == ask()
                his = key_lines(tmp_path / "his")
                for label in "CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0":
                    assert hers[label][0] == his[label][0]
                    assert hers[label][1] != his[label][1]
                for version in ("two", "three"):
                    assert 0 == service.live(version).left_behind
                    assert [version, version] == [client.ask(), ask()]


def test_off_by_default_and_over_a_restart() -> None:
    """TLS connections are drained, as ever."""
    with web(UPGRADER_TLS="") as service:
        service.start("one")
        with PythonTls(service.port, python_context()) as client:
            assert "one" == client.ask()
            assert 1 == service.live("two").left_behind
            assert "one" == client.ask()
    with web() as service:
        service.start("one")
        with PythonTls(service.port, python_context()) as client:
            assert "one" == client.ask()
            assert 1 == service.service.upgrade(service.command("two")).left_behind
            with pytest.raises((ConnectionError, ssl.SSLError)):
                client.ask()


def test_a_version_without_it() -> None:
    """Does not take them, and they have their last answer; the listener moves as ever."""
    with web() as service:
        service.start("one")
        with PythonTls(service.port, python_context()) as client:
            assert "one" == client.ask()
            service.service.environment["UPGRADER_TLS"] = ""
            assert 1 == service.live("two").left_behind
            assert "one" == client.ask()


def test_what_may_not_be() -> None:
    """A word that is none, and a key log of the admin's, are refused at the start, with the reason."""
    with web(UPGRADER_TLS="yes") as service, pytest.raises(ServiceError, match="not one of drain"):
        service.start("one")


def test_secrets_are_nowhere() -> None:
    """While connections are open and after they have moved: in no image of the store, in no file that
    the processes have open, in no variable, and no process leaves a core dump."""
    with web() as service:
        service.start("one")
        context = python_context()
        log = service.service.runtime_directory / "keys"
        context.keylog_filename = str(log)
        with PythonTls(service.port, context) as client:
            assert "one" == client.ask()
            words = [line.split()[2] for line in log.read_text().splitlines() if line[0] != "#"]
            secrets = [bytes.fromhex(word) for word in words]
            for version in ("two", "three"):
                service.live(version)
                assert version == client.ask()
                process = service.service.process
                assert process
                _require_nowhere(process.pid, secrets, log)
                for _, fd in service.service.store:
                    _require_none_in(_content(f"/proc/self/fd/{fd.fileno()}"), secrets)
                limits = Path(f"/proc/{process.pid}/limits").read_text()
                (core,) = [line for line in limits.splitlines() if "core file" in line]
                assert "0" == core.split()[4]


def _require_nowhere(pid: int, secrets: list[bytes], log: Path) -> None:
    """In no open file of a process, and not in its environment."""
    _require_none_in(Path(f"/proc/{pid}/environ").read_bytes(), secrets)
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(entry.path)
            assert "secret" not in target  # of secrets that have crossed: closed by now
            if target.startswith("/memfd:"):
                _require_none_in(_content(entry.path), secrets)


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:  # a socket
        return b""


def _require_none_in(content: bytes, secrets: list[bytes]) -> None:
    for secret in secrets:
        assert secret not in content
        assert secret.hex().encode() not in content.lower()


def test_a_destination_that_dies_takes_no_connection(tmp_path: Path) -> None:
    """Loaded and refused: the source goes on with its own keys, and the next upgrade has them."""
    with web() as service:
        service.start("one")
        with PythonTls(service.port, python_context()) as client:
            assert "one" == client.ask()
            for _ in range(3):
                live = service.service.begin_live(service.command("two"))
                with contextlib.suppress(ServiceError):
                    live.abort()
                if service.service.describe()["generation"] > 1:
                    break
                assert "one" == client.ask()
            service.live("three")
            assert "three" == client.ask()
