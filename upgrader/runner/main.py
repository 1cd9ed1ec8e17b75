# SPDX-License-Identifier: LGPL-2.1-or-later
"""The entry of `python -m upgrader.run`: as a main process, or with --after-stop for ExecStopPost=."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run as told; the exit code of the process."""
    from upgrader.runner.waiting_process import WaitingProcess

    # What becomes the program starts while this process imports what it needs itself.
    waiting = WaitingProcess() if "--" in arguments else None
    import asyncio
    import logging
    import os

    from upgrader.errors import UpgradeError
    from upgrader.runner.options import RunnerOptions

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if [*arguments] == ["--after-stop"]:
        from upgrader.runner.after_stop import end_left_over

        return end_left_over()
    from upgrader.runner.runner import Runner

    try:
        asyncio.run(Runner(RunnerOptions.parse(arguments, os.environ), waiting).run())
    except UpgradeError as error:  # at a desk; nobody has to look into this program because of it
        raise SystemExit(f"python -m upgrader.run: {error}") from error
    return 0
