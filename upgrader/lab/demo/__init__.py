# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upgrade a real service under load, under a real systemd, and count what its clients notice."""

from upgrader.lab.demo.fault_report import FaultRow, table, to_json
from upgrader.lab.demo.inside import run_inside, shell
from upgrader.lab.demo.machine import MachineReport, run_machine
from upgrader.lab.demo.options import DemoError, OptionError, Options
from upgrader.lab.demo.orchestrator import run
from upgrader.lab.demo.ordeal import run as run_faults
from upgrader.lab.demo.report import DemoReport

__all__ = [
    "DemoError",
    "DemoReport",
    "FaultRow",
    "MachineReport",
    "OptionError",
    "Options",
    "run",
    "run_faults",
    "run_inside",
    "run_machine",
    "shell",
    "table",
    "to_json",
]
