# SPDX-License-Identifier: LGPL-2.1-or-later
"""Show overviews in the text format of Prometheus, for the textfile collector.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from collections.abc import Iterator, Sequence

from upgrader.protocol.phase import Phase
from upgrader.tool.hold import HoldKind
from upgrader.tool.overview import GONE, Overview
from upgrader.tool.plain_text import CELL, plain

Sample = tuple[str, dict[str, str], float]

#: Every metric, and what it says.
HELP = {
    "upgrader_info": "What runs; always 1.",
    "upgrader_serving": "Whether systemd says that the unit serves.",
    "upgrader_generation": "Migrations of the running service, and one.",
    "upgrader_start_time_seconds": "When the running instance took over.",
    "upgrader_changed_on_disk": "Whether files of the program have changed since it was started.",
    "upgrader_held": "Whether the unit is on hold: by a failed upgrade, or by an admin.",
    "upgrader_upgrades_total": "Upgrades that the command or the hook was asked for, by how they ended.",
    "upgrader_last_upgrade_success": "Whether the last upgrade was done; one that was cancelled is none.",
    "upgrader_last_upgrade_time_seconds": "When it began.",
    "upgrader_last_upgrade_pause_seconds": "How long nobody served.",
    "upgrader_last_upgrade_left_behind": "Connections that it could not move.",
    "upgrader_last_preflight_success": "Whether it passed, of a preflight after the last upgrade.",
    "upgrader_last_preflight_time_seconds": "When it began.",
    "upgrader_connections": "Open connections of a backend.",
    "upgrader_draining_connections": "Connections that instances before still wait for.",
    "upgrader_stored_fds": "FDs of ours that systemd holds.",
}


def metrics(units: Sequence[Overview]) -> str:
    """All of them, one sample a line; every unit has the label `unit`."""
    found = [sample for each in units for sample in _samples(each)]
    lines = []
    for name, text in HELP.items():
        own = [sample for sample in found if sample[0] == name]
        if own:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{{{_labels(labels)}}} {value:.15g}" for _, labels, value in own]
    return "\n".join([*lines, ""])


def _samples(found: Overview) -> Iterator[Sample]:
    unit = {"unit": found.unit}
    instance, status = found.instance, found.status
    if found.active != GONE:
        yield "upgrader_serving", unit, found.serves
    for kind in (HoldKind.FAILED, HoldKind.ADMIN):
        held = found.hold is not None and found.hold.kind is kind
        yield "upgrader_held", unit | {"kind": kind}, held
    for result, count in (("done", found.upgrades.done), ("failed", found.upgrades.failed)):
        yield "upgrader_upgrades_total", unit | {"result": result}, count
    drained = sum(each.connections for each in found.draining)
    yield "upgrader_draining_connections", unit, drained
    if found.parked is not None:
        yield "upgrader_stored_fds", unit, len(found.parked)
    yield from _last_upgrade(found)
    if status:
        yield "upgrader_generation", unit, status.generation
    if instance is None:
        return
    what = {"service": instance.service, "version": instance.version, "library": instance.library}
    yield "upgrader_info", unit | what, 1
    yield "upgrader_start_time_seconds", unit, instance.since
    yield "upgrader_changed_on_disk", unit, bool(instance.changed)
    for backend in instance.backends:
        yield "upgrader_connections", unit | {"backend": backend.name}, backend.connections
    newest = instance.migration
    passed = newest.phase is Phase.PREFLIGHT
    if passed or (newest.preflight and newest.phase is Phase.FAILED):
        yield "upgrader_last_preflight_success", unit, passed
        yield "upgrader_last_preflight_time_seconds", unit, newest.began


def _last_upgrade(found: Overview) -> Iterator[Sample]:
    """Also of a unit that has failed: the tool knows its last upgrade as well."""
    last = found.last_upgrade
    if last.mode:
        mode = {"unit": found.unit, "mode": last.mode}
        yield "upgrader_last_upgrade_success", mode, last.phase is Phase.DONE
        yield "upgrader_last_upgrade_time_seconds", mode, last.began
        yield "upgrader_last_upgrade_pause_seconds", mode, last.pause
        yield "upgrader_last_upgrade_left_behind", mode, last.left_behind


def _labels(labels: dict[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(text: str) -> str:
    return plain(text, CELL).replace("\\", "\\\\").replace('"', '\\"')
