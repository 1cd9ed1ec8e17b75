# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m tests.fuzz SECONDS [SEED]`: all decoders for that long, and a table of what came of it."""

import contextlib
import random
import sys
import tempfile
from pathlib import Path

from tests.fuzz.decoders import decoders
from tests.fuzz.fuzz import fuzz


def main(seconds: float, seed: int) -> int:
    """The exit code: 0 if there was no foreign error, no hang, and no FD was left open."""
    bad = False
    print(f"seed {seed}\n{'decoder':34}{'inputs':>12}{'refused':>12}{'slowest':>12}{'foreign':>9}")
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        every = decoders(Path(place), stack)
        for number, decoder in enumerate(every):
            result = fuzz(decoder, seconds / len(every), random.Random(seed + number))
            slowest = f"{result.slowest * 1000:.1f} ms"
            print(
                f"{result.name:34}{result.inputs:12,}{result.refused:12,}{slowest:>12}"
                f"{len(result.foreign):9}",
                flush=True,
            )
            for what, data in result.foreign:
                print(f"  {what}\n    of {data[:2000]!r}")
            if result.fds > 0:
                print(f"  {result.fds} FDs were left open")
            bad |= bool(result.foreign) or result.fds > 0
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int((sys.argv[2:] or ["1"])[0])))
