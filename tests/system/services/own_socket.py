# SPDX-License-Identifier: LGPL-2.1-or-later
"""A program that listens at the path in its argument, which a group of its own may connect to; or on what it is
passed. It answers with its PID."""

import os
import select
import socket
import sys

sys.stdout.write("".join(sys.argv[2:]))
if "LISTEN_FDS" in os.environ:
    listener = socket.socket(fileno=3)
else:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    os.chmod(sys.argv[1], 0o660)
    os.chown(sys.argv[1], 0, 65534)
    listener.listen()
waiting = select.epoll()
waiting.register(listener, select.EPOLLIN)
while True:
    waiting.poll()
    client, _ = listener.accept()
    client.sendall(b"%d\n" % os.getpid())
    client.close()
