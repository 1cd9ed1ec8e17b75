# SPDX-License-Identifier: LGPL-2.1-or-later
"""Becomes a program, once it is told which: run by `spawn` as a script, with no module of ours.

Its own PID must be in the environment, and what Python changes for itself must be undone, so that no
line of the runner has to run between fork(2) and execve(2).
"""

import json
import os
import resource
import signal
import socket
import sys


def main() -> None:
    """Read the order from the FD in the first argument; say there why it cannot be followed."""
    line = socket.socket(fileno=int(sys.argv[1]))
    line.set_inheritable(False)
    with line.makefile("rb") as file:
        text = file.readline()
    if not text.endswith(b"\n"):
        return  # the runner has ended
    order = json.loads(text)
    try:
        for number, limits in order["limits"]:
            resource.setrlimit(number, limits)
        for number in order["default"]:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for number, fd in enumerate(order["fds"], order["first"]):
            os.dup2(fd, number)
        for fd in order["fds"]:
            os.close(fd)
        environment = order["environment"] | dict.fromkeys(order["own_pid"], str(os.getpid()))
        os.execvpe(order["arguments"][0], order["arguments"], environment)
    except Exception as error:
        line.sendall(f"{order['arguments'][0]}: {error}".encode(errors="replace"))


if __name__ == "__main__":
    main()
