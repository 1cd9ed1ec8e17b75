# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who goes first while a new version starts: what serves. Where the kernel cannot tell, all go alike.

By the weight of a session among all others (sched(7), "The autogroup feature"): unlike a nice value
it can be taken back without privileges, and system call filters know nothing of it. It can be changed
too seldom for what follows a commit: there, whatever can wait does.
"""

from __future__ import annotations

import time

#: Seconds after which a process that gives way should have come far enough: on a machine that is
#: busy with something else it would hardly run.
COURTESY = 0.15
#: Seconds after a commit that are for the clients who have waited for it: what nobody waits for comes then.
FIRST_CLIENTS = 0.008
#: Seconds between two changes on one machine without privileges.
_PAUSE = 0.1


def give_way() -> None:
    """Have all other sessions go first; for a process that leads one of its own."""
    _set(19)


def claim() -> None:
    """Go alike again, at once or as soon as the kernel lets it."""
    if not _set(0):
        import threading  # seldom needed, and too much for takeover

        name = "upgrader-precedence"
        threading.Thread(target=_claim_in_time, name=name, daemon=True).start()


def _claim_in_time() -> None:
    """Others set theirs as well, and whoever gave up now would serve in last place for ever."""
    while not _set(0):
        time.sleep(_PAUSE)


class Courtesy:
    """What a new process of the same user shows to all others, until it should have come far enough."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        #: Seconds until `end` is due; None once it goes alike again.
        self.left: float | None = COURTESY

    def end(self) -> None:
        """Have it go alike again, or try that once more a little later."""
        self.left = None if _set(0, self._pid) else _PAUSE


def _set(nice: int, pid: int | str = "self") -> bool:
    """False if another one was set too short a time ago."""
    try:
        with open(f"/proc/{pid}/autogroup", "w", encoding="utf-8") as file:
            file.write(str(nice))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
