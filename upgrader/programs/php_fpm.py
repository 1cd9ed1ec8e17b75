# SPDX-License-Identifier: LGPL-2.1-or-later
"""PHP-FPM: what its workers have accepted is answered, however long that takes.

Told to quit, its master tells its workers, and kills them `process_control_timeout` later: at once, as it is
0 where nobody has set it (`fpm_pctl_action_next` in sapi/fpm/fpm/fpm_process_ctl.c). So it is stopped while
the workers are told, or it would start others. Once there is none, it is killed: it would only remove the
paths of listeners that the next one has, and a client that comes before they are put back would fail.
"""

import asyncio
import contextlib
import math
import signal
import time

from upgrader.runner.adapter import ProgramAdapter
from upgrader.runner.processes import RunningProcess
from upgrader.systemd.process_start import process_started

_LOOK = 0.01  # seconds between two looks whether the master is stopped
_BEGUN = (
    1.0  # seconds after which a worker heeds what it is told: before, it may still do as its master
)


class PhpFpmAdapter(ProgramAdapter):
    """As most programs, but for its end."""

    def drain(self, program: RunningProcess) -> None:
        """Stop its master, so that it starts no workers."""
        program.send(signal.SIGSTOP)

    async def while_draining(self, program: RunningProcess) -> None:
        """Have its workers quit, then end the master."""
        while not (program.stopped or program.ended):
            await asyncio.sleep(_LOOK)
        await asyncio.gather(*map(_quits, program.children()))
        program.send(signal.SIGKILL)


async def _quits(worker: RunningProcess) -> None:
    """Tell a worker to quit, once: that interrupts what it waits for; then wait for it."""
    with contextlib.suppress(OSError):  # it has ended
        began = process_started(worker.pid)
        await worker.ends(began + _BEGUN - time.clock_gettime(time.CLOCK_BOOTTIME))
    worker.send(signal.SIGQUIT)
    await worker.ends(math.inf)


ADAPTER = PhpFpmAdapter
