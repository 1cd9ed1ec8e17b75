# SPDX-License-Identifier: LGPL-2.1-or-later
"""Adapters of programs that need more than the table of programs can say, and what they are made of.

A module here, or one of yours, has a class ADAPTER: `python -m upgrader.run --adapter NAME`.
"""

from upgrader.runner.adapter import AdapterHost, ProgramAdapter, StartRequest
from upgrader.runner.passing import Given
from upgrader.runner.processes import RunningProcess
from upgrader.runner.spawn import StartOrder

__all__ = ["AdapterHost", "Given", "ProgramAdapter", "RunningProcess", "StartOrder", "StartRequest"]
