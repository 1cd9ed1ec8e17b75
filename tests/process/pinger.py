# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sends 1,000 pings a second to an address, and says how many were answered: `python pinger.py ADDRESS`.

A line on its input is answered with how many were sent and answered so far; at the end of its input it waits for what is under way, and says as JSON how many were sent, lost, and answered twice, and the
longest wait in seconds.
"""

import json
import select
import socket
import struct
import sys
import time

from tests.process.responder import checksum

GAP = 0.001
LAST = 5.0  # seconds for what is under way at the end
OWN = 4242
_FORCE_RECEIVE_BUFFER = 33  # SO_RCVBUFFORCE


class Pings:
    """What was sent, and when each one was answered."""

    def __init__(self, address: str) -> None:
        self.sent: list[float] = []
        self.answered: dict[int, float] = {}
        self.twice = 0
        self.address = address
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self.sock.setsockopt(socket.SOL_SOCKET, _FORCE_RECEIVE_BUFFER, 1 << 24)
        self.sock.setblocking(False)

    def send(self) -> None:
        number = len(self.sent)
        self.sent.append(time.monotonic())
        body = struct.pack("!HHI", OWN, number & 0xFFFF, number)
        ping = b"\x08\0" + struct.pack("!H", checksum(b"\x08\0\0\0" + body)) + body
        self.sock.sendto(ping, (self.address, 0))

    def receive(self) -> None:
        while True:
            try:
                packet = self.sock.recv(2000)
            except BlockingIOError:
                return
            kind, _, _, own, _, number = struct.unpack("!BBHHHI", packet[20:32])
            if (kind, own) == (0, OWN):
                self.twice += number in self.answered
                self.answered.setdefault(number, time.monotonic())


def main(address: str) -> None:
    pings, due, over = Pings(address), time.monotonic(), False
    while not over:
        pings.send()
        due += GAP
        while (left := due - time.monotonic()) > 0:
            ready, _, _ = select.select([sys.stdin, pings.sock], [], [], left)
            pings.receive()
            if sys.stdin in ready:
                over = not sys.stdin.readline()
                if over:
                    break
                print(len(pings.sent), len(pings.answered), flush=True)
    deadline = time.monotonic() + LAST
    while len(pings.answered) < len(pings.sent) and time.monotonic() < deadline:
        select.select([pings.sock], [], [], 0.1)
        pings.receive()
    waits = [at - pings.sent[number] for number, at in pings.answered.items()]
    said = {
        "sent": len(pings.sent),
        "lost": len(pings.sent) - len(pings.answered),
        "twice": pings.twice,
        "longest": max(waits, default=0.0),
    }
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
