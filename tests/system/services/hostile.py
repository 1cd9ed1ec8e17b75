# SPDX-License-Identifier: LGPL-2.1-or-later
"""Means harm to whoever asks it: /run/hostile/says is how it answers, SILENT how many sockets beside its
own never do. With MODE=dies, it writes what is no number into the journal, and ends."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

PLACE = Path(os.environ["RUNTIME_DIRECTORY"])
EVIL = "\x1b]0;owned\x07\r\nzzz.service  serving\t\x9b2J\u202e"


def send(path: str, *fields: str, fds: tuple[int, ...] = ()) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(path)
        socket.send_fds(sock, ["\n".join(fields).encode() + b"\n"], list(fds))


def journal(*fields: str) -> None:
    send("/run/systemd/journal/socket", *fields)


def answer(sock: socket.socket) -> None:
    with sock, contextlib.suppress(OSError):
        sock.recv(65536)
        said = (PLACE / "says").read_text() if (PLACE / "says").exists() else "evil"
        many = dict.fromkeys(("generation", "connections", "since", "interface"), 9)
        if said == "drip":
            while True:
                sock.sendall(b" ")
                time.sleep(1)
        if said == "deep":
            sock.sendall(b'{"parameters":' + b"[" * 200_000 + b"]" * 200_000 + b"}\0")
        if said == "huge":
            sock.sendall(b'{"parameters":{"service":"x","generation":' + b"9" * 400 + b"}}\0")
        if said == "evil":
            failed = {"phase": "failed", "mode": EVIL, "reason": EVIL}
            words = dict.fromkeys(("service", "version", "phase", "library"), EVIL)
            reply = {**many, **words, "changed": [EVIL], "migration": failed}
            sock.sendall(json.dumps({"parameters": reply}).encode() + b"\0")


def listener(name: str) -> socket.socket:
    path = PLACE / name
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(64)
    return sock


if os.environ.get("MODE") == "dies":
    number = "PRIORITY=\u00b2"
    journal("MESSAGE=a", number, "EXIT_STATUS=\u00b2", f"UPGRADER_PAUSE_USEC={'9' * 400}")
    sys.exit(EVIL)
silent = [listener(f"draining-{each}.sock") for each in range(int(os.environ.get("SILENT", "0")))]
own = listener("upgrader.sock")
status = f"STATUS=generation {'9' * 400}, {EVIL!r}"
send(os.environ["NOTIFY_SOCKET"], "FDSTORE=1", "FDNAME=upgrader-listener-x", fds=(own.fileno(),))
send(os.environ["NOTIFY_SOCKET"], "READY=1", status)
while True:
    threading.Thread(target=answer, args=(own.accept()[0],), daemon=True).start()
