# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m upgrader.run`, for ExecStart=: any program, as a service whose upgrades nobody notices."""

import sys

from upgrader.runner.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
