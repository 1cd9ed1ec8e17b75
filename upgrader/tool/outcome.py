# SPDX-License-Identifier: LGPL-2.1-or-later
"""What became of one request, as a value, a line for people and an exit code."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Self

import msgspec

from upgrader.codes import Code
from upgrader.protocol.parameters import Mode
from upgrader.protocol.phase import Phase
from upgrader.protocol.status_text import Status
from upgrader.protocol.varlink_types import Migration
from upgrader.tool.unit_errors import (
    AccessDenied,
    BusUnreachable,
    InvalidUnitName,
    JobConflict,
    MissingPackage,
    NoMatchingUnit,
    NoSuchUnit,
    UnitError,
)

#: Where to say how it goes, one line at a time.
Tell = Callable[[str], None]


class ExitCode(IntEnum):
    """The same on every verb; 1 and 3 are never mixed, for what counts is whether it serves."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_SERVING = 3
    NOTHING_DONE = 4
    UNDECIDED = 5
    BUSY = 75  # EX_TEMPFAIL of sysexits.h
    NO_PERMISSION = 77  # EX_NOPERM
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        """In words, for the help text and the manual page."""
        return _MEANING[self]


_MEANING = {
    ExitCode.DONE: "done",
    ExitCode.FAILED: "failed, and the service serves: nothing was done, or its state is missing",
    ExitCode.USAGE: "wrong usage, nothing was done",
    ExitCode.NOT_SERVING: "the service does not serve, or this cannot be told",
    ExitCode.NOTHING_DONE: "nothing was done: no such unit, on hold, or systemd out of reach",
    ExitCode.UNDECIDED: "the service serves, and what became of the upgrade cannot be told (yet)",
    ExitCode.BUSY: "nothing was done: another job is in the way; try again later",
    ExitCode.NO_PERMISSION: "nothing was done: this user may not do it",
    ExitCode.INTERRUPTED: "interrupted (Ctrl-C)",
}


class Result(StrEnum):
    """How it ended."""

    DONE = "done"
    OLD_SERVES = "failed-old-serves"  #: the instance that served before serves on
    WITHOUT_IMAGE = "started-without-image"  #: a new instance serves, its state is missing
    NOT_SERVING = "not-serving"
    UNDECIDED = "undecided"  #: it serves; who won, neither PID 1 nor an instance says, or not yet
    UNKNOWN = "unknown"  #: the connection to PID 1 was lost on the way
    NO_SUCH_UNIT = "no-such-unit"
    NO_PERMISSION = "no-permission"
    UNREACHABLE = "systemd-unreachable"
    OUTDATED = "needs-daemon-reload"  #: this user may not have its changed unit file read
    HELD = "held"  #: an admin wants no upgrade of it
    BUSY = "busy"
    USAGE = "usage"


_EXIT_CODES = {
    Result.DONE: ExitCode.DONE,
    Result.OLD_SERVES: ExitCode.FAILED,
    Result.WITHOUT_IMAGE: ExitCode.FAILED,
    Result.NOT_SERVING: ExitCode.NOT_SERVING,
    Result.UNDECIDED: ExitCode.UNDECIDED,
    Result.UNKNOWN: ExitCode.NOT_SERVING,
    Result.NO_SUCH_UNIT: ExitCode.NOTHING_DONE,
    Result.NO_PERMISSION: ExitCode.NO_PERMISSION,
    Result.OUTDATED: ExitCode.NOTHING_DONE,
    Result.UNREACHABLE: ExitCode.NOTHING_DONE,
    Result.HELD: ExitCode.NOTHING_DONE,
    Result.BUSY: ExitCode.BUSY,
    Result.USAGE: ExitCode.USAGE,
}
#: Of an attempt that was made, which instance serves is not as it was before.
_CHANGED = (Result.WITHOUT_IMAGE, Result.NOT_SERVING)
_STANDS = {
    Result.OLD_SERVES: "it serves as before",
    Result.WITHOUT_IMAGE: "serving, but started without the image",
    Result.NOT_SERVING: "NOT SERVING",
    Result.UNDECIDED: "NOT KNOWN WHETHER IT WILL BE",
    Result.UNKNOWN: "NOT KNOWN WHETHER IT SERVES",
}


class Verb(StrEnum):
    """What was asked for."""

    UPGRADE = "upgrade"
    RESTART = "restart"
    DISCARD = "discard"
    HOLD = "hold"
    UNHOLD = "unhold"
    LIST = "list"
    STATUS = "status"
    SET = "set"
    CANCEL = "cancel"
    CHECK = "check"
    ADOPT = "adopt"
    HISTORY = "history"
    DUMP = "dump"


