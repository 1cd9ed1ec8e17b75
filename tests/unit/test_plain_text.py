# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service has written reaches a terminal, a metric and a picture as plain text of one line."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import upgrader
from upgrader.cli import main
from upgrader.cli.output import say, show_json, told
from upgrader.cli.overview_text import listed, shown
from upgrader.cli.screen import Screen, Tone
from upgrader.hooks import package_hook
from upgrader.protocol.phase import Phase
from upgrader.protocol.status_text import Origin, Status
from upgrader.protocol.varlink_types import (
    Backend,
    Connection,
    Description,
    Loaded,
    Migration,
    Refusal,
    Trial,
)
from upgrader.tool.history import HistoryEvent, upgrades
from upgrader.tool.history_svg import plot
from upgrader.tool.hold import Hold
from upgrader.tool.outcome import Outcome, Result, Verb
from upgrader.tool.overview import Overview
from upgrader.tool.plain_text import CELL, LINE, plain
from upgrader.tool.prometheus import metrics

ROOT = Path(upgrader.__file__).parent
#: The title of a terminal, a line of one's own, a text that is written backwards, and no end.
EVIL = "\x1b]0;owned\x07\r\nweb.service  serving\t\x9b2J\u202eabc\u2028\ud800 " + "x" * 10_000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("dev-\\x2d.service, 3 \N{SNOWMAN}", "dev-\\x2d.service, 3 \N{SNOWMAN}"),
        ("a\nb\tc\x1b[2J\x00", "a\\nb\\tc\\x1b[2J\\x00"),
        ("\x9b\u202e\u2028\ud800\xa0", "\\x9b\\u202e\\u2028\\ud800\\xa0"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text: str, shown: str) -> None:
    """The rest stays as it is."""
    assert shown == plain(text)
    assert shown == plain(shown)


@pytest.mark.parametrize("text", ["x" * 10_000, "\n" * 10_000])
def test_what_is_too_long_is_cut(text: str) -> None:
    """At the limit, its end is marked."""
    assert len(plain(text)) == LINE
    assert plain(text).endswith("…")
    assert len(plain(text, CELL)) == CELL


def calm() -> Overview:
    """The same instance, which says things of one word."""
    return everything_evil("word")


def everything_evil(evil: str = EVIL) -> Overview:
    """An instance that says the same of all that it is asked about."""
    said = Description(
        service=evil, version=evil, phase=evil, library=evil, changed=[evil], states={evil: 1},
        trials=[Trial(evil, problem=evil), Trial(evil)],
        backends=[Backend(evil, evil, address=evil)], connections=1,
        held=[Connection(evil, evil, waiting=evil), Connection(evil, evil, what=evil)],
        parameters={evil: evil}, loaded=Loaded(evil), refused=Refusal(reason=evil),
        migration=Migration(Phase.FAILED, mode=evil, reason=evil, times={evil: 1.0}),
    )  # fmt: skip
    return Overview(
        unit="dev-\\x2d.service", active="active (running)", serves=True, pid=1,
        status=Status(1, Origin.LIVE, refused=evil, dropped=(evil,), unsaved=(evil,)),
        instance=said, uses_upgrader=True, text=evil, draining=(said,), parked=(evil,),
        hold=Hold("dev-\\x2d.service", 1.0, evil),
    )  # fmt: skip


SCREENS = [Screen(), Screen(80), Screen(60, colours=True)]


def printable(text: str) -> bool:
    """Whether nothing but our own colours controls a terminal."""
    for colour in (*filter(None, Tone), "\x1b[0m"):
        text = text.replace(colour, "")
    return text.replace("\n", "").isprintable()


@pytest.mark.parametrize("there", SCREENS)
def test_a_row_is_one_line(there: Screen) -> None:
    """A version with a newline forges no second unit."""
    text = listed(there, [everything_evil()], 0.0)

    assert len(text.splitlines()) == 2
    assert printable(text)


@pytest.mark.parametrize("there", SCREENS)
def test_a_status_is_the_lines_of_this_tool(there: Screen) -> None:
    """Whatever the instance says, all is printable, and each line begins with a word of ours."""
    text = "\n".join(shown(there, everything_evil(), 0.0))

    assert printable(text)
    assert not [line for line in text.splitlines() if line.startswith("web.service")]
    if there.width is None:
        assert len(text.splitlines()) == len("\n".join(shown(there, calm(), 0.0)).splitlines())


@pytest.mark.parametrize("there", SCREENS)
def test_an_outcome_is_the_lines_of_this_tool(there: Screen) -> None:
    """Also where it is too wide for the terminal: what follows is indented."""
    text = told(there, Outcome.failed(Verb.UPGRADE, "a.service", Result.OLD_SERVES, EVIL, EVIL))

    assert printable(text)
    assert all(line.startswith("  ") for line in text.splitlines()[1:])


def test_json_on_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """It says the same, and has no character that could control a terminal."""
    evil = EVIL.replace("\ud800", "")
    show_json(json.dumps({"a": evil}, ensure_ascii=False).encode())
    out = capfd.readouterr().out
    assert out.rstrip("\n").isprintable()
    assert evil == json.loads(out)["a"]


def test_labels_of_metrics(capfd: pytest.CaptureFixture[str]) -> None:
    """Each sample is one line, and each label ends where it should."""
    for line in metrics([everything_evil()]).splitlines():
        assert line.isprintable()
        assert line.startswith(("#", "upgrader_"))
    assert '\\"' not in metrics([everything_evil()])


def test_a_picture() -> None:
    """It is well-formed."""
    event = HistoryEvent(1.0, 1, "source", "migrate", "failed", EVIL, EVIL, times=((EVIL, 1.0),))
    for text in ElementTree.fromstring(plot(EVIL, upgrades([event]))).itertext():
        assert text.replace("\n", "").isprintable()


def test_what_the_hook_and_failures_say(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also an error of which nobody knows who has written it."""

    def fail(*arguments: object) -> None:
        raise ValueError(EVIL)

    say(EVIL)
    monkeypatch.setattr(package_hook, "run", fail)
    package_hook.main(["web"])
    monkeypatch.setattr("upgrader.tool.set_and_cancel.cancel", lambda *a, **more: fail())
    main(["cancel", "web"])
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 3
    assert all(line.isprintable() for line in err)


def test_a_terminal_of_another_language() -> None:
    """What it cannot show is no reason to fail."""
    program = (
        "from upgrader import cli; from upgrader.cli.output import show; cli.main(['--version']);"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{program} show('\\N{{SNOWMAN}}')"],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "\\u2603" in done.stdout


#: Where text leaves this side, and what for.
_PRINTERS = {
    "cli/output.py": {"print"},
    "hooks/package_hook.py": {"print"},
    "__main__.py": {"print"},  # before anything can be imported
}


@pytest.mark.parametrize("room", ["cli", "tool", "hooks", "__main__.py"])
def test_all_that_is_printed_goes_through_one_place(room: str) -> None:
    """Nothing else prints, so that nothing that a service has written can pass by."""
    for path in [ROOT / room] if room.endswith(".py") else (ROOT / room).rglob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name == "print" or name.endswith((".echo", ".secho", "err.write", "out.write")):
                    found.add(name)
        assert found == _PRINTERS.get(str(path.relative_to(ROOT)), set()), path
