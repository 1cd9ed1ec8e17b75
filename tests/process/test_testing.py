# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the testing kit plays for authors: live upgrades, restarts, crashes, downgrades, stops."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.keys import Kv
from tests.support import eventually
from upgrader.codes import Code
from upgrader.protocol.status_text import Origin
from upgrader.testing import ServiceError


@pytest.fixture
def kv(tmp_path: Path) -> Iterator[Kv]:
    kv = Kv(tmp_path)
    with kv.service:
        yield kv


def test_p12_live_upgrades_and_downgrades_without_root(kv: Kv) -> None:
    """Another process each time; connections that the test holds, state and renamed fields move."""
    kv.start(1)
    with kv.connect() as client:
        assert "OK" == client.ask("set a 1")
        for number, version in enumerate((2, 1, 1, 2), 2):
            before = kv.pid
            status = kv.service.live(kv.command(version))

            assert (number, Origin.LIVE, 0) == (
                status.generation, status.origin, status.left_behind,
            )  # fmt: skip
            assert before != kv.pid
            assert str(number) == client.ask("count")
        assert "1" == client.ask("get a")
    assert eventually(lambda: not kv.service.draining)


def test_p12_restarts_and_live_upgrades_take_turns(kv: Kv) -> None:
    """What one has left, the other loads; a crash brings back what was kept for it."""
    kv.start(2)
    with kv.connect() as client:
        assert "OK" == client.ask("set a 1")
        assert Origin.LIVE is kv.service.live(kv.command(1)).origin
        assert Origin.RESTART is kv.upgrade(2).origin
        assert "1" == client.ask("get a")
        assert Origin.LIVE is kv.service.live(kv.command(2)).origin
        kv.service.kill()
        assert client.gone()
    # In its first seconds, what the instance before has insured is what a crash leaves.
    assert Origin.INSURANCE is kv.start(2).origin
    with kv.connect() as client:
        assert "1" == client.ask("get a")


def test_p12_a_version_that_refuses_leaves_the_source_serving(kv: Kv) -> None:
    """The same process, and the reason is the version's own."""
    kv.start(2)
    with kv.connect() as client:
        assert "OK" == client.ask("set a 1")
        before = kv.pid
        with pytest.raises(ServiceError, match="not with me"):
            kv.service.live(kv.command(2, refuses=True))

        assert before == kv.pid
        assert "1" == client.ask("get a")
        assert Origin.LIVE is kv.service.live(kv.command(1)).origin
        assert "1" == client.ask("get a")


def test_p12_both_versions_run_until_it_is_called_off(kv: Kv, tmp_path: Path) -> None:
    """The new one starts and waits; the old one serves then, and after the abort."""
    mark, go = tmp_path / "mark", tmp_path / "go"
    kv.start(2)
    with kv.connect() as client:
        assert "OK" == client.ask("set a 1")
        for _ in range(2):
            before = kv.pid
            upgrade = kv.service.begin_live(kv.command(2, waits=[str(mark), str(go)]))
            assert eventually(mark.exists)
            assert "1" == client.ask("get a")
            upgrade.abort()

            assert before == kv.pid
            assert "1" == client.ask("get a")
            mark.unlink()
        upgrade = kv.service.begin_live(kv.command(2, waits=[str(mark), str(go)]))
        assert eventually(mark.exists)
        go.touch()
        assert Origin.LIVE is upgrade.wait().origin
        with pytest.raises(ServiceError, match="could not be called off any more"):
            upgrade.abort()
        assert "1" == client.ask("get a")


def test_p12_a_stop_for_good_leaves_nothing(kv: Kv) -> None:
    """Connections end, and the FD store is empty."""
    kv.start(1)
    with kv.connect() as client:
        assert "OK" == client.ask("set a 1")
        kv.service.stop(for_good=True)

        assert client.gone()
    assert [] == kv.service.store
    assert Origin.COLD is kv.start(1).origin


def test_p12_a_process_that_ends_by_itself_is_seen(kv: Kv) -> None:
    """Its status, even if takeover has started it."""
    kv.start(1)
    kv.service.live(kv.command(2))
    assert kv.service.process is not None
    kv.service.process.send_signal(signal.SIGKILL)

    assert -signal.SIGKILL == kv.service.process.wait(kv.service.timeout)
    assert -signal.SIGKILL == kv.service.process.poll()


@pytest.mark.parametrize("how", ["slow", "turn"])
def test_p1_what_was_acknowledged_is_there_after_a_live_upgrade(how: str, kv: Kv) -> None:
    """A handler that is busy for longer than the downtime limit, in a turn or not."""
    kv.start(2)
    with kv.connect() as client, kv.connect() as other:
        client.send(f"{how} a 1\n")
        assert "OK" == other.ask("set b 2")
        kv.service.live(kv.command(2))

        assert "OK" == client.line()
        assert ("1", "2") == (client.ask("get a"), other.ask("get b"))


def test_s3_the_pause_counts_from_when_new_work_is_held(kv: Kv) -> None:
    """Not only from when all that was waited for meanwhile had ended."""
    kv.service.environment.update(UPGRADER_DRAIN_TIMEOUT="0", UPGRADER_DOWNTIME_LIMIT="10s")
    kv.start(2)
    with kv.connect() as client, kv.connect() as other:
        assert "OK" == other.ask("set b 2")
        client.send("slow a 1\n")
        assert "2" == other.ask("get b")
        status = kv.upgrade(2)

        assert (status.pause or 0) > 0.5
        assert "OK" == client.line()


@pytest.mark.parametrize("mode", ["restart", "live"])
def test_p2_nothing_is_published_before_all_subscribers_are_back(mode: str, kv: Kv) -> None:
    """The publisher was there first, and has whole lines on their way."""
    kv.start(2)
    with kv.connect() as publisher, kv.connect() as first, kv.connect() as second:
        assert "0" == publisher.ask("publish 0")
        for client in (first, second):
            assert "OK" == client.ask("subscribe")
        texts = [str(number) for number in range(1, 200)]
        lines = "".join(f"publish {text}\n" for text in texts)
        if mode == "live":
            publisher.send(lines)
            kv.service.live(kv.command(2))
        else:
            kv.service.stop()
            publisher.send(lines)
            kv.start(2)

        assert ["2"] * len(texts) == [publisher.line() for _ in texts]
        for client in (first, second):
            assert texts == [client.line() for _ in texts]


def test_p5_a_state_that_cannot_be_saved_refuses_a_live_upgrade(kv: Kv, tmp_path: Path) -> None:
    """With the source's own reason and code; the version is not started, not blamed, and goes in
    afterwards."""
    mark, go = tmp_path / "mark", tmp_path / "go"
    kv.start(2)
    with kv.connect() as client:
        assert "OK" == client.ask("task a")
        before = kv.pid
        with pytest.raises(
            ServiceError, match=r"kv.* cannot be saved: values\['a'\]\.more"
        ) as caught:
            kv.service.live(kv.command(1, waits=[str(mark), str(go)]))

        assert not mark.exists()
        assert Code.SOURCE_FAILED is caught.value.code
        assert not caught.value.code.blames_version
        assert "Traceback" not in str(caught.value)
        assert before == kv.pid
        assert "OK" == client.ask("drop a")
        assert Origin.LIVE is kv.service.live(kv.command(1)).origin
        assert "3" == client.ask("count")
