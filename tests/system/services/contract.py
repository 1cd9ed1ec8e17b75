# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service that breaks as it is told to: a test of the command line has an instance fail in any way.

VERSION says how: good, exit, hang, kill, unreadable (its state is older),
cold (it has lost what PID 1 passed), aside (it sets the image aside), plain (it does not use the
library), stray (it says that it is ready, and fails later), or stuck (it does not stop).
"""

import os
import signal
import socket
import sys
import time

HOW = os.environ.get("VERSION", "good")

if HOW == "exit":
    import missing  # type: ignore[import-not-found]  # noqa: F401
if HOW == "hang":
    signal.pause()
if HOW == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if HOW in ("plain", "stray"):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
        notify.send(b"READY=1\nSTATUS=Processing requests...")
    if HOW == "stray":
        time.sleep(1)
        sys.exit("this version fails a little later")
    signal.pause()
if HOW == "cold":
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
if HOW == "aside":
    os.environ["UPGRADER_DISCARD"] = "all"
if HOW == "stuck":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

import upgrader  # noqa: E402

VERSION = 1 if HOW == "unreadable" else 2


@upgrader.state("counters", version=VERSION, readable_from=VERSION)
class Counters:
    """What moves."""

    lines: int = 0


with upgrader.attach("contract", version=HOW) as instance:
    instance.state(Counters)
    for _ in instance.serve():
        pass
