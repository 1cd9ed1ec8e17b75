# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a start failed, from journal entries as journalctl prints them."""

import json

import pytest

from tests.unit.units import unit
from upgrader.tool.failure_cause import CauseSource, JournalEntry, cause, exception, parse, reported

OLD, NEW = "0" * 32, "1" * 32
EXIT = "98e322203f7a4ed290d09fe03c09fe15"
FAILED = "d9b373ed55a64feb8242e02dbe79a49c"


def entries(*raw: dict[str, object], since: int = 0) -> list[JournalEntry]:
    """Entries, each after the one before."""
    lines = [json.dumps({"__MONOTONIC_TIMESTAMP": str(i), **each}) for i, each in enumerate(raw)]
    return list(parse(lines, since))


def program(text: object, invocation: str = NEW) -> dict[str, object]:
    """A line that the program wrote."""
    return {"MESSAGE": text, "_TRANSPORT": "stdout", "_SYSTEMD_INVOCATION_ID": invocation}


def exited(code: str, status: str) -> dict[str, object]:
    """The main process ended."""
    return {
        "MESSAGE": "Main process exited", "MESSAGE_ID": EXIT, "COMMAND": "ExecStart",
        "EXIT_CODE": code, "EXIT_STATUS": status, "INVOCATION_ID": NEW,
    }  # fmt: skip


def failed(result: str, invocation: str = NEW) -> dict[str, object]:
    """The unit failed."""
    return {"MESSAGE_ID": FAILED, "UNIT_RESULT": result, "INVOCATION_ID": invocation}


def test_the_library_s_own_words_come_first() -> None:
    """What the library reported is the cause, whatever else was written."""
    ours: dict[str, object] = {
        "MESSAGE": "state 'x' is unreadable\nmore",
        "UPGRADER_OUTCOME": "failed",
    }
    found = cause(
        entries(ours, program("noise"), exited("exited", "1"), failed("exit-code")),
        unit(),
        old_invocation=OLD,
    )

    assert (found.text, found.source) == ("state 'x' is unreadable", CauseSource.LIBRARY)


def test_last_words_that_journald_could_not_place() -> None:
    """A process that has ended has no invocation any more; what came before the start is another's."""

    def said(last: str) -> str:
        found = cause(
            entries(
                program("goodbye", ""), {"MESSAGE": "Starting", "INVOCATION_ID": NEW}, program(last, ""),
                exited("exited", "1"), failed("exit-code"),
            ),
            unit(),
            old_invocation=OLD,
        )  # fmt: skip
        return found.text

    assert "no such key" in said("no such key")
    assert "goodbye" not in said("")


def test_of_a_traceback_the_line_that_names_the_exception() -> None:
    """A Python traceback is told by its exception, even if more was written after it."""
    lines = [
        "starting",
        "Traceback (most recent call last):",
        '  File "x.py", line 1, in <module>',
        "    import missing",
        "ModuleNotFoundError: No module named 'missing'",
        "sys:1: ResourceWarning: unclosed",
    ]
    found = cause(entries(*map(program, lines), exited("exited", "1"), failed("exit-code")), unit())

    assert found.source is CauseSource.PROGRAM
    assert found.text == (
        "the new instance exited with status 1: ModuleNotFoundError: No module named 'missing'"
    )


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([program("bye"), exited("exited", "3"), failed("exit-code")], "status 3: bye"),
        (
            [program([98, 97, 255]), exited("exited", "3"), failed("exit-code")],
            "status 3: ba\ufffd",
        ),
        ([exited("killed", "KILL"), failed("signal")], "killed by SIGKILL"),
        ([exited("dumped", "SEGV"), failed("core-dump")], "killed by SIGSEGV and dumped core"),
        ([failed("timeout")], "not ready within TimeoutStartSec=2s"),
        ([failed("protocol")], "ended without ever being ready"),
        ([failed("start-limit-hit")], "too many starts"),
        ([failed("new-in-300")], "systemd says new-in-300"),
    ],
)
def test_systemd_s_result_in_plain_words(raw: list[dict[str, object]], words: str) -> None:
    """Without words of the library, PID 1's result and the last line written are the cause."""
    assert words in cause(entries(*raw), unit()).text


def test_giving_up_is_not_the_cause() -> None:
    """When PID 1 gave up, what made it give up is the cause."""
    found = cause(
        entries(exited("killed", "KILL"), failed("signal"), failed("start-limit-hit")),
        unit(result="start-limit-hit"),
    )

    assert "SIGKILL" in found.text


def test_the_old_instance_s_end_is_not_the_cause() -> None:
    """What the instance before wrote or how it ended is left out."""
    found = cause(
        entries(program("old words", OLD), failed("timeout", OLD), failed("protocol")),
        unit(),
        old_invocation=OLD,
    )

    assert "ever being ready" in found.text


def test_without_a_journal_the_unit_tells() -> None:
    """Where no journal can be read, the unit's own properties are used."""
    found = cause((), unit(result="exit-code", exec_main_code=1, exec_main_status=203))

    assert found.text == "the new instance exited with status 203"


def test_only_entries_of_this_attempt_count() -> None:
    """Entries from before the attempt, and lines that are no entry, are skipped."""
    assert [entry.message for entry in entries(program("a"), program("b"), since=1)] == ["b"]
    assert list(parse(["-- No entries --", ""], 0)) == []


@pytest.mark.parametrize("number", ["²", "9" * 400, "-1", "", "nan"])
def test_a_field_that_should_be_a_number(number: str) -> None:
    """It is the service's own text, and no reason to know nothing of the rest."""
    made = entries(
        {**program("no licence"), "PRIORITY": number, "_PID": number}, exited("exited", number)
    )
    assert [(6, 0), (6, 0)] == [(each.priority, each.pid) for each in made]
    assert "no licence" in cause(made, unit(result="exit-code")).text


@pytest.mark.parametrize("line", ["", "[]", "1", "[" * 100_000, '{"a": NaN', '{"MESSAGE": [300]}'])
def test_what_is_no_entry(line: str) -> None:
    """It is skipped, or says nothing."""
    assert not any(each.message for each in parse([line], 0))


def test_a_long_line_is_cut() -> None:
    """A cause stays one line of bounded length."""
    found = cause(entries(program("x" * 9000), exited("exited", "3"), failed("exit-code")), unit())

    assert len(found.text) < 600


def test_of_an_upgrade_only_what_has_its_id() -> None:
    """Entries of another upgrade explain nothing."""
    one = {"MESSAGE": "one", "UPGRADER_OUTCOME": "failed", "UPGRADER_ID": "1"}
    other = {"MESSAGE": "other", "UPGRADER_OUTCOME": "failed", "UPGRADER_ID": "2"}

    assert "one" == reported(entries(one, other), "1")
    assert "other" == reported(entries(one, other))
    assert "" == reported(entries(one, other), "3")


def test_u11_what_went_to_a_file() -> None:
    """It is the cause if nothing was written to the journal."""
    traceback = ["Traceback (most recent call last):", "  File", "ImportError: no", "bye"]
    ended: list[dict[str, object]] = [exited("exited", "1"), failed("exit-code")]
    found = cause(entries(*ended), unit(), old_invocation=OLD, written=traceback)
    assert "the new instance exited with status 1: ImportError: no" == found.text
    other = cause(entries(program("in the journal"), *ended), unit(), written=traceback)
    assert other.text.endswith(": in the journal")
    assert "ImportError: no" == exception(["noise", *traceback, "GET /"])
    assert "" == exception(["noise"])
