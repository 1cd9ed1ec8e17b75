# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ExecReload= runs: starts the new main process, and says what became of it."""
