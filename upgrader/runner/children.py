# SPDX-License-Identifier: LGPL-2.1-or-later
"""The child processes of a runner, adopted orphans included: reaps them all, on its asyncio loop."""

import asyncio
import os
import signal


class Children:
    """All there are; whoever wants to know how one ends, says so before it can."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wanted: dict[int, asyncio.Future[int]] = {}
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)

    def expect(self, pid: int) -> None:
        """Remember how a child ends, which has not been released yet."""
        self._wanted[pid] = self._loop.create_future()

    def end_of(self, pid: int) -> "asyncio.Future[int]":
        """The exit status of such a child once it has ended, negative for a signal."""
        return asyncio.shield(self._wanted[pid])

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            ended = self._wanted.get(pid)
            if ended and not ended.done():
                ended.set_result(os.waitstatus_to_exitcode(status))
