# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run one server under the load: upgrade it ten times, give it bad versions, and tell what clients saw."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from tests.bench.peers.load import Answer, Seen
from tests.bench.peers.servers import SERVED, SERVERS, TABLEFLIP, Server
from upgrader.lab.demo.options import DemoError
from upgrader.lab.demo.succession import connect, members
from upgrader.lab.demo.waits import LONG, Delays, Switchover, Wait, attribute
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.varlink import INTERFACE
from upgrader.protocol.varlink_client import call

UPGRADES = 10
PORT = 8090
DIR = "/srv/bench"
UNIT = "/etc/systemd/system/bench.service"
#: Seconds: from one upgrade to the next, and after a bad version was asked for.
APART, BAD = 1.5, 7.0
_CENSUS = """\
group=$(systemctl show -P ControlGroup bench.service)
cat $(find /sys/fs/cgroup$group /sys/fs/cgroup/*$group -name cgroup.procs 2>/dev/null) | sort -u | while read pid; do
    echo "$(ls /proc/$pid/fd | wc -l) $(sed -n 's/^Pss: *\\([0-9]*\\) kB/\\1/p' /proc/$pid/smaps_rollup)"
done
"""


class Census(msgspec.Struct, frozen=True):
    """All processes of a unit: FDs, and memory in MB, shared pages by their share."""

    processes: int
    fds: int
    memory: float


