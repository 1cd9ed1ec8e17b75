# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads and stats the file PATH again and again, each time what it must be, until its input ends. At each line
that comes, it says how often that was so, how often not, and the longest wait in ms. `python reading.py PATH
CONTENT`"""

import os
import select
import sys
import time

PATH, CONTENT = sys.argv[1:]
done = failed = 0
longest = 0.0
kept = os.open(PATH, os.O_RDONLY)  # one that stays open, besides those that are opened each time
print("reading", flush=True)
while True:
    if select.select([sys.stdin], [], [], 0.01)[0]:
        if not sys.stdin.readline():
            break
        print(done, failed, round(longest * 1000), flush=True)
    begun = time.monotonic()
    try:
        with open(PATH) as anew:
            right = anew.read() == os.pread(kept, 1000, 0).decode() == CONTENT
        if (
            right
            and os.stat(PATH).st_size == len(CONTENT)
            and "file" in os.listdir(os.path.dirname(PATH))
        ):
            done += 1
        else:
            failed += 1
    except OSError as error:
        print(error, file=sys.stderr)
        failed += 1
    longest = max(longest, time.monotonic() - begun)
