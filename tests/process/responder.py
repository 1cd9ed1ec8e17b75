# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host behind a TAP device that answers ARP and pings: `python responder.py DEVICE`. With
SPOIL=1 its check sets the vnet header of the device anew, as QEMU does, and then refuses to take over."""

import fcntl
import os
import socket
import struct
import sys

import upgrader
from upgrader.backends import Tap

ADDRESS = socket.inet_aton("10.98.0.2")
MAC = bytes.fromhex("525400123456")
_HEADER = 12  # bytes of the vnet header
_SET_HEADER = 0x400454D8  # TUNSETVNETHDRSZ


def checksum(data: bytes) -> int:
    """The Internet checksum, RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data.ljust(len(data) + len(data) % 2, b"\0")))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def answer(frame: bytes) -> bytes:
    """What is sent in answer to an Ethernet frame: nothing, or another one."""
    to, kind, packet = frame[6:12], frame[12:14], frame[14:]
    if kind == b"\x08\x06" and packet[24:28] == ADDRESS:  # ARP
        return to + MAC + kind + packet[:6] + b"\0\2" + MAC + ADDRESS + packet[8:18]
    length = (packet[0] & 15) * 4
    total = struct.unpack("!H", packet[2:4])[0]
    if kind != b"\x08\0" or packet[9] != socket.IPPROTO_ICMP or packet[length] != 8:
        return b""
    rest = packet[length + 4 : total]
    echo = b"\0\0" + struct.pack("!H", checksum(b"\0\0\0\0" + rest)) + rest
    return to + MAC + kind + packet[:12] + packet[16:20] + packet[12:16] + packet[20:length] + echo


def main(device: str) -> None:
    with upgrader.attach("responder") as instance:
        tap = instance.backend("uplink", Tap(device, header=_HEADER, queue_length=4000))

        @instance.verify
        def check() -> None:
            if os.environ.get("SPOIL"):
                fcntl.ioctl(tap.fileno(), _SET_HEADER, struct.pack("i", 10))
                raise ValueError("as told")

        for _ in instance.serve(tap):
            frame = os.read(tap.fileno(), 65536)
            if reply := answer(frame[_HEADER:]):
                os.write(tap.fileno(), bytes(_HEADER) + reply)


if __name__ == "__main__":
    main(sys.argv[1])
