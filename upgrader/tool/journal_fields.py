# SPDX-License-Identifier: LGPL-2.1-or-later
"""Say which senders of journal entries are believed, and what a field can mean.

Any process may write any field. Only what begins with an underscore is journald's own, as it knows the
sender (systemd.journal-fields(7)).
"""

import contextlib
import json
import os
import pwd
from typing import Any

from upgrader.systemd.unit import UNSET_ID, Unit

#: Digits of the largest whole number taken: microseconds of our time have 16. Seconds are taken up to
#: 10 to that power, too.
_DIGITS = 18


def of_unit(unit: Unit, user: bool) -> list[str]:
    """The matches for what processes of a unit have written; `user`: of a user's service manager."""
    if user:
        return [f"_SYSTEMD_USER_UNIT={unit.id}", f"_UID={os.geteuid()}"]
    return [f"_SYSTEMD_UNIT={unit.id}"]


def of_owners(unit: Unit, user: bool) -> list[str]:
    """The matches for what root and the users of a service have written.

    journald looks up the unit of a sender when it gets to the entry, and by then it may have ended.
    """
    owners = {0}
    if user:
        owners.add(os.geteuid())
    elif unit.uid != UNSET_ID:
        owners.add(unit.uid)
    elif unit.user:  # it does not run
        with contextlib.suppress(KeyError):
            owners.add(pwd.getpwnam(unit.user).pw_uid)
    return [f"_UID={uid}" for uid in sorted(owners)]


def namespaces(unit: Unit) -> list[str]:
    """The option with which journalctl reads where a unit logs to (LogNamespace=), besides PID 1."""
    return [f"--namespace=+{unit.log_namespace}"] if unit.log_namespace else []


def of_line(line: str) -> dict[str, str]:
    """The fields of an entry as `journalctl -o json` prints it; none of a line that is no entry."""
    with contextlib.suppress(ValueError, RecursionError):
        raw = json.loads(line)
        if isinstance(raw, dict):
            return {name: _text(value) for name, value in raw.items()}
    return {}


def whole(text: str) -> int:
    """A number of at most 18 ASCII digits; raises ValueError for any other text."""
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS):
        raise ValueError(f"{text[:_DIGITS]!r} is no number of at most {_DIGITS} digits")
    return int(text)


def whole_or(text: str, default: int) -> int:
    """The number that a field is, or `default`."""
    with contextlib.suppress(ValueError):
        return whole(text)
    return default


def seconds(text: str) -> float:
    """A span of time; raises ValueError for what is none, or has no end."""
    found = float(text)
    if not 0 <= found <= 10**_DIGITS:
        raise ValueError(f"{text[:_DIGITS]!r} is no span of time")
    return found


def _text(value: Any) -> str:
    # journalctl gives what is no UTF-8 as a list of bytes, and a repeated field as a list of texts.
    if isinstance(value, list):
        if all(isinstance(item, int) and 0 <= item < 256 for item in value):
            return bytes(value).decode(errors="replace")
        return _text(value[-1]) if value else ""
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""
