# SPDX-License-Identifier: LGPL-2.1-or-later
"""The demonstration itself: it loses nothing with the real library, and says so when a service does lose something."""

import json
from collections.abc import Callable

import pytest

from tests.tables import publish
from upgrader.lab import demo
from upgrader.lab.demo import stage
from upgrader.lab.demo.faults import FAULTS
from upgrader.lab.demo.load_process import LoadProcess
from upgrader.lab.demo.orders import ReadyEvent, ResultEvent, Start, StopOrder
from upgrader.lab.demo.stage import SERVICE, Stage
from upgrader.lab.private_systemd import TreeError
from upgrader.tool.outcome import Mode

pytestmark = pytest.mark.system

#: What a reader of the JSON can rely on.
KEYS = {
    "mode", "systemd", "upgrades", "requests", "failed_requests", "keepalive_requests",
    "failed_keepalive", "streams", "broken_streams", "connections_held", "connections_lost",
    "state_errors", "stall_ms", "time_to_new_code_ms", "restart_ms", "plain_restart_ms", "fds",
    "generations", "baseline_stall_ms", "pause_ms", "source_gone_ms",
}  # fmt: skip
#: Times that are measured in both modes, and in one of them.
TIMES = {"stall_ms", "baseline_stall_ms", "pause_ms", "time_to_new_code_ms"}
TIMES_OF = {
    Mode.LIVE: {"source_gone_ms"},
    Mode.RESTART: {"restart_ms", "plain_restart_ms", "pid1_show_ms"},
    Mode.EXEC: set(),
}


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Replaces a piece of text in the example service, in both versions."""
    read = stage._read

    def spoil(good: str, bad: str) -> None:
        monkeypatch.setattr(stage, "_read", lambda file: read(file).replace(good, bad))

    return spoil


def small(**more: object) -> demo.Options:
    return demo.Options(**{"upgrades": 2, "streams": 2, "connections": 20, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "tree"),
    [
        (Mode.LIVE, "host"),
        (Mode.LIVE, "trixie"),
        (Mode.RESTART, "host"),
        (Mode.EXEC, "trixie"),
    ],
)
def test_nothing_is_lost(mode: Mode, tree: str) -> None:
    """Three upgrades, downgrade included, lose nothing, and the report has all that was promised."""
    said: list[str] = []
    report = demo.run(small(mode=mode, upgrades=3, systemd=tree, connections=100), said.append)
    found = json.loads(report.json())

    assert not report.lost, report.table()
    assert KEYS <= found.keys()
    assert (found["mode"], found["upgrades"], found["generations"]) == (mode, 3, 3)
    assert (found["streams"], found["connections_held"]) == (2, 100)
    assert min(found["requests"], found["keepalive_requests"], found["split_requests"]) > 0
    for key in TIMES | TIMES_OF[mode]:
        assert 0 < found[key]["median"] <= found[key]["max"], key
    others = set().union(*TIMES_OF.values()) - TIMES_OF[mode]
    assert {None} == {found[key]["max"] for key in others}
    assert found["fds"]["first"] == found["fds"]["last"] > 100
    assert report.fd_counts[0].store == 1
    assert [line for line in said if line.startswith("upgrade  3 of 3: version 1 -> 2")]
    assert "Nothing was lost." in report.table()


def test_an_unprivileged_service() -> None:
    """The same as an ordinary user loses nothing."""
    report = demo.run(small(systemd="trixie", user="daemon"), lambda line: None)

    assert not report.lost, report.table()


@pytest.mark.parametrize(
    ("good", "bad", "lost"),
    [
        ("            async for request in requests(peer):", "            if peer.adopted:\n                return\n            async for request in requests(peer):", "connections_lost"),
        ("self.sequence += 1", "self.sequence += 1 + (generation > 1)", "broken_streams"),
        ("peer.state.requests += 1", "peer.state.requests = 1 + peer.state.requests * (instance.generation < 2)", "state_errors"),
        ("def frame(buffer: bytearray) -> int | None:", "def frame(buffer: bytearray) -> int | None:\n    if buffer == b'':\n        return None\n    if b'\\r\\n\\r\\n' not in buffer:\n        del buffer[:]\n        return None", "failed_split"),
    ],
    ids=["closes", "skips", "forgets", "drops-a-half"],
)  # fmt: skip
def test_a_lossy_service_is_caught(
    spoiled: Callable[[str, str], None], good: str, bad: str, lost: str
) -> None:
    """A service that loses one kind of thing in an upgrade is reported as such, and it is a failure."""
    spoiled(good, bad)
    report = demo.run(small(upgrades=1), lambda line: None)

    assert report.lost
    assert getattr(report, lost) > 0, report.table()
    assert report.losses
    assert "SOMETHING WAS LOST." in report.table()


def test_a_failed_upgrade_is_a_failure(spoiled: Callable[[str, str], None]) -> None:
    """When a version does not start, the demonstration ends, names the cause, and has lost."""
    spoiled("streamed: int = upgrader.since(2, default=0)", "streamed: int = 1 // 0")
    report = demo.run(small(), lambda line: None)

    assert report.lost
    assert report.upgrades == 0
    assert "ZeroDivisionError" in report.failed_upgrades[0]


#: Versions that never become ready, as a change of the good one, and what the upgrade names.
BAD = {
    "exits": ("BIND = ", "raise SystemExit('no licence')\nBIND = ", "no licence"),
    "hangs": ("BIND = ", "import time\ntime.sleep(3600)\nBIND = ", "TimeoutStartSec=1s"),
    "unreadable": ("    requests: int = 0", "    requests: list[str] = upgrader.since(1, default_factory=list)", "counters"),
}  # fmt: skip


def test_bad_versions_under_load() -> None:
    """Versions that exit, hang or cannot read the state: with the good one back, all clients go on.

    They wait as long as nobody serves, and no request, connection, stream or count is lost.
    """
    with (
        Stage.set_up(small(systemd="trixie")) as scene,
        LoadProcess(scene.machine) as load,
    ):
        scene.machine.write(
            f"/etc/systemd/system/{SERVICE}.d/test.conf", "[Service]\nTimeoutStartSec=1s\n"
        )
        scene.machine.run(["systemctl", "daemon-reload"])
        order = Start(host=stage.HOST, port=stage.PORT, rate=50, held=50, timeout=120)
        load.ask(order, ReadyEvent)
        good = scene.machine.run(["cat", "/usr/share/web/web1.py"]).stdout
        for number, (bad, (old, new, cause)) in enumerate(BAD.items()):
            scene.add_version(bad, good.replace(old, new, 1))
            scene.install(bad)
            answer = scene.upgrade("restart")
            assert answer.exit_code == 3, (bad, answer)
            assert cause in answer.line, bad
            scene.install(stage.VERSIONS[number % 2])
            scene.machine.run(["systemctl", "reset-failed", SERVICE])
            scene.machine.run(["systemctl", "restart", SERVICE])
        result = load.ask(StopOrder(), ResultEvent)

    assert result.losses == []
    assert result.requests > 0
    assert (result.failed_requests, result.failed_keepalive, result.broken_streams) == (0, 0, 0)
    assert (result.connections_lost, result.state_errors) == (0, 0)


#: What the caller is told.
REASONS = {
    "version missing": "No module named web",
    "version exits at once": "this version has no licence",
    "version hangs": "was not ready in time",
    "version cannot read the state": "state 'counters'",
    "version claims too little": "listener 'http' is not declared by the new version",
    "version refuses in its check": "does not like what it got",
    "version runs out of FDs": "raise LimitNOFILE= of this service",
    "old process killed, setup": "was killed by SIGKILL meanwhile",
    "old process killed, loading": "was killed by SIGKILL meanwhile",
    "systemctl stop, setup": "the unit was stopped meanwhile",
}
#: Those that say most where there is no time for all.
FEW = {"new process killed, committed", "old process killed, loading", "version crashes in its first second"}  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "names"),
    [("trixie", {fault.name for fault in FAULTS}), ("host", FEW)],
    ids=["all", "few"],
)
def test_faults(tree: str, names: set[str]) -> None:
    """Of all that goes wrong, only what must loses something; the caller learns why, and the next
    good version goes in."""
    chosen = [fault for fault in FAULTS if fault.name in names]
    rows = {row.fault: row for row in demo.run_faults(small(systemd=tree), print, chosen)}

    assert names == rows.keys()
    assert not [row for row in rows.values() if row.bad], demo.table(list(rows.values()))
    for name in names & REASONS.keys():
        assert REASONS[name] in rows[name].caller_told
    crashed = rows["version crashes in its first second"]
    assert "loaded by insurance" in crashed.then
    assert (2, True) == (crashed.broken_streams, bool(crashed.must_lose))
    found = json.loads(demo.to_json(list(rows.values())))
    assert {"fault", "failed_requests", "state_errors", "stall_ms", "caller_told"} <= found[
        0
    ].keys()


@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tree", ["host", "trixie", "sid"])
def test_each_fault_on_each_systemd(tree: str) -> None:
    """As above, all of them."""
    try:
        rows = demo.run_faults(small(systemd=tree), print, FAULTS)
    except TreeError as error:
        pytest.skip(str(error))  # sid is a moving target: its archive may be broken on any day
    publish(
        f"faults {tree}",
        (
            "fault",
            "requests",
            "streams",
            "idle",
            "state",
            "longest wait",
            "why something had to be lost",
        ),
        [
            (
                *(row.fault, str(row.failed_requests), str(row.broken_streams)),
                *(str(row.connections_lost), str(row.state_errors), f"{row.stall_ms:.0f} ms"),
                row.must_lose,
            )
            for row in rows
        ],
    )

    assert not [row for row in rows if row.bad], demo.table(rows)


def test_a_command_inside(capfd: pytest.CaptureFixture[str]) -> None:
    """--run runs a command beside the service, with `upgrader` on the PATH, and gives its exit code."""
    command = "web-install 2 && upgrader upgrade web.service >/dev/null && systemctl show -P StatusText web; exit 7"
    code = demo.run_inside(small(), command, lambda line: None)

    assert code == 7
    assert "generation 2, loaded by live" in capfd.readouterr().out


@pytest.mark.parametrize(
    "wrong", [{"upgrades": 0}, {"streams": -1}, {"connections": 10**7}, {"mode": "magic"}], ids=str
)
def test_wrong_options_are_named(wrong: dict[str, object]) -> None:
    """An option that cannot be is refused before anything is booted, by the name it has on the command line."""
    (option,) = wrong
    with pytest.raises(demo.OptionError, match=f"--{option}"):
        small(**wrong)


def test_an_unknown_user_is_named() -> None:
    """A user who is not there is an error that names him, not an upgrade that failed."""
    with pytest.raises(demo.DemoError, match="nobody-here"):
        demo.run(small(user="nobody-here"), lambda line: None)
