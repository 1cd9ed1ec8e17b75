# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metrics for a fleet: counters of upgrades, a file that is replaced as a whole, and the alerts on them."""

import json
import re

import yaml

from tests.support import eventually
from tests.system.packages import ROOT
from tests.system.reloading import installed
from tests.system.serving import Install
from tests.system.tool import upgrade, upgrader
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.tool.prometheus import HELP


def test_n8_upgrades_and_failures_are_counted(
    any_machine: PrivateSystemd, install: Install
) -> None:
    """By the command; what was cancelled, refused or only looked at is neither."""
    service = installed(any_machine, install, "counted")
    count = f"/var/lib/upgrader/count/{service.unit}"
    any_machine.run(["rm", "-f", count])
    for mode, code in (("good", 0), ("refusing", 1), ("good", 0)):
        service.environment(MODE=mode)
        assert code == upgrader(any_machine, "upgrade", service.unit).returncode
    for nothing in (["check", service.unit], ["upgrade", "--dry-run", service.unit]):
        upgrader(any_machine, *nothing)
    place = "/run/metrics"
    any_machine.run(["mkdir", "-p", place])
    any_machine.write(f"{place}/upgrader.prom", "old\n")
    before = service.inside(f"{place}/upgrader.prom").stat().st_ino
    written = upgrader(any_machine, "status", "--prometheus", "--output", f"{place}/upgrader.prom")
    file = service.inside(f"{place}/upgrader.prom")

    assert (0, "", True) == (written.returncode, written.stdout, file.stat().st_ino != before)
    text = file.read_text()
    assert "# TYPE upgrader_upgrades_total counter" in text
    assert f'upgrader_upgrades_total{{unit="{service.unit}",result="done"}} 2\n' in text
    assert f'upgrader_upgrades_total{{unit="{service.unit}",result="failed"}} 1\n' in text
    assert f'upgrader_held{{unit="{service.unit}",kind="failed"}} 0\n' in text
    assert ["upgrader.prom"] == any_machine.run(["ls", place]).stdout.split()
    nowhere = upgrader(any_machine, "status", "--prometheus", "--output", "/nowhere/x")
    assert (1, True) == (nowhere.returncode, "cannot write /nowhere/x" in nowhere.stderr)
    any_machine.run(["rm", "-rf", count, place])


def test_n6_a_failed_unit_is_still_measured(
    trixie_machine: PrivateSystemd, install: Install
) -> None:
    """It does not serve, and its last upgrade has failed; killed or not, it stays in the list. One
    pause is told by the command, the metrics and the history."""
    service = installed(trixie_machine, install, "lamented", "Restart=no")
    service.environment(ROUND="2")
    done = upgrade(service, "--mode", "restart")
    text = upgrader(trixie_machine, "status", service.unit, "--prometheus").stdout
    past = json.loads(upgrader(trixie_machine, "history", service.unit, "--json").stdout)
    pause = f'upgrader_last_upgrade_pause_seconds{{unit="{service.unit}",mode="restart"}} '
    assert f"{pause}{done['pause_seconds']:.15g}\n" in text
    assert done["pause_seconds"] == past[-1]["pause"] > 0

    service.environment(MODE="exit")
    assert 3 == upgrade(service, "--mode", "restart")["exit_code"]

    text = upgrader(trixie_machine, "status", service.unit, "--prometheus").stdout
    assert f'upgrader_serving{{unit="{service.unit}"}} 0\n' in text
    assert f'upgrader_last_upgrade_success{{unit="{service.unit}",mode="restart"}} 0\n' in text
    service.environment()
    assert 0 == upgrade(service)["exit_code"]
    trixie_machine.run(["systemctl", "kill", "--kill-whom=main", "-s", "KILL", service.unit])
    assert eventually(lambda: service.show("ActiveState") == ["failed"])
    listed = upgrader(trixie_machine, "list").stdout.splitlines()
    assert any(line.split()[:2] == [service.unit, "failed"] for line in listed), listed


def test_the_alerts_are_on_metrics_that_there_are() -> None:
    """Each rule has what Prometheus wants of one, and names no other metric of ours."""
    text = (ROOT / "packaging/prometheus/upgrader.rules.yml").read_text()
    (group,) = yaml.safe_load(text)["groups"]
    for rule in group["rules"]:
        assert {"alert", "expr", "labels", "annotations"} <= set(rule)
        assert set(re.findall(r"\bupgrader_\w+", rule["expr"])) <= set(HELP), rule
    assert len(group["rules"]) == len({rule["alert"] for rule in group["rules"]})
