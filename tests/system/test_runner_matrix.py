# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unmodified programs behind a runner, under load: upgrades, restarts, a crash; in a table."""

import contextlib
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support import eventually
from tests.system.program_clients import Load, load, version
from tests.system.program_texts import KINDS, STREAM
from tests.system.programs import program, stored, write_version
from tests.system.serving import Install, Service
from tests.system.tool import upgrade
from tests.tables import publish
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.programs import known

pytestmark = pytest.mark.matrix
UPGRADES, RESTARTS, STREAMS = 10, 5, 4
_WITHOUT = 5.0  # seconds of the same load without an upgrade
#: Those that, told to end, close what they have accepted if the request has not come yet.
CLOSING = ("puma", "uvicorn", "uvicorn-unix")
#: Reloads that programs of the distribution have, and that the table of programs cannot promise: uvicorn
#: without `--workers` ends by it.
RELOADS = {
    **dict.fromkeys(("uvicorn", "uvicorn-unix", "uvicorn-waiting", "uvicorn-waiting-unix"), signal.SIGHUP),
    **dict.fromkeys(("puma-unqueued", "puma-waiting"), signal.SIGUSR2),
}  # fmt: skip
#: What they are called in the table.
NAMES = {
    "uvicorn-unix": "uvicorn",
    "puma-unqueued": "puma, `queue_requests false`",
    "puma-waiting": "puma, which waits for requests",
    "uvicorn-waiting": "uvicorn, which waits for requests",
    "uvicorn-waiting-unix": "uvicorn, which waits for requests",
}
_HEAD = (
    "program", "listeners", "answers", "failed", "kept connections closed (longest wait for that)",
    "streams cut", "longest wait for an answer, ms: without upgrades", "with",
    "in 10 reloads of its own: failed", "kept connections closed", "longest wait for an answer, ms",
)  # fmt: skip


@pytest.fixture(scope="module")
def table() -> Iterator[list[list[str]]]:
    """Rows for what is done with each program; published if there is one of each."""
    rows: list[list[str]] = []
    yield rows
    if len(rows) == len(KINDS):
        publish("programs", _HEAD, sorted(rows))


def answers(service: Service, kind: str) -> bool:
    """Whether it answers at all its listeners."""
    with contextlib.suppress(OSError, ValueError):
        return all(version(service, each) > 0 for each in KINDS[kind].listeners)
    return False


def loaded(
    service: Service, kind: str, streams: int = 0
) -> contextlib.AbstractContextManager[Load]:
    """New connections at all listeners, and a kept one."""
    what = KINDS[kind]
    return load(service, streams=streams, listeners=what.listeners, keeps=what.keeps)


def own_reloads(service: Service, kind: str) -> list[str]:
    """What clients see while the program reloads itself as often as it was upgraded."""
    reload = known(kind).reload or RELOADS.get(kind)
    if reload is None:
        return ["", "", ""]
    with loaded(service, kind) as seen:
        for _ in range(UPGRADES):
            service.signal(reload.name.removeprefix("SIG"))
            time.sleep(1)  # nothing tells the end of all of them
    return [str(len(seen.failures)), *figures(seen)]


def figures(seen: Load) -> list[str]:
    return [_closed(seen), f"{seen.longest * 1000:.0f}"]


def _closed(seen: Load) -> str:
    return f"{seen.closed} ({seen.until_closed * 1000:.0f} ms)" if seen.closed else "0"


def is_closing(kind: str, failure: str) -> bool:
    """Whether a connection ended without an answer, as a program's own way of draining is."""
    ways = ("RemoteDisconnected", "ConnectionReset", "BrokenPipe")
    return kind in CLOSING and any(way in failure for way in ways)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_program_under_load(
    host_machine: PrivateSystemd, install: Install, kind: str, table: list[list[str]]
) -> None:
    """Live upgrades, restarts and a crash of the runner: nobody is refused, no stream is cut, and the old
    program is gone when its last stream has ended. Beside it: the same load without, and the program's
    own reloads."""
    service = program(host_machine, install, kind)
    service.start()
    assert eventually(lambda: answers(service, kind)), service.messages()
    with loaded(service, kind) as without:
        time.sleep(_WITHOUT)  # how long to look
    with loaded(service, kind, streams=STREAMS) as seen:
        for number in range(2, 2 + UPGRADES):
            write_version(service, kind, number)
            said = upgrade(service, "--mode", "live")
            assert 0 == said["exit_code"], (said, service.messages())
            for each in KINDS[kind].listeners:
                assert eventually(lambda n=number, each=each: version(service, each) == n)  # type: ignore[misc]
            if number == 3:  # of three that drain, the oldest is ended
                assert eventually(lambda: len(seen.streams) == STREAMS)
                assert eventually(lambda: service.stored == stored(kind))
        generation = service.status.generation
        for _ in range(RESTARTS):
            service.restart()
        service.signal("KILL")
        service.until(ActiveState="active", SubState="running", NRestarts="1")
        assert eventually(lambda: answers(service, kind))
    own = own_reloads(service, kind)
    cut = len([each for each in seen.streams if each != STREAM]) + STREAMS - len(seen.streams)
    waited = figures(without)[1], figures(seen)[1]
    table.append(
        [
            NAMES.get(kind, kind), ", ".join(KINDS[kind].listeners), str(seen.answers), str(len(seen.failures)),
            _closed(seen) if KINDS[kind].keeps else "", f"{cut} of {STREAMS}", *waited, *own,
        ]
    )  # fmt: skip
    assert UPGRADES + 1 == generation
    assert 0 == cut
    assert [] == [each for each in seen.failures if not is_closing(kind, each)]
    assert len(seen.failures) <= UPGRADES + RESTARTS + 1, seen.failures
    assert seen.longest < without.longest + 1, seen.longest
    assert eventually(lambda: service.stored == stored(kind))
