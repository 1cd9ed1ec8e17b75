# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a runner decides by values alone: its command line, what a program is told, what is left."""

import ast
import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import SETTLE, eventually
from upgrader.errors import DeclarationError
from upgrader.protocol.fd import Fd
from upgrader.protocol.programs import Passing, Readiness, known, look_up, program_name
from upgrader.runner.accepted import Accepted
from upgrader.runner.after_stop import is_restarted
from upgrader.runner.kept_paths import Paths, put_back, remove_links
from upgrader.runner.options import Listen, RunnerOptions, option_table
from upgrader.runner.passing import Given, arguments, variables
from upgrader.runner.processes import RunningProcess, end
from upgrader.runner.shared_sockets import SocketSettings
from upgrader.runner.spawn import Held, StartOrder, soft_limits
from upgrader.runner.waiting_process import WaitingProcess
from upgrader.systemd.own_unit import StopReason


def given(*names: str) -> list[Given]:
    return [Given(name, None, ("127.0.0.1", 80)) for name in names]  # type: ignore[arg-type]


def test_what_is_known_of_a_program() -> None:
    """nginx is drained by SIGQUIT and says nothing when it is ready."""
    options = RunnerOptions.parse(["--listen", "http=:80", "--", "/usr/sbin/nginx", "-c", "x"], {})

    assert ("/usr/sbin/nginx", "-c", "x") == options.program
    assert [Listen("http", ":80")] == [*options.listen]
    assert ("nginx", Passing.NGINX, Readiness.LISTENING) == (
        options.name, options.passing, options.ready,
    )  # fmt: skip
    assert (signal.SIGQUIT, signal.SIGHUP) == (options.drain, options.reload)


def test_options_come_before_what_is_known() -> None:
    """An admin knows better."""
    words = ["--pass=listen-fds", "--ready=after:500ms", "--drain-signal=term", "--drain-limit=2h"]
    options = RunnerOptions.parse([*words, "--reload=/bin/x -y", "--", "nginx", "--check"], {})

    assert (Passing.LISTEN_FDS, Readiness.AFTER, 0.5) == (
        options.passing, options.ready, options.ready_after,
    )  # fmt: skip
    assert (signal.SIGTERM, 7200.0) == (options.drain, options.drain_limit)
    assert ("/bin/x", "-y") == options.reload
    assert ("nginx", "--check") == options.program


def test_options_as_variables_of_the_unit() -> None:
    """Each has one; what the command line says comes first, and its listeners are all there are."""
    given = {
        "UPGRADER_RUN_LISTEN": "http=:80 https=:443",
        "UPGRADER_RUN_SOCKET_MODE": "a=0600 b=660:root",
        "UPGRADER_RUN_DRAIN_LIMIT": "2h",
        "UPGRADER_RUN_CHECK": "curl -f 'a b'",
        "UPGRADER_RUN_READY": "",
    }
    options = RunnerOptions.parse(["--drain-limit=5s", "--", "nginx"], given)
    listens = RunnerOptions.parse(["--listen", "a=:1", "nginx"], given)

    assert ["http", "https"] == [each.name for each in options.listen]
    assert (5.0, ("curl", "-f", "a b")) == (options.drain_limit, options.check)
    assert [0o600, 0o660] == [each.mode for each in options.socket_modes]
    assert ["a"] == [each.name for each in listens.listen]
    assert 7200.0 == listens.drain_limit
    for wrong in {"UPGRADER_RUN_READY": "soon"}, {"UPGRADER_RUN_REDY": "notify"}:
        with pytest.raises(SystemExit):
            RunnerOptions.parse(["nginx"], wrong)
    assert "UPGRADER_RUN_VERSION_COMMAND" in [each.variable for each in option_table()]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--"],
        ["--ready=soon", "--", "x"],
        ["--ready=after", "--", "x"],
        ["--pass=x", "y"],
        ["--socket-mode=a=rw", "x"],
        ["--socket-mode=a=1777", "x"],
        ["--socket-mode=a=1:b:c:d", "x"],
    ],
)
def test_a_command_line_that_makes_no_sense(words: list[str]) -> None:
    """It is refused as usual."""
    with pytest.raises(SystemExit) as refused:
        RunnerOptions.parse(words, {})
    assert 2 == refused.value.code


