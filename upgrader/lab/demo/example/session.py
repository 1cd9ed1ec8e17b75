# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes with each connection of the example service; both versions have the same."""

import zlib

import upgrader


@upgrader.state("session", version=1)
class Session:
    """What it knows of one connection."""

    requests: int = 0
    streaming: bool = False
    sequence: int = 0
    checksum: int = 0

    def advance(self, generation: int) -> bytes:
        """The next line of the stream: its number, who sends it, and a checksum of all lines so far."""
        self.sequence += 1
        line = b"%d %d" % (self.sequence, generation)
        self.checksum = zlib.crc32(line + b"\n", self.checksum)
        return b"%s %08x\n" % (line, self.checksum)
