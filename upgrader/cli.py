# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: reads arguments, prints, exits; what to do, and how it went, is not its job.

Results go to standard output, progress and failures to standard error.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import click

from upgrader.errors import UpgradeError
from upgrader.outcome import ExitCode, Outcome, Result
from upgrader.parameters import time_span
from upgrader.upgrade import Mode, Progress

#: Set to show the traceback of an error that this tool did not expect.
DEBUG = "UPGRADER_DEBUG"

EXIT_CODES = {code.value: code.meaning for code in ExitCode}


class _TimeSpan(click.ParamType):  # type: ignore[type-arg]  # a generic from click 8.2 on
    name = "span"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        try:
            seconds = time_span(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if seconds <= 0:
            self.fail(f"{value!r} is no time to wait; write it as 5s or 1min 30s", param, ctx)
        return seconds


class _Group(click.Group):
    """Commands in the order in which they were written, and the exit codes below the help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes, the same on every command"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from upgrader import __version__

        _print(f"upgrader {__version__}")
        ctx.exit()


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_version,
    help="Show the version and exit.",
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Upgrade systemd services in place, without losing a connection or any state.

    A service that uses the upgrader library parks its sockets, connections and state with systemd
    when it is restarted, and its next version goes on from there.
    """
    if ctx.invoked_subcommand is None:
        _print(ctx.get_help())


_unit = click.argument("unit", metavar="UNIT")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
_quiet = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
_timeout = click.option(
    "--timeout",
    type=_TimeSpan(),
    metavar="SPAN",
    help="How long to wait for the new instance: 5s, 500ms, 1min 30s. After that systemd goes on"
    " with the job, unobserved. Default: as long as TimeoutStopSec= and TimeoutStartSec= of the"
    " unit allow.",
)


@cli.command(short_help="Restart a unit into its new version.")
@_unit
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in Mode]),
    default=Mode.RESTART.value,
    show_default=True,
    help="restart: the old instance stops, systemd holds its sockets, connections and state, and"
    " the new instance takes them over. Clients see a pause as long as stop and start.",
)
@_timeout
@_json
@_quiet
def upgrade(unit: str, mode: str, timeout: float | None, as_json: bool, quiet: bool) -> None:
    """Restart UNIT into the version now on disk, and say what became of it.

    Install the new version first. Success means that the new instance is ready and has loaded all
    that the old one held; anything else is a failure, and the message names the cause, says
    whether the service serves now, and what to do. A changed unit file is reloaded first.

    If the new version does not start, what the old instance held is kept, and is loaded as soon as
    a good version is back and started. This needs systemd 254 or later, and
    FileDescriptorStorePreserve=yes in the unit. Without them it is kept only while systemd goes on
    restarting the service by itself (Restart= in the unit).

    \b
    Example:
      upgrader upgrade web.service
      upgrader upgrade web --timeout 30s --json
    """
    from upgrader.upgrade import upgrade as run

    outcome = run(unit, Mode(mode), timeout=timeout, progress=_progress(quiet))
    _finish(outcome, as_json)


@cli.command(short_help="Start a unit without its parked image.")
@_unit
@_timeout
@_json
@_quiet
def discard(unit: str, timeout: float | None, as_json: bool, quiet: bool) -> None:
    """Start UNIT without the image that is parked for it.

    For a service that does not come up because no version at hand can load what the last instance
    left behind. It starts as if for the first time: the listening sockets are kept, connections
    and state are not. The image is set aside in the FD store of the unit. A service that
    serves has no parked image, and nothing is done.

    \b
    Example:
      upgrader discard web.service
    """
    from upgrader.discard import discard as run

    _finish(run(unit, timeout=timeout, progress=_progress(quiet)), as_json)


@cli.command(short_help="Show upgrades under load.")
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in Mode]),
    default=Mode.RESTART.value,
    show_default=True,
    help="How to upgrade.",
)
@click.option("--upgrades", metavar="N", type=int, default=10, show_default=True, help="How often.")
@click.option(
    "--streams", metavar="N", type=int, default=8, show_default=True, help="Long streams to read."
)
@click.option(
    "--connections",
    metavar="N",
    type=int,
    default=0,
    show_default=True,
    help="Idle connections to hold besides.",
)
@click.option("--user", metavar="NAME", help="Run the example service as this user.")
@click.option(
    "--systemd",
    metavar="WHICH",
    default="host",
    show_default=True,
    help="The systemd to boot: host (of this machine), a Debian suite such as trixie or sid"
    " (downloaded once), or the path of a root tree.",
)
@_json
@click.option("--run", "command", metavar="COMMAND", help="Run COMMAND inside, then clean up.")
@click.option("--shell", is_flag=True, help="Give a shell inside, to look around.")
def demo(as_json: bool, command: str | None, shell: bool, **options: Any) -> int:
    """Show it: upgrade an example service under load, in a private systemd.

    Boots a systemd of its own in namespaces (as root; nothing of the machine is touched), starts
    an example web service, loads it with clients, upgrades it again and again, and counts what
    was lost. The exit code is 0 only if nothing was, and else 1; that of --run and --shell is the
    command's.

    \b
    Example:
      upgrader demo
      upgrader demo --connections 5000 --systemd trixie
      upgrader demo --run 'upgrader upgrade web.service'
    """
    from upgrader import demo as demonstration

    if shell + as_json + (command is not None) > 1:
        raise click.UsageError("--run, --shell and --json exclude each other")
    try:
        chosen = demonstration.Options(**options)
    except demonstration.OptionError as error:
        raise click.UsageError(str(error)) from error
    if command is not None:
        return demonstration.run_inside(chosen, command, _say)
    if shell:
        return demonstration.shell(chosen, _say)
    report = demonstration.run(chosen, _say)
    _print(report.json().decode() if as_json else report.table())
    return ExitCode.FAILED if report.lost else ExitCode.DONE


def _finish(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        _print(outcome.json().decode())
    elif outcome.result is Result.DONE:
        _print(outcome.line)
    else:
        _say(outcome.line)
        if outcome.remedy:
            for line in outcome.remedy.splitlines():
                _say(f"  {line}")
    raise click.exceptions.Exit(outcome.exit_code)


def _progress(quiet: bool) -> Progress:
    return (lambda text: None) if quiet else _say


def _say(text: str) -> None:
    """One line to standard error; a terminal that has gone must not stop an upgrade half-way."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _print(text: str) -> None:
    """To standard output; a reader that has gone changes nothing of the exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Else the interpreter would try to flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind, so that everything temporary is removed."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup(1) has it ignored
            before[number] = signal.signal(number, unwind)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; no exception gets out, except SystemExit."""
    try:
        with _signals():
            code = cli.main(arguments, prog_name="upgrader", standalone_mode=False)
    except click.ClickException as error:
        with contextlib.suppress(OSError):
            error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted; a job that systemd has been given goes on: systemctl list-jobs")
        return ExitCode.INTERRUPTED
    except UpgradeError as error:
        _say(f"upgrader: {error}")
        return ExitCode.FAILED
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        _say(
            f"upgrader: unexpected {type(error).__name__}: {error}"
            f" (this is a bug; {DEBUG}=1 in the environment shows the traceback)"
        )
        return ExitCode.NOT_SERVING
    return int(code or 0)
