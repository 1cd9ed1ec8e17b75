# SPDX-License-Identifier: LGPL-2.1-or-later
"""Errors of a private systemd; those of an upgrade are in `upgrader.errors`."""

from collections.abc import Sequence

from upgrader.errors import UpgradeError

# The last lines say what went wrong; more than these nobody reads.
TAIL_LINES = 25


def tail(text: str, lines: int = TAIL_LINES) -> str:
    """Return the last `lines` lines of `text` that are not blank."""
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-lines:])


class PrivateSystemdError(UpgradeError):
    """A private systemd could not do what it was asked for.

    `message` says what went wrong, `remedy` what to do next, `detail` is the end of what the
    failing program wrote (may be empty).
    """

    def __init__(self, message: str, *, remedy: str = "", detail: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.detail = tail(detail)

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.detail}" if self.detail else super().__str__()


class BootError(PrivateSystemdError):
    """The systemd did not come up; `detail` is the end of its console."""


class TreeError(PrivateSystemdError):
    """A root tree is missing, incomplete, or cannot be made on this machine."""


class CommandError(PrivateSystemdError):
    """A command inside failed (`status` is its exit code) or took too long (`status` is None)."""

    def __init__(
        self, command: Sequence[str], status: int | None, stdout: str, stderr: str
    ) -> None:
        what = "took too long and was killed" if status is None else f"exited with status {status}"
        super().__init__(
            f"`{' '.join(command)}` {what}",
            remedy="`machine.journal()` shows what the services inside said",
            detail=stderr if stderr.strip() else stdout,
        )
        self.command = tuple(command)
        self.status = status
        self.stdout = stdout
        self.stderr = stderr
