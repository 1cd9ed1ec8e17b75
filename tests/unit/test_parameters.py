# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parameters from the environment: as systemd writes them, and errors that name the variable."""

import shutil
import subprocess

import pytest

from tests.support import cannot_run
from upgrader.errors import DeclarationError, ParameterError
from upgrader.protocol.parameters import SETTABLE, Parameters
from upgrader.protocol.systemd_syntax import boolean, show_span, time_span

SPANS = {
    "5": 5.0,
    "5s": 5.0,
    " 5 s ": 5.0,
    "1min30s": 90.0,
    "1min 30s": 90.0,
    "1h 2": 3602.0,
    "5 5s": 10.0,
    "5s5": 10.0,
    "1.5s": 1.5,
    ".5s": 0.5,
    "500ms": 0.5,
    "5 msec": 0.005,
    "5us": 5e-6,
    "5\N{MICRO SIGN}s": 5e-6,
    "5\N{GREEK SMALL LETTER MU}s": 5e-6,
    "2d": 172800.0,
    "3weeks": 1814400.0,
    "2M": 5259600.0,
    "2m": 120.0,
    "1y": 31557600.0,
    "0": 0.0,
    "infinity": float("inf"),
}
NO_SPANS = ["", " ", "-5", "5x", "5S", "5ns", "s", ".", "5.", "1.s", "1.5.5", "1e3", "0x10", "inf",
            "infinity5", "5,5", "\N{ARABIC-INDIC DIGIT THREE}"]  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), SPANS.items())
def test_time_spans(text: str, seconds: float) -> None:
    """Every form of systemd.time(7)."""
    assert pytest.approx(seconds) == time_span(text)


@pytest.mark.parametrize("text", NO_SPANS)
def test_what_is_no_time_span(text: str) -> None:
    """The error shows the text."""
    with pytest.raises(ValueError, match="is not a time span") as caught:
        time_span(text)

    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", [*SPANS, *NO_SPANS])
def test_systemd_reads_the_same(text: str) -> None:
    """What we read is what systemd-analyze(1) reads."""
    if shutil.which("systemd-analyze") is None:
        cannot_run("systemd-analyze is missing")
    done = subprocess.run(
        ["systemd-analyze", "timespan", "--", text], capture_output=True, text=True, check=False
    )
    if text in NO_SPANS:
        assert done.returncode != 0
    elif text != "infinity":
        found = [line.split()[1] for line in done.stdout.splitlines() if "s:" in line]

        assert [str(round(time_span(text) * 1e6))] == found


def test_booleans() -> None:
    """Those of systemd, in any case."""
    assert all(boolean(text) for text in ("1", "yes", "Y", "true", "T", "On"))
    assert not any(boolean(text) for text in ("0", "no", "N", "false", "F", "OFF"))
    with pytest.raises(ValueError, match="'maybe'"):
        boolean("maybe")


def test_parameters_come_from_the_environment() -> None:
    """Nothing set, or set to nothing, is the default."""
    assert Parameters() == Parameters.from_environment({"UPGRADER": "", "PATH": "/bin"})
    wanted = Parameters(enabled=False, drain_timeout=90.0, load_attempts=3, discard="all")
    assert wanted == Parameters.from_environment(
        {
            "UPGRADER": "off",
            "UPGRADER_DRAIN_TIMEOUT": "1min 30s",
            "UPGRADER_LOAD_ATTEMPTS": "3",
            "UPGRADER_DISCARD": "all",
        }
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("UPGRADER", "maybe"),
        ("UPGRADER_DRAIN_TIMEOUT", "soon"),
        ("UPGRADER_LOAD_ATTEMPTS", "many"),
        ("UPGRADER_LOAD_ATTEMPTS", "0"),
        ("UPGRADER_LOAD_ATTEMPTS", "-1"),
        ("UPGRADER_DISCARD", "this one"),
    ],
)
def test_bad_parameters_are_named(variable: str, value: str) -> None:
    """The variable and its value."""
    with pytest.raises(DeclarationError, match=f"{variable}: .*{value}"):
        Parameters.from_environment({variable: value})


def test_infinity_is_bounded() -> None:
    """A wait of `infinity` is one that every timer can take."""
    parameters = Parameters.from_environment({"UPGRADER_DRAIN_TIMEOUT": "infinity"})

    assert 86400 < parameters.drain_timeout < 2**31 / 1000


def test_unknown_variables_are_found() -> None:
    """A typing error is worth a warning."""
    environment = {"UPGRADER_DRAIN_TIMOUT": "5s", "UPGRADER_DISCARD": "3", "UPGRADER": "on"}

    environment |= {"UPGRADER_RUN_READY": "notify"}  # a runner's own
    assert ["UPGRADER_DRAIN_TIMOUT"] == Parameters.unknown(environment)


@pytest.mark.parametrize(
    "text", ["0", "300ms", "10s", "1min 30s", "1h 5s", "2d", "1us", "infinity", "1s 500ms"]
)
def test_spans_are_shown_as_written(text: str) -> None:
    """What is shown can be read again, and is the same."""
    assert text == show_span(time_span(text))


TRANSFERS = {
    "yes": (True, True),
    "no": (False, False),
    "door=no": (False, True),
    "yes door=no": (False, True),
    "no door=yes": (False, False),  # a connection moves only if both are on
    "door=no other=off": (False, False),
}


@pytest.mark.parametrize(("text", "expected"), TRANSFERS.items())
def test_what_may_move(text: str, expected: tuple[bool, bool]) -> None:
    """backend-transfer for all, for one, from the environment; on for both, or it does not move."""
    parameters = Parameters.from_environment({"UPGRADER_BACKEND_TRANSFER": text})

    assert expected == (parameters.transfers("door"), parameters.transfers("other"))
    again = Parameters().updated(
        {"backend-transfer": parameters.shown()["backend-transfer"]}, ["door", "other"]
    )
    assert parameters.backend_transfer == again.backend_transfer


def test_parameters_set_by_name() -> None:
    """What is said of all backends never overrules what is said of one, whatever the order."""
    values = {"backend-transfer.door": "no", "backend-transfer": "yes", "drain-timeout": "1min"}
    changed = Parameters().updated(values, ["door"])

    assert (60.0, False, True) == (
        changed.drain_timeout,
        changed.transfers("door"),
        changed.transfers("other"),
    )
    assert "yes door=no" == changed.shown()["backend-transfer"]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("drain-timeout", "soon", "is not a time span"),
        ("drain-timeout", "", "is not a time span"),
        (
            "drian-timeout",
            "5s",
            "no such parameter; there are backend-transfer, backend-transfer-mechanism, down",
        ),
        ("drain-timeout.door", "5s", "no such parameter"),
        ("backend-transfer", "maybe", "neither yes nor no"),
        ("backend-transfer.dor", "no", "no such backend; there are door"),
        ("mode", "fast", "is not one of auto, live, restart, exec"),
        ("discard", "all", "no such parameter"),
    ],
)
def test_parameters_that_make_no_sense(name: str, value: str, reason: str) -> None:
    """The error names the parameter and says what there is."""
    with pytest.raises(ParameterError, match=reason) as caught:
        Parameters().updated({name: value}, ["door"])

    assert name == caught.value.name


def test_what_backend_transfer_is_for() -> None:
    """The first words of its help say that it is local."""
    assert SETTABLE["backend-transfer"].text.startswith("For a local upgrade over a UNIX socket")
