# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service with the real library: counts lines. VERSION is its version.

1 and 2 differ in their state, and 1 cannot read what 2 has saved; exit and hang are broken.
"""

import os
import signal

import upgrader

VERSION = os.environ["VERSION"]

if VERSION == "exit":
    import no_such_module  # type: ignore[import-not-found]  # noqa: F401
if VERSION == "hang":
    signal.pause()


@upgrader.state("counter", version=int(VERSION), readable_from=int(VERSION))
class Counter:
    """How many lines there were, over all instances."""

    lines: int = 0


def main() -> None:
    """Answer every line with its number."""
    with upgrader.attach("counter", version=VERSION) as instance:
        instance.state(Counter)
        door = instance.listener("lines", bind=f"127.0.0.1:{os.environ['PORT']}")

        @instance.connections(door)
        def count(peer: upgrader.Peer[None], counter: Counter) -> None:
            for _ in peer.lines():
                counter.lines += 1
                peer.write(f"{counter.lines}\n".encode())

        for _ in instance.serve():
            pass


main()
