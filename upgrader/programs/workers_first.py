# SPDX-License-Identifier: LGPL-2.1-or-later
"""nginx, PHP-FPM: its workers drain, and its master, which does harm when it is told to, is ended after them.

- PHP-FPM's tells the workers to quit, and kills them `process_control_timeout` later: at once, as that is 0
  where nobody has set it (`fpm_pctl_action_next` in sapi/fpm/fpm/fpm_process_ctl.c).
- That of both removes the paths of UNIX listeners, which the next one has (`ngx_close_listening_sockets` in
  src/core/ngx_connection.c does if its runner has died), and the PID file; at SIGTERM as well.
"""

import asyncio
import contextlib
import math
import signal
import time
from collections.abc import Sequence

from upgrader.protocol.programs import Passing
from upgrader.runner.adapter import AdapterHost, ProgramAdapter
from upgrader.runner.processes import RunningProcess, end
from upgrader.systemd.process_start import process_started

_LOOK = 0.01  # seconds between two looks whether the master is stopped
#: Seconds after which a worker heeds what it is told: before, it may still do as its master.
_BEGUN = 1.0


class WorkersFirst(ProgramAdapter):
    """As most programs, but for its end."""

    def __init__(self, host: AdapterHost) -> None:
        super().__init__(host)
        self._is_last = False  # nothing of the unit goes on, so what the master removes is to go

    def drain(self, program: RunningProcess) -> None:
        """Stop the master, so that it starts no workers."""
        program.send(signal.SIGSTOP)

    def stop(self, program: RunningProcess) -> None:
        """The same, and the master ends by itself."""
        self._is_last = True
        self.drain(program)

    async def while_draining(self, program: RunningProcess) -> None:
        """Have the workers quit, then end the master."""
        while not (program.stopped or program.ended):
            await asyncio.sleep(_LOOK)
        workers = program.children()
        await asyncio.gather(*map(self._quits, workers))
        if not self._is_last and (workers or not self._may_serve_alone):
            program.send(signal.SIGKILL)
        else:
            program.send(self.host.options.drain)
            program.send(signal.SIGCONT)

    def end(
        self, programs: Sequence[RunningProcess], seconds: float, *, told: bool = False
    ) -> None:
        """The workers after what they are at, and no master by itself."""
        for each in programs:
            each.send(signal.SIGSTOP)
        telling = [] if told else [child for each in programs for child in each.children()]
        if not told and self._may_serve_alone:
            telling += [each for each in programs if not each.children()]
        end(telling, ((self.host.options.drain, seconds),))
        end(programs, ((None, seconds if told else 0),))

    @property
    def _may_serve_alone(self) -> bool:
        """Whether a program without workers may be one process that serves, and not only their master."""
        return self.host.options.passing is not Passing.PHP_FPM

    async def _quits(self, worker: RunningProcess) -> None:
        """Tell a worker, once: that interrupts what it waits for; then wait for it."""
        with contextlib.suppress(OSError):  # it has ended
            began = process_started(worker.pid)
            await worker.ends(began + _BEGUN - time.clock_gettime(time.CLOCK_BOOTTIME))
        worker.send(self.host.options.drain)
        await worker.ends(math.inf)


ADAPTER = WorkersFirst
