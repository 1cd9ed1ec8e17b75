# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands `upgrade`, `restart`, `hold`, `unhold` and `discard`."""

import functools
import os
import shlex
from collections.abc import Sequence

import click

from upgrader.cli.group import cli
from upgrader.cli.options import (
    assigned,
    complete_parameters,
    complete_units,
    json_option,
    quiet_option,
    timeout_option,
    unit_argument,
    user_option,
)
from upgrader.cli.output import finish, give_up, progress_to, report_json, say, tell
from upgrader.protocol.parameters import Mode
from upgrader.tool.outcome import ExitCode, Result, Verb
from upgrader.tool.unit_errors import UnitError


@cli.command(short_help="Upgrade units to the version now on disk.")
@click.argument("units", metavar="[UNIT...]", nargs=-1, shell_complete=complete_units)
@click.option("--all", "everything", is_flag=True, help="Upgrade all units that use upgrader.")
@click.option(
    "--if-changed",
    is_flag=True,
    help="Do nothing if nothing has changed since the service was started: files of the program, its"
    " unit, its environment files.",
)
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in Mode]),
    help="live: the new instance starts beside the old one, and takes over when it is ready;"
    " clients see a pause of milliseconds, and a version that fails changes nothing."
    " restart: the old instance stops, systemd holds its sockets, connections and state, and"
    " the new instance takes them over; clients see a pause as long as stop and start."
    " exec: the process becomes the new version and keeps its PID, for services that may not fork;"
    " it keeps its environment and its sandbox as well, whatever the unit says now."
    " auto: live, or restart if live is impossible; the reason is then shown."
    " Default: the parameter mode of the unit, which is auto unless it was set.",
)
@click.option(
    "--exec-command",
    metavar="COMMAND",
    help="With --mode exec: the program and its arguments, quoted as for a shell. Default:"
    " ExecStart= of the unit.",
)
@click.option(
    "--wait",
    is_flag=True,
    help="Follow an upgrade that is already under way; without this option, one under way is an error.",
)
@click.option(
    "--set",
    "assignments",
    metavar="NAME=VALUE",
    multiple=True,
    shell_complete=complete_parameters,
    help="Set a parameter for this upgrade only, as `upgrader set` does; can be repeated.",
)
@click.option(
    "--preflight/--no-preflight",
    default=None,
    help="First start the version on disk beside the running one, have it load and check everything,"
    " and end it; if that fails, nothing is upgraded. Needs a unit that can be upgraded live. The"
    " default is what the service wants: virtual machines do.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@timeout_option
@json_option
@quiet_option
@user_option
def upgrade(
    units: Sequence[str],
    everything: bool,
    if_changed: bool,
    mode: str | None,
    exec_command: str | None,
    wait: bool,
    assignments: Sequence[str],
    preflight: bool | None,
    dry_run: bool,
    timeout: float | None,
    as_json: bool,
    quiet: bool,
    user: bool,
) -> None:
    """Upgrade each UNIT to the version now on disk, and say how it went.

    Install the new version first. The upgrade succeeds if the new instance is ready and has loaded
    everything that the old one held. If it fails, the message names the cause, says whether the
    service serves now, and what to do. A changed unit file is read first.

    If the new version was at fault, a hold stays on the unit: package hooks leave it alone until
    another version is on disk, because a restart would start the bad one.

    If a new version does not start in restart mode, systemd keeps what the old instance held until a
    good version is back and started. This needs systemd 254 or later, and
    FileDescriptorStorePreserve=yes in the unit. Without them it is kept only while systemd restarts
    the service by itself (Restart= in the unit).

    A user who is not root needs polkit's leave for the unit, and gets a restart only by --mode
    restart. If nothing has changed, nothing is done then, as with --if-changed.

    Several units are upgraded one after the other until one fails. A pattern such as 'web@*' stands
    for those that match, serve and use upgrader. With --json the result is then a list.

    \b
    Example:
      upgrader upgrade web.service
      upgrader upgrade 'web@*' --dry-run
      upgrader upgrade --all --if-changed
      upgrader upgrade web --mode restart --timeout 30s --json
    """
    from upgrader.systemd.process_start import process_started
    from upgrader.tool.set_and_cancel import for_one_call
    from upgrader.tool.upgrade import Wish, expand
    from upgrader.tool.upgrade import upgrade as run

    values = assigned(assignments)
    if exec_command is not None and mode != Mode.EXEC:
        raise click.UsageError("--exec-command works with --mode exec only")
    try:
        command = shlex.split(exec_command or "")
    except ValueError as error:
        raise click.UsageError(f"--exec-command: {error}") from error
    if everything == bool(units):
        wrong = "--all stands for all units: name none" if units else "name a unit, or give --all"
        raise click.UsageError(wrong)
    try:
        names = expand(units, everything=everything, user=user)
    except UnitError as error:
        give_up(Verb.UPGRADE, error.unit, error, as_json)
    wish = Wish(
        Mode(mode) if mode else None,
        command,
        wait=wait,
        preflight=preflight,
        if_changed=if_changed,
        dry_run=dry_run,
        timeout=timeout,
        # An upgrade that began while this command was starting up counts as this one.
        asked=process_started(os.getpid()),
    )
    outcomes = []
    for name in names:
        work = functools.partial(run, name, wish, user=user, progress=progress_to(quiet))
        once = values and not dry_run
        outcome = for_one_call(name, values, work, user=user) if once else work()
        outcomes.append(outcome)
        if not as_json:
            tell(outcome)
        if outcome.result is not Result.DONE:
            break
    if as_json and names == tuple(units) and len(units) == 1:
        report_json(outcomes[0].json())
    elif as_json:
        report_json(each.json() for each in outcomes)
    elif left := names[len(outcomes) :]:
        say(f"not begun: {', '.join(left)}")
    elif not names:
        say("no unit in memory uses upgrader; nothing to do")
    raise click.exceptions.Exit(outcomes[-1].exit_code if outcomes else ExitCode.DONE)


@cli.command(short_help="Restart a unit.")
@unit_argument
@click.option("--cold", is_flag=True, help="Drop connections and state, as in a first start.")
@timeout_option
@json_option
@quiet_option
@user_option
def restart(
    unit: str, cold: bool, timeout: float | None, as_json: bool, quiet: bool, user: bool
) -> None:
    """Restart UNIT, and say how it went.

    Without --cold this is `upgrade --mode restart`: nothing is lost, but for datagrams that do not
    fit into the receive buffer meanwhile; they are counted.

    With --cold, listening sockets are kept; connections and state are not. Use it if the saved state
    is the problem. The image that the old instance leaves is set aside in the unit's FD store.

    \b
    Example:
      upgrader restart --cold web.service
    """
    from upgrader.tool.cold_start import restart_cold
    from upgrader.tool.upgrade import Wish
    from upgrader.tool.upgrade import upgrade as run

    progress = progress_to(quiet)
    if cold:
        finish(restart_cold(unit, timeout=timeout, user=user, progress=progress), as_json)
    wish = Wish(Mode.RESTART, timeout=timeout)
    finish(run(unit, wish, user=user, progress=progress), as_json)


@cli.command("hold", short_help="Have a unit left alone until its hold is lifted.")
@unit_argument
@click.option(
    "--why", metavar="TEXT", required=True, help="The reason; it is shown to all who ask."
)
@json_option
@user_option
def hold_(unit: str, why: str, as_json: bool, user: bool) -> None:
    """Put UNIT on hold: no hook and no `upgrader upgrade` changes it until `upgrader unhold`.

    For a change freeze, say. systemctl does not know of holds, and obeys none.

    \b
    Example:
      upgrader hold web.service --why 'no changes before the fair'
    """
    from upgrader.tool.hold_and_release import put

    if not why.strip():
        raise click.UsageError("--why: say why, for whoever comes next")
    finish(put(unit, why, user=user), as_json)


@cli.command(short_help="Lift the hold on a unit.")
@unit_argument
@json_option
@user_option
def unhold(unit: str, as_json: bool, user: bool) -> None:
    """Lift the hold on UNIT, so that package hooks and needrestart upgrade it again.

    A failed upgrade leaves a hold, which is over as soon as another version is on disk, or a newer
    instance serves. Run this command if you know that the version on disk is good after all, or to
    end a hold of `upgrader hold`, which lasts until then.

    \b
    Example:
      upgrader unhold web.service
    """
    from upgrader.tool.hold_and_release import release

    finish(release(unit, user=user), as_json)


@cli.command(short_help="Start a unit without its parked image.")
@unit_argument
@timeout_option
@json_option
@quiet_option
@user_option
def discard(unit: str, timeout: float | None, as_json: bool, quiet: bool, user: bool) -> None:
    """Start UNIT without the image that is parked for it.

    Use it if the service does not start because no version at hand can load what the last instance
    parked. Listening sockets are kept; connections and state are not. The image is set aside in the
    unit's FD store. If the service serves, there is no parked image, and nothing is done.

    \b
    Example:
      upgrader discard web.service
    """
    from upgrader.tool.cold_start import discard as run

    finish(run(unit, timeout=timeout, user=user, progress=progress_to(quiet)), as_json)
