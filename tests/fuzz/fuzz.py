# SPDX-License-Identifier: LGPL-2.1-or-later
"""Gives changed inputs to decoders: whatever they are, a decoder returns, or raises an error of its own.

A foreign error is any other exception. A hang is an input that takes more than a second of processor
time, which no decoder needs for a message of a megabyte.
"""

import contextlib
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.support import eventually

#: Seconds of processor time for one input.
LIMIT = 1.0
#: Longest input, in bytes: a little more than a message may have.
LARGEST = 1_100_000
#: Foreign errors that are kept of one decoder.
_KEPT = 5


class Hang(BaseException):
    """An input that takes too long; no decoder catches it."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """`run` decodes one input, and does with it what is done with it; `own` are its errors."""

    name: str
    run: Callable[[bytes], object]
    own: tuple[type[Exception], ...]
    seeds: Sequence[bytes]
    change: Callable[[random.Random, bytes], bytes]


@dataclass(slots=True)
class Result:
    """What came of one decoder; `foreign`: an error with its place, and the input, repeatable."""

    name: str
    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    fds: int = 0
    foreign: list[tuple[str, bytes]] = field(default_factory=list)


def fuzz(decoder: Decoder, seconds: float, rng: random.Random) -> Result:
    """Give it its seeds, then changes of them, for that long."""
    result = Result(decoder.name)
    with _limited():
        for seed in decoder.seeds:
            _give(decoder, seed, result)
        assert not result.refused, f"{decoder.name} refuses a seed"
        before, deadline = _open_fds(), time.monotonic() + seconds
        while time.monotonic() < deadline and len(result.foreign) < _KEPT:
            data = rng.choice(decoder.seeds)
            for _ in range(rng.choice((1, 1, 1, 2, 5))):
                data = decoder.change(rng, data)[:LARGEST]
            _give(decoder, data, result)
        # What is served in a thread is closed by that, a moment later.
        eventually(lambda: _open_fds() <= before)
        result.fds = max(_open_fds() - before, 0)
    return result


def _give(decoder: Decoder, data: bytes, result: Result) -> None:
    result.inputs += 1
    began = time.process_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
    try:
        decoder.run(data)
    except decoder.own:
        result.refused += 1
    except (Exception, Hang) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {str(error)[:200]!r} ({place.filename}:{place.lineno})"
        result.foreign.append((what, data))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    result.slowest = max(result.slowest, time.process_time() - began)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def hang(number: int, frame: object) -> None:
        raise Hang(f"more than {LIMIT:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, hang)
    try:
        yield
    finally:
        signal.signal(signal.SIGVTALRM, before)


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))
