# SPDX-License-Identifier: LGPL-2.1-or-later
"""The demonstration: a real service under a real systemd is upgraded under load, and what its clients noticed is counted."""

from upgrader.demo.inside import run_inside, shell
from upgrader.demo.options import DemoError, OptionError, Options
from upgrader.demo.orchestrator import run
from upgrader.demo.report import Report

__all__ = ["DemoError", "OptionError", "Options", "Report", "run", "run_inside", "shell"]
