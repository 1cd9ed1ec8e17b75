# SPDX-License-Identifier: LGPL-2.1-or-later
"""A TLS client that copies another one's random: `tls_attacker.py PORT RANDOM KEYS`.

It makes a whole handshake of its own under that random, then asks for `/` once for each line that it is
given, and prints the answers. Its secrets go to the file KEYS.
"""

import ctypes
import http.client
import os
import re
import ssl
import sys
from pathlib import Path

_SIZE = 32  # bytes of a client random
_BYTES = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_ubyte), ctypes.c_int)


class RandMethod(ctypes.Structure):
    """RAND_METHOD of OpenSSL."""

    _fields_ = [
        ("seed", ctypes.c_void_p), ("bytes", _BYTES), ("cleanup", ctypes.c_void_p),
        ("add", ctypes.c_void_p), ("pseudorand", _BYTES), ("status", ctypes.CFUNCTYPE(ctypes.c_int)),
    ]  # fmt: skip


def main(port: int, copied: bytes, keys: str) -> None:
    maps = Path("/proc/self/maps").read_text()
    (library,) = set(re.findall(r"/\S*libcrypto\S*", maps))
    left = [copied]  # the first thing of its size that a handshake asks for is the random

    def give(buffer: "ctypes._Pointer[ctypes.c_ubyte]", size: int) -> int:
        data = left.pop() if left and size == _SIZE else os.urandom(size)
        ctypes.memmove(buffer, data, size)
        return 1

    method = RandMethod(
        bytes=_BYTES(give),
        pseudorand=_BYTES(give),
        status=ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1),
    )
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.keylog_filename = keys
    assert ctypes.CDLL(library).RAND_set_rand_method(ctypes.byref(method)) == 1
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context)
    for _ in sys.stdin:
        connection.request("GET", "/")
        print(connection.getresponse().read().decode(), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), bytes.fromhex(sys.argv[2]), sys.argv[3])
