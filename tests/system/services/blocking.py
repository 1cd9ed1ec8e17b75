# SPDX-License-Identifier: LGPL-2.1-or-later
"""The blocking twin of holder.py: the same lines, answered by handlers that never wait."""

import os
import time
from pathlib import Path

import upgrader


@upgrader.state("counters", version=2)
class Counters:
    total: int = 0


@upgrader.state("session")
class Session:
    count: int = 0


def main() -> None:
    with upgrader.attach("holder", version="blocking") as instance:
        instance.state(Counters)
        door = instance.listener("door", bind=f"127.0.0.1:{os.environ['PORT']}")

        @instance.connections(door, state=Session)
        def answer(peer: upgrader.blocking.Peer[Session], counters: Counters) -> None:
            for line in peer.lines():
                match line.split():
                    case [b"add"]:
                        peer.state.count += 1
                        counters.total += 1
                        told = (peer.state.count, counters.total, instance.generation)
                        peer.write(b"%d %d %d\n" % told)
                    case [b"big", size]:
                        peer.write(b"x" * int(size) + b"\n")

        @instance.reload
        def reloaded() -> None:
            print("asked to reload", flush=True)

        @instance.verify
        def waits() -> None:
            if os.environ.get("STEP") == "verify":
                place = Path(os.environ["RUNTIME_DIRECTORY"])
                (place / "mark").touch()
                while not (place / "go").exists():
                    time.sleep(0.005)

        for _ in instance.serve():
            pass


if __name__ == "__main__":
    if os.environ.get("MODE") == "exit":
        raise SystemExit("this version ends at once")
    main()
