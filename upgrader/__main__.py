# SPDX-License-Identifier: LGPL-2.1-or-later
"""`upgrader` and `python -m upgrader`: starts the command line, or says which package it lacks."""

import sys


def main() -> int:
    """The entry point of the `upgrader` command; returns the exit code."""
    try:
        from upgrader import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "upgrader":
            raise
        print(
            f"upgrader: the Python package {error.name} is missing: pip install 'upgrader[cli]'",
            file=sys.stderr,
        )
        return 4
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
