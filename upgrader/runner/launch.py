# SPDX-License-Identifier: LGPL-2.1-or-later
"""Becomes a program, once it is told which: run by `spawn` as a script, with no module of ours.

Its own PID must be in the environment, and what Python changes for itself must be undone, so that no
line of the runner has to run between fork(2) and execve(2).
"""

import fcntl
import json
import os
import resource
import signal
import socket
import sys


def main() -> None:
    """Take FDs, and then the order, from the one in the first argument; say there why it cannot be followed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    line = socket.socket(fileno=int(sys.argv[1]))
    fds: list[int] = []
    text = b" "
    while text == b" ":  # each with FDs
        text, more, _, _ = socket.recv_fds(line, 1, 253)
        fds += more
    with line.makefile("rb") as file:
        text += file.readline()
    if not text.endswith(b"\n"):
        return  # the runner has ended
    order = json.loads(text)
    try:
        # Above all that they become, so that none is overwritten before its turn.
        above = order["first"] + len(fds)
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in (*fds, line.fileno())]
        for fd in (*fds, line.detach()):
            os.close(fd)
        line = socket.socket(fileno=moved.pop())
        for number, fd in enumerate(moved, order["first"]):
            os.dup2(fd, number)
        for number, limits in ((resource.RLIMIT_NOFILE, (soft, hard)), *order["limits"]):
            resource.setrlimit(number, limits)
        for number in order["default"]:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        environment = order["environment"] | dict.fromkeys(order["own_pid"], str(os.getpid()))
        os.execvpe(order["arguments"][0], order["arguments"], environment)
    except Exception as error:
        line.sendall(f"{order['arguments'][0]}: {error}".encode(errors="replace"))


if __name__ == "__main__":
    main()
