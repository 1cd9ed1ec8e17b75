# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is believed about an upgrade that has come to nothing: the source, if it has given up by itself; else the
new version, or takeover."""

import json
import socket
import threading

import pytest

from upgrader.codes import Code
from upgrader.takeover.__main__ import _as_the_source_says
from upgrader.takeover.running_instance import TakeoverError

OF_THE_CHANNEL = TakeoverError("stream: is empty", Code.LOAD_FAILED)


def told(last: object, error: BaseException, upgrade: str = "this") -> BaseException:
    """What is told of the error by one whose source describes its last upgrade like that."""
    here, there = socket.socketpair()

    def answer() -> None:
        if there.recv(4096):
            there.sendall(json.dumps({"parameters": {"last": last}}).encode() + b"\0")

    source = threading.Thread(target=answer)
    source.start()
    with here, there:
        here.settimeout(10)
        try:
            return _as_the_source_says(here, upgrade, error)
        finally:
            here.shutdown(socket.SHUT_RDWR)
            source.join()


def aborted(code: Code, upgrade: str = "this") -> dict[str, str]:
    return {"id": upgrade, "decision": "aborted", "code": code, "reason": "as the source says"}


@pytest.mark.parametrize("code", [Code.BUSY_WORK, Code.CANCELLED, Code.SOURCE_FAILED])
@pytest.mark.parametrize("error", [OF_THE_CHANNEL, TakeoverError("ended", Code.ENDED_EARLY)])
def test_a_source_that_has_given_up(code: Code, error: TakeoverError) -> None:
    """A channel that ends under it makes no bad version of the new one."""
    said = told(aborted(code), error)

    assert isinstance(said, TakeoverError)
    assert (code, "as the source says") == (said.code, str(said))


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (aborted(Code.LOAD_FAILED), OF_THE_CHANNEL),
        (aborted(Code.UNKNOWN), OF_THE_CHANNEL),
        (aborted(Code.BUSY_WORK, "another"), OF_THE_CHANNEL),
        ({"id": "this", "decision": "committed"}, OF_THE_CHANNEL),
        (None, OF_THE_CHANNEL),
        (aborted(Code.BUSY_WORK), TakeoverError("told to stop", Code.TAKEOVER_STOPPED)),
        (aborted(Code.BUSY_WORK), KeyboardInterrupt()),
    ],
)
def test_all_others(last: object, error: BaseException) -> None:
    assert error is told(last, error)
