# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands that change what runs: `upgrade`, `discard`."""

import click

from upgrader.cli.group import cli
from upgrader.cli.options import json_option, quiet_option, timeout_option, unit_argument
from upgrader.cli.output import finish, progress_to
from upgrader.outcome import Mode


@cli.command(short_help="Upgrade a unit to the version now on disk.")
@unit_argument
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in Mode]),
    help="live: the new instance starts beside the old one, and takes over when it is ready;"
    " clients see a pause of milliseconds, and a version that fails changes nothing."
    " restart: the old instance stops, systemd holds its sockets, connections and state, and"
    " the new instance takes them over; clients see a pause as long as stop and start."
    " Default: live, or restart where something forbids live, which is then said.",
)
@click.option(
    "--wait", is_flag=True, help="Follow an upgrade that is under way, instead of being refused."
)
@timeout_option
@json_option
@quiet_option
def upgrade(
    unit: str, mode: str | None, wait: bool, timeout: float | None, as_json: bool, quiet: bool
) -> None:
    """Upgrade UNIT to the version now on disk, and say what became of it.

    Install the new version first. Success means that the new instance is ready and has loaded all
    that the old one held; anything else is a failure, and the message names the cause, says
    whether the service serves now, and what to do. A changed unit file is reloaded first.

    After a failed upgrade a hold is on the unit: package hooks leave it alone until an upgrade
    succeeds, because a restart would start the bad version.

    If a new version does not start in restart mode, what the old instance held is kept, and is
    loaded as soon as a good version is back and started. This needs systemd 254 or later, and
    FileDescriptorStorePreserve=yes in the unit. Without them it is kept only while systemd goes on
    restarting the service by itself (Restart= in the unit).

    \b
    Example:
      upgrader upgrade web.service
      upgrader upgrade web --mode restart --timeout 30s --json
    """
    from upgrader.upgrade import upgrade as run

    chosen = Mode(mode) if mode else None
    finish(run(unit, chosen, wait=wait, timeout=timeout, progress=progress_to(quiet)), as_json)


@cli.command(short_help="Start a unit without its parked image.")
@unit_argument
@timeout_option
@json_option
@quiet_option
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

    finish(run(unit, timeout=timeout, progress=progress_to(quiet)), as_json)