@pytest.mark.parametrize(
    ("passing", "told"),
    [
        (Passing.LISTEN_FDS, {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}),
        (Passing.NGINX, {"NGINX": "3;4;"}),
        (
            Passing.SERVER_STARTER,
            {
                "SERVER_STARTER_PORT": "127.0.0.1:80=3;127.0.0.1:80=4",
                "SERVER_STARTER_GENERATION": "1",
            },
        ),
        (Passing.PHP_FPM, {"FPM_SOCKETS": "127.0.0.1:80=3,127.0.0.1:80=4"}),
        (Passing.NONE, {}),
    ],
)
def test_what_a_program_is_told(passing: Passing, told: dict[str, str]) -> None:
    """Each in its own way."""
    assert told == variables(passing, given("a", "b"))


def test_places_in_a_command_line() -> None:
    """The first FD of a name; a name that there is not is refused."""
    assert ["--fd=3", "{x}", "5"] == arguments(
        ["--fd={fd:a}", "{x}", "{fd:b}"], given("a", "a", "b")
    )
    with pytest.raises(DeclarationError, match="no such listener"):
        arguments(["{fd:c}"], given("a"))


@pytest.mark.parametrize(
    ("reason", "policy", "result", "restarted"),
    [
        (StopReason.STOP, "always", "success", False),
        (StopReason.RESTART, "no", "success", True),
        (StopReason.SOFT_REBOOT, "no", "success", True),
        (StopReason.NO_JOB, "no", "signal", False),
        (StopReason.NO_JOB, "always", "success", True),
        (StopReason.NO_JOB, "on-failure", "success", False),
        (StopReason.NO_JOB, "on-failure", "exit-code", True),
        (StopReason.NO_JOB, "on-abort", "exit-code", False),
        (StopReason.NO_JOB, "on-success", "success", True),
    ],
)
def test_who_goes_on_after_a_stop(
    reason: StopReason, policy: str, result: str, restarted: bool
) -> None:
    """A left program is ended only if nobody would drain it."""
    assert restarted is is_restarted(reason, policy, result)


def test_what_a_program_changes_is_put_back() -> None:
    """The backlog always; the flag and options of a program that is refused."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        listener.setblocking(False)
        settings = SocketSettings(listener)
        with listener.dup() as other:
            other.listen(5)
            other.setblocking(True)
            other.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
            with pytest.raises(Exception, match="O_NONBLOCK"):
                settings.require_kept("it")
            settings.restore(options=True)

            assert not os.get_blocking(other.fileno())
            assert 0 == other.getsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT)
            settings.require_kept("it")
            assert {100} == {backlog(each) for each in (listener, other)}


def backlog(sock: socket.socket) -> int:
    """As the kernel tells it: tcpi_sacked of a listener."""
    return int.from_bytes(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)[28:], "little")


def test_files_are_put_back(tmp_path: Path) -> None:
    """The same socket at its path, whatever has happened to that; the PID of who serves."""
    path, pid_file = tmp_path / "listener", tmp_path / "pid"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        inode = path.stat().st_ino
        paths = Paths(str(pid_file))
        paths.keep([listener])
        paths.note_pid(17)
        path.unlink()
        paths.restore()
        assert inode == path.stat().st_ino
        assert "17\n" == pid_file.read_text()
        path.unlink()
        path.write_text("another's")
        pid_file.write_text("18")  # of a program that was refused
        paths.restore()
        assert inode == path.stat().st_ino
        assert "17\n" == pid_file.read_text()
        paths.forget()

    assert {path, pid_file} == set(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/usr/sbin/php-fpm8.4", "php-fpm"),
        ("/usr/bin/python3.11", "python"),
        ("/srv/apachectl", "apachectl"),
        ("h2o", "h2o"),
        ("x-7", "x"),
        ("7", "7"),
    ],
)
def test_a_binary_with_its_version_in_its_name(path: str, name: str) -> None:
    """It is the program without it."""
    assert name == program_name(path)


def test_an_admin_says_more_of_a_program(tmp_path: Path) -> None:
    """Also what keeps it from being adopted; by its name with or without the version."""
    text = '[mine]\nexclusive = "a lock"\nforeground = ["-F"]\n[mine2]\nbinds = true\n'
    (tmp_path / "mine.toml").write_text(text)
    one, two = known("/bin/mine3", str(tmp_path)), known("mine2", str(tmp_path))

    assert ("a lock", ("-F",), False) == (one.exclusive, one.foreground, one.adoptable)
    assert (True, False) == (two.binds, two.adoptable)
    (tmp_path / "mine.toml").write_text("[mine]\nbinds = 1\n")
    with pytest.raises(ValueError, match=r"mine\.toml: mine: exclusive is a text"):
        known("mine", str(tmp_path))


@pytest.mark.parametrize("text", [b"[other", b"\xff\xfe", b"mine = 1\nmine = 2"])
def test_a_file_that_cannot_be_read_keeps_no_other_program_from_its_start(
    text: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of which program it is, nobody knows; whoever adopts one is told."""
    (tmp_path / "broken.toml").write_bytes(text)
    (tmp_path / "mine.toml").write_text('[mine]\nready = "listening"\n')

    assert Readiness.LISTENING is known("mine", str(tmp_path)).ready
    assert "broken.toml is left out" in caplog.text
    with pytest.raises(ValueError, match=r"broken\.toml"):
        look_up("mine", str(tmp_path))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_clients_before_the_commit_are_counted(
    family: socket.AddressFamily, tmp_path: Path
) -> None:
    """Each once, and no connection that is not of a listener."""
    address = {
        socket.AF_INET: ("127.0.0.1", 0),
        socket.AF_INET6: ("::1", 0),
        socket.AF_UNIX: str(tmp_path / "listener"),
    }[family]
    with socket.socket(family) as listener:
        listener.bind(address)
        listener.listen()
        name = listener.getsockname()
        process = RunningProcess.of(os.getpid())
        accepted = Accepted(process, [Given("x", listener, name)])
        accepted.look()
        assert 0 == accepted.count
        for number in (1, 2):
            with socket.socket(family) as client:
                client.connect(name)
                with listener.accept()[0]:
                    accepted.look()
                    accepted.look()
            assert number == accepted.count
        process.pidfd.close()


