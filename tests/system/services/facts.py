# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that writes what it was started with to the file in its argument, as JSON, and says READY=1."""

import json
import os
import signal
import socket
import sys

_STATUS = (
    "Umask", "Groups", "Uid", "Gid", "CapInh", "CapPrm", "CapEff", "CapBnd",
    "CapAmb", "NoNewPrivs", "Seccomp", "Cpus_allowed",
)  # fmt: skip


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


def facts() -> dict[str, object]:
    """All that a process inherits, by name; its own PID is told as SELF."""
    here = str(os.getpid())
    status = dict(line.split(":\t", 1) for line in read("/proc/self/status").splitlines())
    variables = dict(item.partition("=")[::2] for item in read("/proc/self/environ").split("\0"))
    told: dict[str, object] = {
        f"variable {name}": "SELF" if value == here else value for name, value in variables.items()
    }
    told |= {f"status {name}": status[name].strip() for name in _STATUS if name in status}
    told |= {
        f"limit {line[:25].strip()}": line[26:] for line in read("/proc/self/limits").splitlines()
    }
    own = [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()]
    for name in ("oom_score_adj", "timerslack_ns", "cgroup", "coredump_filter", "personality"):
        told[name] = read(f"/proc/self/{name}").strip()
    told |= {
        "session": own,
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "scheduler": os.sched_getscheduler(0),
        "directory": os.getcwd(),
        "root": os.readlink("/proc/self/root"),
        "namespaces": [
            os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net", "pid", "ipc")
        ],
        "stdio": [os.readlink(f"/proc/self/fd/{number}") for number in range(3)],
        "interactive": [os.isatty(number) for number in range(3)],
    }
    return told


if __name__ == "__main__":
    with open(sys.argv[1], "w") as written:
        json.dump(facts(), written)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        address = os.environ["NOTIFY_SOCKET"]
        sock.connect("\0" + address[1:] if address[0] == "@" else address)
        sock.sendall(b"READY=1")
    signal.pause()