_FAILED = {
    Verb.RESTART: "not restarted",
    Verb.UPGRADE: "not upgraded",
    Verb.DISCARD: "nothing discarded",
    Verb.HOLD: "no hold was put on it",
    Verb.UNHOLD: "the hold stays",
    Verb.LIST: "nothing shown",
    Verb.STATUS: "nothing shown",
    Verb.SET: "nothing set",
    Verb.CANCEL: "nothing cancelled",
    Verb.CHECK: "not checked",
    Verb.ADOPT: "not adopted",
    Verb.HISTORY: "nothing shown",
    Verb.DUMP: "nothing shown",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request and what became of it; made by `done`, `failed` or `of_error`.

    `mode` is the one that was used, None if none was; `upgrade` is the id. `bad_version`: it
    failed because of the version on disk, so nothing should start that one; `code` says why, where
    the instances know. `retries`: nobody serves, and systemd goes on trying to start it
    (`Restart=`). `changed`: another instance serves than before, or none, or would, where that was
    all that was asked.

    `before` and `after` are what the instances say of themselves; `text` completes the line of a
    success, `cause` and `remedy` that of a failure. `seconds` is the whole request; `pause_seconds`
    is how long nobody served, as the new instance says; if it has loaded nothing, from the begin of
    the stop to READY=1, by PID 1's timestamps. `times`: where the time of a live
    upgrade went, seconds by part (see `course`).
    """

    verb: Verb
    unit: str
    result: Result
    mode: Mode | None = None
    upgrade: str = ""
    text: str = ""
    cause: str = ""
    remedy: str = ""
    code: Code | None = None
    bad_version: bool = False
    retries: bool = False
    warnings: tuple[str, ...] = ()
    before: Status | None = None
    after: Status | None = None
    seconds: float = 0.0
    pause_seconds: float | None = None
    times: dict[str, float] = field(default_factory=dict)
    systemd: str = ""
    changed: bool = False

    @classmethod
    def done(
        cls,
        verb: Verb,
        unit: str,
        text: str,
        *,
        mode: Mode | None = None,
        upgrade: str = "",
        warnings: tuple[str, ...] = (),
        before: Status | None = None,
        after: Status | None = None,
        pause_seconds: float | None = None,
        changed: bool = False,
    ) -> Self:
        """What was asked for is done."""
        return cls(
            verb, unit, Result.DONE, mode=mode, upgrade=upgrade, text=text, warnings=warnings,
            before=before, after=after, pause_seconds=pause_seconds, changed=changed,
        )  # fmt: skip

    @classmethod
    def failed(
        cls,
        verb: Verb,
        unit: str,
        result: Result,
        cause: str,
        remedy: str = "",
        *,
        mode: Mode | None = None,
        upgrade: str = "",
        code: Code | None = None,
        bad_version: bool = False,
        retries: bool = False,
        warnings: tuple[str, ...] = (),
        before: Status | None = None,
        after: Status | None = None,
        pause_seconds: float | None = None,
    ) -> Self:
        """It is not done; `result` says how the unit stands now. Raises ValueError for a success."""
        if result is Result.DONE:
            raise ValueError("a failure is not done")
        return cls(
            verb, unit, result, mode=mode, upgrade=upgrade, cause=cause, remedy=remedy, code=code,
            bad_version=bad_version, retries=retries, warnings=warnings, before=before,
            after=after, pause_seconds=pause_seconds, changed=mode is not None and result in _CHANGED,
        )  # fmt: skip

    @classmethod
    def of_error(
        cls, verb: Verb, unit: str, error: UnitError, result: Result | None = None
    ) -> Self:
        """The outcome of an error; without `result` it is one from before anything was done."""
        if result is None:
            result = next(
                (value for kind, value in _RESULTS.items() if isinstance(error, kind)),
                Result.OLD_SERVES,
            )
        return cls.failed(verb, error.unit or unit, result, error.message, error.remedy)

    @property
    def exit_code(self) -> ExitCode:
        """What the command ends with."""
        return _EXIT_CODES[self.result]

    @property
    def line(self) -> str:
        """What happened, in one line."""
        unit = f"{self.unit}: " if self.unit else ""
        if self.result is Result.DONE:
            return f"{unit}{self.text}"
        stands = f", {_STANDS[self.result]}" if self.result in _STANDS else ""
        again = ", systemd tries again" if self.retries else ""
        return f"{unit}{_FAILED[self.verb]}{stands}{again}: {self.cause}"

    def json(self) -> bytes:
        """One object: the fields, and `line`, `exit_code` and `serves`."""
        values = msgspec.to_builtins(self, enc_hook=vars)  # of a `Value`, its fields
        del values["text"]
        return msgspec.json.encode(
            {**values, "line": self.line, "exit_code": int(self.exit_code), "serves": self.serves}
        )

    def as_migration(self) -> Migration:
        """The upgrade that it is the outcome of, as this tool knows it; it ends now."""
        done = self.result is Result.DONE
        return Migration(
            Phase.DONE if done else Phase.FAILED,
            mode=self.mode or "",
            source=self.before.generation if self.before else 0,
            destination=self.after.generation if self.after and done else 0,
            began=round(time.time() - self.seconds, 3),
            seconds=self.seconds,
            pause=self.pause_seconds or 0.0,
            fds=self.after.fds if self.after else 0,
            bytes=self.after.state_bytes if self.after else 0,
            left_behind=self.after.left_behind if self.after else 0,
            reason=self.cause,
        )

    @property
    def serves(self) -> bool | None:
        """Whether the unit serves now; None where nobody looked."""
        match self.result:
            case Result.DONE | Result.OLD_SERVES | Result.WITHOUT_IMAGE | Result.UNDECIDED:
                return True
            case Result.NOT_SERVING:
                return False
            case _:
                return None


_RESULTS: dict[type[UnitError], Result] = {
    NoSuchUnit: Result.NO_SUCH_UNIT,
    NoMatchingUnit: Result.NO_SUCH_UNIT,
    AccessDenied: Result.NO_PERMISSION,
    BusUnreachable: Result.UNREACHABLE,
    JobConflict: Result.BUSY,
    InvalidUnitName: Result.USAGE,
    MissingPackage: Result.UNREACHABLE,
}
