# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a program below a runner is started with, compared name by name with a start by PID 1."""

import json
from typing import Any

from tests.support import eventually
from tests.system.programs import masters, runner_unit
from tests.system.serving import Install, Service
from tests.system.tool import upgrade
from upgrader.lab.private_systemd import PrivateSystemd

SETTINGS = [
    "Environment=OF_THE_UNIT=x LANG=C", "PassEnvironment=PATH", "LimitNOFILE=700:5000",
    "LimitFSIZE=1000000000", "LimitCORE=0", "OOMScoreAdjust=100", "IgnoreSIGPIPE=no", "UMask=0027",
    "WorkingDirectory=/srv", "WatchdogSec=1h", "TimerSlackNSec=70us", "StandardInput=null",
]  # fmt: skip
#: What is another one in each start, or says which listeners a program has.
DIFFERS = {
    "variable INVOCATION_ID", "variable NOTIFY_SOCKET", "variable JOURNAL_STREAM",
    "variable UPGRADER_DRAIN_TIMEOUT", "variable UPGRADER_LIVE_DRAIN_TIMEOUT",  # of the runner alone
    "variable LISTEN_FDS", "variable LISTEN_FDNAMES", "variable LISTEN_PID", "variable LISTEN_PIDFDID",
    "stdio",
    "oom_score_adj",  # of one that is started beside another one: as usual from the commit on
}  # fmt: skip


def test_a_program_inherits_what_pid_1_would_give_it(
    host_machine: PrivateSystemd, install: Install
) -> None:
    """Variables, limits, signals, oom_score_adj, session and all else: by a start, in
    mode exec and in a live upgrade."""
    # Python ignores two signals itself, so a shell looks before; by itself, as it blocks some in a fork.
    program, python = "/opt/inherits", " ".join(host_machine.python)
    text = f"""\
#!/bin/sh
while read -r line; do
    case $line in Sig[BIC]*) echo "$line";; esac
done < /proc/$$/status > $1.signals
exec {python} /opt/upgrader-tests/facts.py $1
"""
    host_machine.write(program, text, mode=0o755)
    service: Service = install(
        host_machine, "inherits", "facts", *SETTINGS, "RuntimeDirectory=inherits", "ExecStart=",
        f"ExecStart={program} /srv/plain",
    )  # fmt: skip
    service.stop()
    for name in ("started", "exec", "live"):
        service.configure(*runner_unit(service, program=f"{program} /srv/{name}", more=SETTINGS))
        if name == "started":
            service.start()
        else:
            assert 0 == upgrade(service, "--mode", name)["exit_code"], service.messages()
    assert eventually(lambda: 1 == len(masters(service)))
    (pid,) = masters(service)
    assert eventually(
        lambda: "100" == service.inside(f"/proc/{pid}/oom_score_adj").read_text().strip()
    )
    expected = found(service, "plain")
    assert len(expected) > 40
    for name in ("started", "exec", "live"):
        given = found(service, name)
        differs = {
            key: (expected.get(key), given.get(key))
            for key in expected.keys() | given.keys()
            if expected.get(key) != given.get(key)
        }
        assert {} == {key: both for key, both in differs.items() if key not in DIFFERS}, name


def found(service: Service, name: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(service.inside(f"/srv/{name}").read_text())
    return told | {"signals": service.inside(f"/srv/{name}.signals").read_text()}
