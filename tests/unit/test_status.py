# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an instance says of itself: STATUS=, and the journal's native protocol."""

import logging
import socket
from pathlib import Path

import pytest

from upgrader.protocol.status_text import Origin, Status
from upgrader.systemd import journal
from upgrader.systemd.journal import JournalOutcome, Priority, report

LOADED = "generation 3, loaded by restart from generation 2: {}, {} left behind"


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (Status(1, Origin.COLD), "generation 1, cold start"),
        (
            Status(4, Origin.COLD, set_aside=3),
            "generation 4, cold start, image of generation 3 set aside",
        ),
        (
            Status(3, Origin.RESTART, 2, 5002, 12345, 0),
            LOADED.format("5002 FDs, 12.1K of state", 0),
        ),
        (
            Status(3, Origin.RESTART, 2, 0, 0, 7),
            LOADED.format("0 FDs, 0B of state", 7),
        ),
        (
            Status(3, Origin.RESTART, 2, 1, 2, 3, pause=0.0042, refused="no; really: not"),
            LOADED.format("1 FD, 2B of state", 3)
            + ", paused 4.2ms; upgrade failed: no; really: not",
        ),
        (
            Status(1, Origin.COLD, refused="not with me"),
            "generation 1, cold start; upgrade failed: not with me",
        ),
    ],
)
def test_a_status_in_one_line(status: Status, text: str) -> None:
    """For people, who see it in systemctl."""
    assert text == str(status)


def test_the_text_for_systemd_is_what_version_0_1_0_reads() -> None:
    """Its tool knows no other way to see what became of an upgrade."""
    status = Status(3, Origin.RESTART, 2, 1, 2210, 3, pause=0.0042)

    assert LOADED.format("1 FDs, 2210 bytes of state", 3) + ", paused 4.2 ms" == status.status_text
    assert "generation 1, cold start" == Status(1, Origin.COLD).status_text


def tell(message: str) -> None:
    report(
        message, Priority.ERR, unit="web.service", generation=3, side="destination", phase="load",
        outcome=JournalOutcome.FAILED,
    )  # fmt: skip


def test_the_journal_gets_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One datagram in the native protocol; a text of several lines has its length before it."""
    monkeypatch.setattr(journal, "SOCKET", str(tmp_path / "socket"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "socket"))
        tell("one\ntwo")
        data = sock.recv(65536)

    assert data.startswith(b"MESSAGE\n\x07\0\0\0\0\0\0\0one\ntwo\n")
    for field in (
        b"PRIORITY=3",
        b"UPGRADER_UNIT=web.service",
        b"UPGRADER_GENERATION=3",
        b"UPGRADER_SIDE=destination",
        b"UPGRADER_PHASE=load",
        b"UPGRADER_OUTCOME=failed",
        b"MESSAGE_ID=" + journal.MESSAGE_ID.encode(),
    ):
        assert b"\n" + field + b"\n" in data


@pytest.mark.parametrize("message", ["short", "x" * 1_000_000, "\udcff"])
def test_without_a_journal_it_is_logged(
    message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody there, or too long for it: the author's logging gets it, and nothing fails."""
    monkeypatch.setattr(journal, "SOCKET", str(tmp_path / "socket"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        if message != "short":
            sock.bind(str(tmp_path / "socket"))
        with caplog.at_level(logging.INFO, "upgrader"):
            tell(message)

    if message != "\udcff":
        assert [("upgrader", logging.ERROR, message)] == caplog.record_tuples