class Outage(msgspec.Struct, frozen=True):
    """After a bad version was asked for: requests that failed, and the longest time in seconds in which
    nobody was answered."""

    failed: int
    silence: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One server in one round. Times are in seconds; `idle` is the longest wait with no upgrade, in as
    long a time; `new_code` and `stalls` are one an upgrade; `waits`: those of more than 10 ms while it was
    upgraded, by what most of each was (see `WaitCause`); the pause of others than ours is not known."""

    server: str
    requests: int
    failed_new: int
    failed_kept: int
    closed: int
    broken: int
    took_over: int
    stalls: list[float]
    idle: list[float]
    new_code: list[float]
    waits: dict[str, int]
    start: float
    outages: dict[str, Outage]
    before: Census
    after: Census


def measure(machine: PrivateSystemd, name: str) -> Result:
    """Raises CommandError if the server cannot be started."""
    server = SERVERS[name]
    with _started(machine, server) as start, _load(machine) as load:
        time.sleep(2)
        idle = [time.monotonic()]
        for _ in range(UPGRADES // 2):
            time.sleep(APART)
            idle.append(time.monotonic())
        before = _census(machine)
        asked, owned = [], []
        with Delays(members(machine, "bench.service")) as delays:
            for number in range(UPGRADES):
                _install(machine, server, f"v{number + 2}")
                asked.append(time.monotonic())
                _upgrade(machine, server)
                time.sleep(max(asked[-1] + APART - time.monotonic(), 0))
                owned.append(_owned(machine) if server.ours else None)
        asked.append(time.monotonic())
        after = _census(machine)
        bad = {}
        for version in server.bad:
            _install(machine, server, version)
            bad[version] = time.monotonic()
            _upgrade(machine, server)
            time.sleep(max(bad[version] + BAD - time.monotonic(), 0))
            _install(machine, server, "good")
            machine.run(["systemctl", "restart", "bench.service"], check=False)
            time.sleep(1)
        seen = load()
    first = [_first(seen.answers, f"v{n + 2}", at) for n, at in enumerate(asked[:-1])]
    during = [a for a in seen.answers if asked[0] <= a.due < asked[-1]]
    return Result(
        server=name,
        requests=len(during),
        failed_new=sum(1 for a in during if a.failed and not a.kept),
        failed_kept=sum(1 for a in during if a.failed and a.kept),
        closed=sum(1 for at in seen.closed if asked[0] <= at < asked[-1]),
        broken=sum(1 for at in seen.broken if asked[0] <= at < asked[-1]),
        took_over=sum(
            1 for at, taken in zip(asked[1:], first, strict=True) if taken and taken < at
        ),
        stalls=[_longest(seen.answers, *pair) for pair in itertools.pairwise(asked)],
        idle=[_longest(seen.answers, *pair) for pair in itertools.pairwise(idle)],
        new_code=[taken - at for at, taken in zip(asked, first, strict=False) if taken],
        waits=_causes(during, asked, [*_switchovers(owned, first)], delays),
        start=start,
        outages={version: _outage(seen.answers, at) for version, at in bad.items()},
        before=before,
        after=after,
    )


def _owned(machine: PrivateSystemd) -> tuple[float, float] | None:
    """From when to when nobody served, as the running instance says; None if none answers."""
    with contextlib.suppress(OSError, DemoError), connect(machine, "bench.service") as sock:
        said = call(sock, f"{INTERFACE}.Describe", {})
        owned = said["since"] - time.time() + time.monotonic()
        return owned - said["migration"]["pause"], owned
    return None


def _switchovers(
    owned: list[tuple[float, float] | None], first: list[float | None]
) -> Iterator[Switchover | None]:
    for times, answered in zip(owned, first, strict=True):
        yield Switchover(*times, answered) if times and answered else None


def _causes(
    answers: list[Answer], asked: list[float], found: list[Switchover | None], delays: Delays
) -> dict[str, int]:
    """Count the long waits by what most of each was."""
    counted: Counter[str] = Counter()
    for (begin, end), switchover in zip(itertools.pairwise(asked), found, strict=True):
        for each in answers:
            wait = Wait(each.due, each.due + each.took)
            if begin <= each.due < end and wait.seconds > LONG:
                counted[attribute(wait, switchover, delays.during(wait))] += 1
    return dict(counted)


def _first(answers: list[Answer], version: str, asked: float) -> float | None:
    """When a version answered first, if it did within five seconds."""
    seen = [a.due + a.took for a in answers if a.version == version]
    return min(seen) if seen and min(seen) < asked + 5 else None


def _longest(answers: list[Answer], begin: float, end: float) -> float:
    """The longest wait of a request that was due in that time."""
    return max((a.took for a in answers if begin <= a.due < end), default=0.0)


def _outage(answers: list[Answer], asked: float) -> Outage:
    until = asked + BAD
    answered = sorted(a.due + a.took for a in answers if not a.failed)
    times = [asked, *(at for at in answered if asked < at < until), until]
    failed = sum(1 for a in answers if a.failed and asked <= a.due < until)
    return Outage(failed, max(later - earlier for earlier, later in itertools.pairwise(times)))


@contextlib.contextmanager
def _started(machine: PrivateSystemd, server: Server) -> Iterator[float]:
    """The server, with the first version; yields the seconds of its start."""
    places = _places(machine)
    if "go" in server.needs:
        machine.copy_in(_tableflip(), f"{DIR}/tableflip")
    _install(machine, server, "v1")
    lines = [
        "[Unit]", "StartLimitIntervalSec=0", "[Service]", f"Environment=PORT={PORT}",
        "Environment=PYTHONDONTWRITEBYTECODE=1", "TimeoutStartSec=5", "TimeoutStopSec=5",
        *(line.format(**places) for line in server.unit),
    ]  # fmt: skip
    machine.write(UNIT, "\n".join(lines) + "\n")
    machine.write("/srv/streams.py", SERVED["served.py"])
    python = " ".join(machine.python)
    streams = f"[Service]\nEnvironment=PORT=9099\nType=notify\nExecStart={python} /srv/streams.py\n"
    machine.write("/etc/systemd/system/bench-streams.service", streams)
    unit = "bench.service"
    if server.socket:
        machine.write(
            "/etc/systemd/system/bench.socket", f"[Socket]\nListenStream=127.0.0.1:{PORT}\n"
        )
        machine.run(["systemctl", "daemon-reload"])
        machine.run(["systemctl", "start", "bench.socket"])
    machine.run(["systemctl", "daemon-reload"])
    machine.run(["systemctl", "start", "bench-streams.service"])
    began = time.monotonic()
    machine.run(["systemctl", "start", unit])
    try:
        yield time.monotonic() - began
    finally:
        machine.run(
            ["systemctl", "stop", "bench.socket", unit, "bench-streams.service"], check=False
        )
        machine.run(["sh", "-c", f"rm -rf {UNIT} /etc/systemd/system/bench.socket {DIR}"])
        machine.run(["systemctl", "daemon-reload"])
        machine.run(["systemctl", "reset-failed"], check=False)


def _places(machine: PrivateSystemd) -> dict[str, str]:
    python = " ".join(machine.python)
    binaries = os.path.dirname(machine.python[0])
    return {"python": python, "bin": binaries, "dir": DIR, "port": str(PORT)}


def _install(machine: PrivateSystemd, server: Server, version: str) -> None:
    """Have the next start be of that version."""
    if version == "broken":
        version = server.broken
    for name, text in server.files.items():
        mode = 0o755 if name == "reload" else 0o644
        machine.write(f"{DIR}/{name}", text.replace("@VERSION@", version), mode=mode)


def _upgrade(machine: PrivateSystemd, server: Server) -> None:
    """Whatever it says; clients say the rest."""
    machine.run(server.upgrade, check=False, timeout=30)


@contextlib.contextmanager
def _load(machine: PrivateSystemd) -> Iterator[Callable[[], Seen]]:
    """The load client; what is yielded ends it, and returns what it has seen."""
    process = machine.popen(
        [sys.executable, "-m", "tests.bench.peers.load", str(PORT)],
        network_only=True,
        env={"PYTHONPATH": os.pathsep.join([os.getcwd(), *(path for path in sys.path if path)])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            yield lambda: msgspec.json.decode(process.communicate("")[0], type=Seen)
        finally:
            process.kill()


def _tableflip() -> Path:
    """The Go program, built once."""
    place = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "upgrader/bench"
    place.mkdir(parents=True, exist_ok=True)
    (place / "main.go").write_text(TABLEFLIP)
    environment = {**os.environ, "GO111MODULE": "off", "GOPATH": "/usr/share/gocode"}
    command = ["go", "build", "-o", "tableflip", "main.go"]
    subprocess.run(command, cwd=place, env=environment, check=True)
    return place / "tableflip"


def _census(machine: PrivateSystemd) -> Census:
    rows = [line.split() for line in machine.run(["sh", "-c", _CENSUS]).stdout.splitlines()]
    whole = [row for row in rows if len(row) == 2]
    memory = sum(int(row[1]) for row in whole) / 1024
    return Census(len(whole), sum(int(row[0]) for row in whole), round(memory, 1))
