# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run a command or a shell inside, beside the running example service."""

import shlex
import sys

from upgrader.lab.demo.options import DemoError, Options
from upgrader.lab.demo.stage import HOST, PORT, SERVICE, Stage
from upgrader.tool.outcome import Tell

_WELCOME = f"""\
{SERVICE} runs version 1 on http://{HOST}:{PORT}/ (and /stream). Try:
  systemctl status {SERVICE}
  web-install 2                    install version 2 on disk, as a package would
  upgrader upgrade {SERVICE}     upgrade the service to it
  journalctl -u {SERVICE}
Leave with `exit`; everything here is thrown away then."""


def run_inside(options: Options, command: str, progress: Tell) -> int:
    """Run `command` with sh inside, on the caller's own terminal; returns its exit code.

    If a signal killed it, that is 128 plus the number of the signal. Raises DemoError, PrivateSystemdError.
    """
    progress(f"booting a private systemd ({options.systemd})")
    with Stage.set_up(options) as stage:
        progress(f"systemd {stage.machine.systemd_version} is up, {SERVICE} runs version 1")
        return _exit_code(stage.machine.call(["sh", "-c", command]))


def shell(options: Options, progress: Tell) -> int:
    """Give an interactive shell inside; returns its exit code. Raises as `run_inside` does."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise DemoError("--shell needs a terminal", remedy="for a script there is --run COMMAND")
    progress(f"booting a private systemd ({options.systemd})")
    with Stage.set_up(options) as stage:
        progress(f"systemd {stage.machine.systemd_version} is up.")
        progress(_WELCOME)
        # script(1) gives the shell a terminal of its own: ours does not exist in there.
        shell = "PS1='[inside] \\w \\$ ' exec bash --norc -i"
        session = ["script", "--quiet", "--return", "--command", shell, "/dev/null"]
        return _exit_code(stage.machine.call(["sh", "-c", f"cd / && exec {shlex.join(session)}"]))


def _exit_code(status: int) -> int:
    return status if status >= 0 else 128 - status
