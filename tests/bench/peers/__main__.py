# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m tests.bench.peers [--rounds N] [--servers A,B] [--write]`: compare all servers, interleaved.

With `--write`, the tables and charts in docs/bench/ are written anew.
"""

import argparse
import compileall
import shutil
import sys
from pathlib import Path

import upgrader
from tests.bench.peers.measure import Result, measure
from tests.bench.peers.report import about, charts, table, write
from tests.bench.peers.servers import SERVERS
from upgrader.lab.private_systemd import CommandError, PrivateSystemd

DOCS = Path(__file__).parents[3] / "docs" / "bench"


def main() -> int:
    """Run the bench; the exit code is 1 if a server could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured")
    parser.add_argument("--servers", default=",".join(SERVERS), help="which, of the default's")
    parser.add_argument("--write", action="store_true", help="write docs/bench/")
    options = parser.parse_args()
    names = [name for name in options.servers.split(",") if _is_there(name)]
    results: list[Result] = []
    failed = False
    compileall.compile_dir(Path(upgrader.__file__).parent, quiet=1)  # as an installed package is
    with PrivateSystemd.boot("host") as machine:
        for number in range(options.rounds):
            for name in names if number % 2 == 0 else reversed(names):
                print(f"round {number + 1}: {SERVERS[name].title}", file=sys.stderr, flush=True)
                try:
                    results.append(measure(machine, name))
                except CommandError as error:
                    failed = True
                    print(f"  {error}", machine.journal(lines=20), sep="\n", file=sys.stderr)
        lines = about(machine, options.rounds)
    print("\n".join([*lines, "", *table(results)]))
    if options.write:
        write(DOCS, lines, results)
        charts(DOCS, results)
    return int(failed)


def _is_there(name: str) -> bool:
    missing = [each for each in SERVERS[name].needs if not shutil.which(each)]
    if missing:
        print(f"left out: {SERVERS[name].title}: there is no {missing[0]}", file=sys.stderr)
    return not missing


if __name__ == "__main__":
    sys.exit(main())
