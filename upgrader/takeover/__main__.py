# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m upgrader.takeover`, for ExecReload=: starts the new main process and reports.

PID 1 has made this process afresh from the current unit file, so all that it starts gets today's
environment, sandbox and limits. What it has started is killed if it ends before the commit.
`upgrade` is what an operator asks for, and what calls for the reload.

Clients wait for nothing here, but an operator does, and its imports compete with the service: it
gets by on a part of the standard library, asks its first questions before it loads most of that, and
has loaded all of it before it starts anything.
"""

from __future__ import annotations

import sys

from upgrader.takeover.first_questions import FirstQuestions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_USAGE = """\
usage: python -m upgrader.takeover [--help]

Starts the new version of a service beside the running one, which then gives everything to it. It is
for the unit file, and is run by systemd:

    ExecReload=/usr/bin/python3 -m upgrader.takeover

To upgrade a service, run: upgrader upgrade UNIT
"""


def main(arguments: Sequence[str]) -> int:
    """Upgrade the unit that this process is a control process of; the exit code of the reload."""
    if arguments:
        asked = arguments[0] in ("-h", "--help")
        (sys.stdout if asked else sys.stderr).write(_USAGE)
        return 0 if asked else 2
    with FirstQuestions() as questions:
        from upgrader.takeover.reload import upgrade  # while they are answered

        return upgrade(questions)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
