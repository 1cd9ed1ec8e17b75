# SPDX-License-Identifier: LGPL-2.1-or-later
"""Judge from what PID 1 says of a unit what stands in the way of an upgrade."""

from collections.abc import Iterator
from dataclasses import dataclass

from upgrader.protocol.systemd_syntax import boolean
from upgrader.protocol.wording import show_duration
from upgrader.systemd.fdstore import Stored, StoreName
from upgrader.systemd.unit import FdStoreContents, Unit
from upgrader.tool.journal_fields import whole_or
from upgrader.tool.presence import Presence
from upgrader.tool.systemd_client import Systemd

#: First release with FileDescriptorStorePreserve=.
_PRESERVE = 254


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a unit cannot be upgraded as it is, and what to do about it; `setting` is the line for
    [Service] that would do, if one would."""

    cause: str
    remedy: str
    setting: str = ""


def not_running(systemd: Systemd, unit: Unit) -> Obstacle | None:
    """The obstacle that there is no instance to upgrade."""
    if unit.serves and unit.load_state == "not-found":
        return Obstacle(
            "its unit file is gone, so systemd could not start it again",
            f"put the file back, then: systemctl daemon-reload; or: systemctl stop {unit.id}",
        )
    if unit.serves:
        return None
    if unit.load_state != "loaded":
        reason = f": {unit.load_error}" if unit.load_error else ""
        return Obstacle(
            f"the unit is {unit.load_state}{reason}", f"see: systemctl status {unit.id}"
        )
    parked = parked_image(systemd.fd_store(unit))
    kept = f"; it loads the parked image{of_generation(parked)}" if parked is not None else ""
    if unit.retries:
        return Obstacle(
            "it is not running: systemd is between two attempts to start it",
            f"put a good version in place, then: systemctl restart {unit.id}{kept}",
        )
    state = f"failed: {unit.result}" if unit.active_state == "failed" else unit.active_state
    if unit.active_state == "failed" and systemd.release < _PRESERVE:
        kept = f"; systemd {systemd.release} keeps nothing for a unit that has failed"
    return Obstacle(
        f"it is not running ({state})",
        f"start it: systemctl start {unit.id}{kept}",
    )


def not_ours(unit: Unit, found: Presence) -> Obstacle | None:
    """The obstacle that the running instance does not use the library."""
    if found.ours:
        return None
    says = f" ({found.error.message})" if found.error else ""
    return Obstacle(
        f"it does not use upgrader{says}",
        f"if its program shall be upgraded live as it is, see: upgrader adopt {unit.id}; for a plain"
        f" restart, which drops connections and state: systemctl restart {unit.id}",
    )


def settings(unit: Unit) -> Obstacle | None:
    """A setting of the unit that would lose the image."""
    return next(all_settings(unit), None)


def all_settings(unit: Unit) -> Iterator[Obstacle]:
    """All settings of the unit that would lose the image."""

    def change(found: str, effect: str, wanted: str) -> Obstacle:
        return Obstacle(
            f"{found} in the unit: {effect}",
            f"systemctl edit {unit.id}, and below [Service] write {wanted}",
            wanted,
        )

    if unit.type not in ("notify", "notify-reload"):
        yield change(f"Type={unit.type}", "systemd does not wait for READY=1", "Type=notify")
    if unit.fd_store_max == 0:
        yield change(
            "FileDescriptorStoreMax=0",
            "systemd would keep nothing over a restart",
            "FileDescriptorStoreMax=64",
        )
    elif unit.stored_fds >= unit.fd_store_max:
        yield change(
            f"FileDescriptorStoreMax={unit.fd_store_max}",
            "the FD store is full, and systemd drops more without a word",
            f"FileDescriptorStoreMax={max(64, 2 * unit.fd_store_max)}",
        )
    if unit.notify_access == "none":
        yield change("NotifyAccess=none", "systemd ignores what it says", "NotifyAccess=exec")
    if unit.fd_store_preserve == "no":
        yield change(
            "FileDescriptorStorePreserve=no",
            "systemd would throw the image away",
            "FileDescriptorStorePreserve=yes",
        )
    for setting in unit.environment:
        name, _, value = setting.partition("=")
        if name == "UPGRADER_DISCARD" or (name == "UPGRADER" and is_off(value)):
            yield Obstacle(
                f"Environment={setting} in the unit: it would start without the image",
                f"remove it (systemctl cat {unit.id} shows where), then: systemctl daemon-reload",
            )


def is_off(value: str) -> bool:
    """Whether UPGRADER= has this value as a kill switch."""
    try:
        return not boolean(value)
    except ValueError:
        return False


def kept_only_while(systemd: Systemd, unit: Unit) -> tuple[str, ...]:
    """What would be lost if the new version does not start; no obstacle."""
    if unit.fd_store_preserve == "yes":
        return ()
    why = (
        f"systemd {systemd.release} is older than {_PRESERVE}"
        if systemd.release < _PRESERVE
        else f"FileDescriptorStorePreserve={unit.fd_store_preserve}"
    )
    if unit.restart == "no":
        return (f"a new version that does not start loses the image at once ({why}, Restart=no)",)
    return (f"after a failed start the image is kept only while automatic restarts go on ({why})",)


def parked_image(store: FdStoreContents, others: int = 0) -> int | None:
    """The generation of the newest parked image, or None if there is none.

    Before systemd 254 names cannot be read: 0, if there are more FDs than the `others` known.
    """
    if store.names is None:
        return 0 if store.count > others else None
    found = [StoreName.parse(name) for name in store.names]
    parked = [whole_or(n.item, 0) for n in found if n and n.what in _PARKED]
    return max(parked, default=None)


def what_to_do(systemd: Systemd, unit: Unit, others: int = 0) -> str:
    """The way back after a failed start: where the image is, and how it is loaded or dropped.

    `others` counts the FDs that were stored while the unit served.
    """
    parked = parked_image(systemd.fd_store(unit), others)
    again = f"{tries_again(unit)}\n" if unit.retries else ""
    if parked is None:
        return (
            f"{again}the image is lost; put a good version in place, and start it cold:"
            f" systemctl restart {unit.id}"
        )
    kept = f"the image{of_generation(parked)} is kept"
    discard = f"to start without the image: upgrader discard {unit.id}"
    if unit.retries:
        if kept_only_while(systemd, unit):
            kept += " only while systemd goes on trying"
        return (
            f"{again}{kept}; put a good version in place, and the next attempt loads it\n"
            f"to try at once: systemctl restart {unit.id}\n{discard}"
        )
    soon = ""
    if unit.active_state == "failed" and unit.restart != "no":  # so it met the start limit
        soon = f", at least {unit.start_limit_usec / 1e6:g}s after the last attempt"
    return f"{kept}; put a good version in place, then{soon}: systemctl start {unit.id}\n{discard}"


def tries_again(unit: Unit) -> str:
    """What a unit does that PID 1 starts again by itself, and where to see whether it serves."""
    span = show_duration(unit.restart_usec / 1e6)
    return f"systemd tries again after {span}; whether it serves by now: upgrader status {unit.id}"


_PARKED = (Stored.CHANNEL, Stored.IMAGE)


def of_generation(generation: int) -> str:
    """Which generation, where PID 1 can name it."""
    return f" of generation {generation}" if generation else ""
