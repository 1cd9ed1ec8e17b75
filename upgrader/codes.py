# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why an upgrade ended as it did, as one word for programs; a text for people always goes with it."""

from __future__ import annotations

from enum import StrEnum


class Code(StrEnum):
    """What an outcome is decided by; it travels between processes as its value."""

    REFUSED = "refused"  #: the running instance does not allow it, or the two do not fit
    CANCELLED = "cancelled"  #: an operator has called it off
    PREFLIGHT_PASSED = "preflight-passed"  #: all was loaded and checked; more was not asked for
    VERIFY_FAILED = "verify-failed"  #: a check of the author's has raised
    STATE_INCOMPATIBLE = "state-incompatible"  #: the versions of a state cannot meet
    STATE_UNREADABLE = "state-unreadable"  #: a state does not decode
    BACKEND_UNDECLARED = (
        "backend-undeclared"  #: the image has what the new version does not declare
    )
    LOAD_FAILED = "load-failed"  #: the new version could not load, for another reason
    ENDED_EARLY = "ended-early"  #: the new process has ended before it was ready
    NOT_READY_IN_TIME = "not-ready-in-time"  #: the new process took too long
    LIMIT = "limit"  #: something forbids a live upgrade of this unit
    BUSY = "busy"  #: another upgrade is under way
    TAKEOVER_STOPPED = "takeover-stopped"  #: takeover was told to stop
    TAKEOVER_GONE = "takeover-gone"  #: takeover has ended, so nobody waited for the outcome
    BUSY_WORK = "busy-work"  #: work would have been cut in two, so nothing was moved
    SOURCE_FAILED = "source-failed"  #: the running instance could not freeze, save or send
    UNKNOWN = "unknown"  #: a word of a later version, or none at all

    @classmethod
    def _missing_(cls, value: object) -> Code:
        return cls.UNKNOWN

    @property
    def blames_version(self) -> bool:
        """Whether the new version is at fault: as it is, it will fail again."""
        return self in _OF_THE_VERSION

    @property
    def suspects_version(self) -> bool:
        """Whether the new version may be at fault: it is, or nobody has said why it was refused."""
        return self in _OF_THE_VERSION or self is Code.UNKNOWN


_OF_THE_VERSION = frozenset(
    {
        Code.VERIFY_FAILED,
        Code.STATE_INCOMPATIBLE,
        Code.STATE_UNREADABLE,
        Code.BACKEND_UNDECLARED,
        Code.LOAD_FAILED,
        Code.ENDED_EARLY,
        Code.NOT_READY_IN_TIME,
    }
)
