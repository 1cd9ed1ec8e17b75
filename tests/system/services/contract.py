# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service that keeps only the library's contract with PID 1, and breaks as it is told to.

It parks an empty image on SIGTERM and says in STATUS= what it loaded, with no library in it, so that
a test of the command line can have an instance fail in any way. VERSION says how: good, exit, hang, unreadable, cold, aside, plain, stuck, or kill.
"""

import json
import os
import signal
import socket
import sys
import traceback
from array import array

UNREADABLE = "state 'counters': saved as version 2, readable from version 2 on; this has version 1"


def notify(*fields: str, fd: int | None = None) -> None:
    """Tell PID 1, with an FD or without."""
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
        sock.sendmsg(["\n".join(fields).encode()], rights)


def journal(message: str) -> None:
    """Report a failure as the library does."""
    fields = {"MESSAGE": message, "PRIORITY": "3", "UPGRADER_OUTCOME": "failed"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("/run/systemd/journal/socket")
        sock.send("".join(f"{name}={value}\n" for name, value in fields.items()).encode())


def parked() -> dict[int, int]:
    """Generation and FD of the images that PID 1 passed in."""
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    prefix = "upgrader-channel-"
    return {int(n.removeprefix(prefix)): 3 + i for i, n in enumerate(names) if n.startswith(prefix)}


def start(how: str) -> int:
    """Load or fail; returns the generation."""
    images = parked()
    discarded = os.environ.get("UPGRADER_DISCARD", "")
    source = max(images, default=0)
    match how:
        case "exit":
            raise ModuleNotFoundError("No module named 'missing'")
        case "hang":
            signal.sigwait({signal.SIGTERM})
            raise SystemExit(1)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "unreadable" if source and discarded not in ("all", str(source)):
            journal(UNREADABLE)
            raise SystemExit(1)
        case "plain":
            notify("READY=1", "STATUS=Processing requests...")
            return 0
    if how == "aside" or (source and discarded in ("all", str(source))):
        set_aside = f", image of generation {source} set aside"
        notify("FDSTORE=1", f"FDNAME=upgrader-aside-{source}", fd=os.memfd_create("aside"))
        notify("FDSTOREREMOVE=1", f"FDNAME=upgrader-channel-{source}")
        notify("READY=1", f"STATUS=generation {source + 1}, cold start{set_aside}")
        return source + 1
    if how == "cold" or not source:
        notify("READY=1", "STATUS=generation 1, cold start")
        return 1
    loaded = f"loaded by restart from generation {source}: 3 FDs, 210 bytes of state, 0 left behind"
    notify(
        "READY=1",
        f"STATUS=generation {source + 1}, {loaded}",
        "FDSTOREREMOVE=1",
        f"FDNAME=upgrader-channel-{source}",
    )
    return source + 1


def main() -> None:
    """Run as one instance."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    how = os.environ.get("VERSION", "good")
    generation = start(how)
    print(json.dumps({"generation": generation}), flush=True)
    signal.sigwait({signal.SIGTERM})
    if how == "stuck":
        signal.pause()
    if generation:
        notify(
            "FDSTORE=1",
            f"FDNAME=upgrader-channel-{generation}",
            "FDPOLL=0",
            fd=os.memfd_create("image"),
        )


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.exit(1)