def test_what_is_stopped_sees_the_signal_that_ends_it() -> None:
    """It is waited for otherwise, as long as it may take to drain."""
    with subprocess.Popen(["sleep", "600"]) as started:
        process = RunningProcess.of(started.pid)
        process.send(signal.SIGSTOP)
        assert eventually(lambda: process.stopped)

        end([process], ((signal.SIGTERM, 600.0),))

        assert -signal.SIGTERM == started.wait(SETTLE)


def test_a_path_is_put_back_while_its_listener_is_there(tmp_path: Path) -> None:
    """Whoever removes it, at once; a runner that gives its listener up removes it for good."""
    path = tmp_path / "listener"

    async def back() -> bool:
        for _ in range(3):  # what has happened is seen by the next turn of the loop
            await asyncio.sleep(0)
        return path.exists()

    async def play() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
            paths = Paths("")
            paths.keep([sock])
            with paths.watched():
                path.unlink()
                assert await back()
                path.unlink()
                sock.close()
                assert not await back()
            paths.forget()

    asyncio.run(play())


def test_a_path_that_nobody_has_put_back(tmp_path: Path) -> None:
    """It is put back from the link of a runner that was killed; whatever is there is left alone."""
    path = tmp_path / "listener"
    listen = [Listen("main", f"unix:{path}"), Listen("tcp", ":80"), Listen("passed", None)]
    put_back(listen)
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        inode = path.stat().st_ino
        Paths("").keep([sock])
        path.unlink()
        put_back(listen)
        assert inode == path.stat().st_ino
        path.unlink()
        path.write_text("another's")
        put_back(listen)
        assert "another's" == path.read_text()
        remove_links(listen)

    assert [path] == [*tmp_path.iterdir()]


def test_a_program_gets_all_its_fds() -> None:
    """However many there are, at the numbers from 3 on, and no others; it waited where fewer files
    were allowed."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, allowed[1]))
    try:
        waiting = WaitingProcess()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)
    reading, writing = os.pipe()
    count = 600
    with open(reading, "rb") as answers, Fd(writing) as last, Fd(os.dup(2)) as other:
        code = f"import os; os.write({2 + count}, repr(os.listdir('/proc/self/fd')).encode())"
        fds = [*[other] * (count - 1), last]
        words = [sys.executable, "-I", "-S", "-c", code]
        held = Held(StartOrder(words, {}, fds, limits=soft_limits()), waiting)
        held.release()
        last.close()
        seen = answers.read().decode()
    # Its own look has one more.
    assert {*map(str, range(count + 4))} == {*ast.literal_eval(seen)}
    assert 0 == os.waitpid(held.process.pid, 0)[1]
    held.process.pidfd.close()
