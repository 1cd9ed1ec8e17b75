# SPDX-License-Identifier: LGPL-2.1-or-later
"""A few seconds of what `make fuzz` does for longer."""

import contextlib
import random
from pathlib import Path

import pytest

from tests.fuzz.decoders import decoders
from tests.fuzz.fuzz import Decoder, fuzz

#: Seconds for one decoder.
_SECONDS = 0.15


def test_nothing_but_errors_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every decoder, whatever its input is; none hangs, and no FD is left open."""
    monkeypatch.setenv("XDG_STATE_HOME", "set by what is tested")
    with contextlib.ExitStack() as stack:
        for decoder in decoders(tmp_path, stack):
            result = fuzz(decoder, _SECONDS, random.Random(decoder.name))
            assert (result.foreign, result.fds) == ([], 0), decoder.name


def test_a_foreign_error_and_a_hang_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search itself finds what it looks for."""
    monkeypatch.setattr("tests.fuzz.fuzz.LIMIT", 0.02)

    def fails(data: bytes) -> None:
        if len(data) != 1:
            raise KeyError("foreign")

    def hangs(data: bytes) -> None:
        while len(data) != 1:
            pass

    for run, what in ((fails, "KeyError"), (hangs, "Hang")):
        result = fuzz(
            Decoder("x", run, (ValueError,), [b"x"], lambda rng, data: b"xx"), 0.1, random.Random(1)
        )
        assert what in result.foreign[0][0]
