# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who goes first, where the kernel lets only one process at a time say so."""

import contextlib
import ctypes
import os
import socket
import threading
from pathlib import Path

import pytest

from tests.support import eventually
from upgrader.systemd import precedence
from upgrader.systemd.main_command import MainCommand
from upgrader.takeover.launch import NewProcess

_PR_SET_DUMPABLE = 4  # linux/prctl.h

needs_autogroups = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/proc/self/autogroup").exists(), reason="root, and autogroups"
)


def test_a_claim_is_made_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many others set theirs meanwhile: else it would serve in last place for ever."""
    tries: list[int] = []

    def busy(nice: int, pid: int | str = "self") -> bool:
        tries.append(nice)
        return len(tries) == 5

    monkeypatch.setattr(precedence, "_set", busy)
    monkeypatch.setattr(precedence, "_PAUSE", 0.001)
    precedence.claim()

    assert eventually(lambda: tries == [0] * 5)
    assert eventually(lambda: "upgrader-precedence" not in {t.name for t in threading.enumerate()})


def test_a_new_process_is_not_left_in_last_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its courtesy is taken back until that has worked: on a busy machine it would never be ready."""
    answers = [False, False, True]
    monkeypatch.setattr(
        precedence, "_set", lambda nice, pid: (nice, pid) == (0, 77) and answers.pop(0)
    )
    courtesy = precedence.Courtesy(77)
    while courtesy.left is not None:
        assert 0 < courtesy.left < 1
        courtesy.end()

    assert [] == answers


@needs_autogroups
def test_a_courtesy_is_not_shown_after_its_end() -> None:
    """However late a new process runs for the first time: from its first word on it gives way."""

    def make(pid: int, line: int, adjustment: int) -> MainCommand:
        return MainCommand("/bin/sleep", ("sleep", "60"), {})

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, contextlib.closing(NewProcess(theirs, make)) as new:
        try:
            place = Path(f"/proc/{new.pid}")
            assert place.joinpath("autogroup").read_text().endswith(" nice 19\n")
            precedence.Courtesy(new.pid).end()
            new.release()
            assert eventually(lambda: place.joinpath("comm").read_text() == "sleep\n")
            assert place.joinpath("autogroup").read_text().endswith(" nice 0\n")
        finally:
            new.kill()


@needs_autogroups
def test_what_the_kernel_puts_off_is_no_success() -> None:
    """Without privileges it takes one a tenth of a second: each further one has to be tried again."""
    if (pid := os.fork()) == 0:
        try:
            os.setsid()
            os.setresuid(65534, 65534, 65534)
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1)  # else its own /proc is root's
            put_off = [precedence._set(0) for _ in range(2000)].count(False)
            os._exit(0 if put_off > 1000 else 1)
        finally:
            os._exit(2)
    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
