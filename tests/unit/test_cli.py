# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line without a systemd: usage, exit codes, words, and the manual page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import upgrader.tool.upgrade
from upgrader import cli
from upgrader.protocol.status_text import Origin, Status
from upgrader.tool import systemd_client
from upgrader.tool.outcome import ExitCode, Outcome, Result, Verb
from upgrader.tool.unit_errors import (
    BusUnreachable,
    InvalidUnitName,
    MissingPackage,
    NoSuchUnit,
    unit_name,
)
from upgrader.tool.upgrade import Wish

ROOT = Path(__file__).resolve().parents[2]
DONE = Outcome.done(
    Verb.UPGRADE,
    "web.service",
    "upgraded in 0.042s: generation 2",
    after=Status(2, Origin.RESTART, 1, 3, 210, 0),
)
FAILED = Outcome.failed(
    Verb.UPGRADE,
    "web.service",
    Result.NOT_SERVING,
    "the new instance exited with status 1: boom",
    "put a good version in place\nthen start it",
)


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """What `upgrade` returns instead of asking a systemd; the last one counts."""
    outcomes = [DONE]

    def upgrade(unit: str, wish: Wish, **options: object) -> Outcome:
        return outcomes[-1]

    monkeypatch.setattr(upgrader.tool.upgrade, "upgrade", upgrade)
    return outcomes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["upgrade"], "name a unit, or give --all"),
        (["upgrade", "--all", "web"], "--all stands for all units: name none"),
        (["upgrade", "web", "--mode", "warm"], "'warm' is not one of 'auto', 'live', 'restart'"),
        (["upgrade", "web", "--timeout", "5x"], "'5x' is not a time span"),
        (["upgrade", "web", "--timeout", "0"], "not a time to wait"),
        (["upgrade", "we b"], "not the name of a unit"),
        (["upgrade", "web.socket"], "socket unit"),
        (["frobnicate"], "No such command"),
        (["demo", "--json", "--shell"], "cannot be combined"),
        (["demo", "--service", "qemu", "--shell"], "are of --service web"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wrong usage ends with 2, names the item, and prints nothing on stdout."""
    assert cli.main(arguments) == ExitCode.USAGE
    shown = capfd.readouterr()
    assert words in shown.err
    assert shown.out == ""


def test_version_is_the_package_s(capfd: pytest.CaptureFixture[str]) -> None:
    """`--version` prints name and version."""
    assert cli.main(["--version"]) == 0
    assert capfd.readouterr().out == f"upgrader {upgrader.__version__}\n"


def test_the_help_lists_all(capfd: pytest.CaptureFixture[str]) -> None:
    """The help shows every command and the exit codes."""
    assert cli.main(["--help"]) == 0
    shown = capfd.readouterr().out
    assert all(f"  {name} " in shown for name in cli.cli.commands)
    assert all(f"  {code} " in shown for code in cli.EXIT_CODES)


def test_success_goes_to_stdout(outcome: list[Outcome], capfd: pytest.CaptureFixture[str]) -> None:
    """A success is one line on stdout."""
    assert cli.main(["upgrade", "web"]) == 0
    assert capfd.readouterr() == ("web.service: upgraded in 0.042s: generation 2\n", "")


def test_failure_goes_to_stderr(outcome: list[Outcome], capfd: pytest.CaptureFixture[str]) -> None:
    """A failure is one line, and what to do, on stderr."""
    outcome.append(FAILED)

    assert cli.main(["upgrade", "web"]) == 3
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "web.service: not upgraded, NOT SERVING: the new instance exited with status 1: boom",
        "  put a good version in place",
        "  then start it",
    ]


@pytest.mark.parametrize("which", [DONE, FAILED])
def test_json_is_one_object_on_stdout(
    which: Outcome, outcome: list[Outcome], capfd: pytest.CaptureFixture[str]
) -> None:
    """With --json, success and failure alike are one object on stdout."""
    outcome.append(which)
    code = cli.main(["upgrade", "web", "--json"])
    shown = json.loads(capfd.readouterr().out)

    assert shown["exit_code"] == code == which.exit_code
    assert shown["result"] == which.result
    assert shown["serves"] is (which is DONE)
    assert shown["line"] == which.line
    assert shown["cause"] == which.cause


def test_every_result_has_an_exit_code() -> None:
    """No result lacks an exit code, only success has 0, and only a serving unit has 1 or 5."""
    codes = {result: Outcome(Verb.UPGRADE, "x.service", result).exit_code for result in Result}

    assert [result for result, code in codes.items() if code == 0] == [Result.DONE]
    for result, code in codes.items():
        serves = Outcome(Verb.UPGRADE, "x.service", result).serves
        told = code in (ExitCode.FAILED, ExitCode.UNDECIDED)
        assert told == (serves is True and code != 0)
        assert code != ExitCode.NOT_SERVING or not serves


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NoSuchUnit("wbe.service", ("web.service",)), ExitCode.NOTHING_DONE),
        (MissingPackage("pystemd"), ExitCode.NOTHING_DONE),
        (InvalidUnitName("a b", "no name", remedy="another"), ExitCode.USAGE),
    ],
)
def test_errors_keep_their_remedy(error: NoSuchUnit, code: ExitCode) -> None:
    """An error becomes an outcome with its words and its remedy."""
    outcome = Outcome.of_error(Verb.UPGRADE, "given", error)

    assert outcome.exit_code == code
    assert outcome.remedy == error.remedy != ""
    assert error.message in outcome.line


def test_unit_names_may_lack_their_suffix() -> None:
    """`.service` may be left out, also where the name has dots or an instance."""
    assert unit_name("web") == "web.service"
    assert unit_name("web@1.2") == "web@1.2.service"
    assert unit_name("web.service") == "web.service"


def test_interruption_is_130(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends with 130 and says that systemd goes on."""

    def interrupted(*arguments: object, **options: object) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(upgrader.tool.upgrade, "upgrade", interrupted)

    assert cli.main(["upgrade", "web"]) == 130
    assert "if systemd was given a job, it goes on" in capfd.readouterr().err


def test_an_unexpected_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bug shows no traceback, but how to get it."""

    def broken(*arguments: object, **options: object) -> Outcome:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(upgrader.tool.upgrade, "upgrade", broken)
    monkeypatch.delenv("UPGRADER_DEBUG", raising=False)

    assert cli.main(["upgrade", "web"]) == ExitCode.NOT_SERVING
    shown = capfd.readouterr().err
    assert "UPGRADER_DEBUG=1" in shown
    assert "ZeroDivisionError" in shown
    assert "Traceback" not in shown
    monkeypatch.setenv("UPGRADER_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["upgrade", "web"])


def run_python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("package", ["click", "pystemd", "pystemd.dbuslib"])
def test_a_missing_package_is_named(package: str) -> None:
    """Without click or pystemd the message says what to install."""
    done = run_python(
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['upgrader', 'upgrade', 'web']\n"
        "from upgrader.__main__ import main; sys.exit(main())"
    )

    assert done.returncode == 4
    assert f"{package.partition('.')[0]} is missing" in done.stderr
    assert "pip install 'upgrader[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_changes_no_exit_code() -> None:
    """Neither a closed stdout nor a closed stderr changes the outcome or shows a traceback."""
    code = (
        "import sys, upgrader.tool.upgrade; from tests.unit.test_cli import DONE\n"
        "def upgrade(unit, mode, progress, **more): progress('going'); return DONE\n"
        "upgrader.tool.upgrade.upgrade = upgrade\n"
        "from upgrader import cli; sys.exit(cli.main(['upgrade', 'web']))"
    )
    read, write = os.pipe()
    os.close(read)
    try:
        for closed in ("stdout", "stderr"):
            other = "stderr" if closed == "stdout" else "stdout"
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=ROOT,
                text=True,
                check=False,
                timeout=60,
                **{closed: write, other: subprocess.PIPE},  # type: ignore[call-overload]
            )

            assert done.returncode == 0
            assert "Error" not in (done.stdout or done.stderr)
    finally:
        os.close(write)


def run_to_full_disk(*arguments: str, outcome: str = "DONE") -> "tuple[int, str]":
    """The exit code, and what comes on stderr, of a command whose stdout takes nothing."""
    code = (
        "import sys, upgrader.tool.upgrade; from tests.unit import test_cli\n"
        f"upgrader.tool.upgrade.upgrade = lambda *a, **more: test_cli.{outcome}\n"
        f"from upgrader import cli; sys.exit(cli.main({list(arguments)}))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True,
            check=False, timeout=60,
        )  # fmt: skip
    return done.returncode, done.stderr


FULL = "upgrader: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["upgrade", "--help"]])
def test_n6_what_is_shown_to_a_full_disk_is_not_shown(arguments: list[str]) -> None:
    """It is 4, and no bug of this program."""
    assert (ExitCode.NOTHING_DONE, FULL) == run_to_full_disk(*arguments)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_n6_an_upgrade_stands_although_the_disk_is_full(more: list[str]) -> None:
    """Its exit code is that of the upgrade, and each unit that was named has its turn."""
    assert (0, FULL) == run_to_full_disk("upgrade", "web", *more)
    code, said = run_to_full_disk("upgrade", "web", *more, outcome="FAILED")
    assert (3, bool(more)) == (code, FULL in said)


def test_n6_what_only_shows_ends_with_its_reader() -> None:
    """`status --watch | head -1` has no end of its own."""
    code = (
        "import time; from upgrader.cli.output import end_without_reader, show\n"
        "show('first'); end_without_reader(); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as watch:
        assert watch.stdout
        assert b"first\n" == watch.stdout.readline()
        watch.stdout.close()
        assert 0 == watch.wait(20)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, ("XDG_RUNTIME_DIR is not set", "su and sudo open no session")),
        ({"XDG_RUNTIME_DIR": "/nowhere"}, ("cannot be reached", "systemctl status user@")),
    ],
)
def test_n6_without_a_session_the_remedy_is_one(
    environment: dict[str, str], words: tuple[str, str]
) -> None:
    """The system's bus has nothing to do with it."""
    done = subprocess.run(
        [sys.executable, "-m", "upgrader", "list", "--user"], cwd=ROOT, capture_output=True,
        text=True, check=False, timeout=60, env={"PATH": os.environ["PATH"], **environment},
    )  # fmt: skip

    assert (4, "") == (done.returncode, done.stdout)
    assert all(word in done.stderr for word in words), done.stderr
    assert "dbus.socket" not in done.stderr


def test_a_machine_without_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is told to ask systemctl there."""
    monkeypatch.setattr(systemd_client, "_BOOTED", str(tmp_path / "nothing"))
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/nobody")
    with pytest.raises(BusUnreachable, match="it does not run on this machine") as caught:
        systemd_client.Systemd()
    assert "upgrader demo --shell" in caught.value.remedy


def test_n7_a_terminal_gets_colours_and_lines_that_fit() -> None:
    """A failure is red on a terminal, and wrapped between words."""
    ours, theirs = os.openpty()
    environment = {"PATH": os.environ["PATH"], "TERM": "xterm", "COLUMNS": "60"}
    try:
        subprocess.run(
            [sys.executable, "-m", "upgrader", "list", "--user"], cwd=ROOT, stderr=theirs,
            check=False, timeout=60, env=environment,
        )  # fmt: skip
        lines = os.read(ours, 65536).decode().splitlines()
    finally:
        os.close(ours)
        os.close(theirs)

    assert lines[0].startswith("\x1b[0;1;31mnothing shown: systemd cannot be reached")
    assert lines[0].endswith("\x1b[0m")
    assert len(lines) > 2
    assert all(len(line.replace("\x1b[0;1;31m", "").replace("\x1b[0m", "")) <= 60 for line in lines)


@pytest.mark.parametrize("name", sorted(cli.cli.commands))
def test_help_has_an_example(name: str) -> None:
    """Every command's help shows an example and describes every option."""
    command = cli.cli.commands[name]
    context = click.Context(command, info_name=f"upgrader {name}")

    assert f"  upgrader {name}" in command.get_help(context)
    assert all(each.help for each in command.params if isinstance(each, click.Option))


def test_the_manual_page_is_current() -> None:
    """packaging/man/upgrader.1 is what packaging/man/generate writes."""
    made = subprocess.run(
        [sys.executable, str(ROOT / "packaging/man/generate")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    assert (ROOT / "packaging/man/upgrader.1").read_text() == made.stdout, (
        "run: packaging/man/generate > packaging/man/upgrader.1"
    )
