# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers lines on every socket that it is passed as `door`: `add` counts, `keep` has a memfd kept,
`passed` says what it has been passed besides."""

import os

import upgrader


@upgrader.state("counters")
class Counters:
    total: int = 0


def main() -> None:
    with upgrader.attach("several") as instance:
        instance.state(Counters)
        door = instance.listener("door", bind=os.environ.get("BIND"))

        @instance.connections(door)
        def answer(peer: upgrader.blocking.Peer[None], counters: Counters) -> None:
            for line in peer.lines():
                match line.split():
                    case [b"add"]:
                        counters.total += 1
                        told = (counters.total, counters.total, instance.generation)
                        peer.write(b"%d %d %d\n" % told)
                    case [b"keep", text]:
                        with open(os.memfd_create("own"), "wb") as memfd:
                            memfd.write(text)
                            memfd.flush()
                            instance.keep("own", memfd)
                        peer.write(b"kept\n")
                    case [b"passed"]:
                        said = [
                            f"{item.name}={os.pread(item.fd.fileno(), 20, 0).decode().strip()}"
                            for item in instance.passed
                        ]
                        peer.write(" ".join(sorted(said)).encode() + b"\n")

        for _ in instance.serve():
            pass


if __name__ == "__main__":
    main()
