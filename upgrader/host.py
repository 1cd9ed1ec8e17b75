# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the control socket needs to know of an instance: two protocols, and no code."""

import socket
from collections.abc import Mapping, Sequence
from typing import Protocol

from upgrader.backends import Waiting
from upgrader.declarations import Declarations
from upgrader.description import Refusal, Standing, Trial
from upgrader.parameters import Parameters
from upgrader.progress import Progress
from upgrader.systemd.settings import Settings


class Open(Protocol):
    """An open connection, of this library or of another one."""

    @property
    def sock(self) -> socket.socket:
        """Its socket."""

    @property
    def since(self) -> float:
        """When it was opened here, as of `time.monotonic`."""

    @property
    def waiting(self) -> Waiting | None:
        """Its safe point; None while it is busy."""

    @property
    def what(self) -> str:
        """What it is at, where that is known."""


class Host(Protocol):
    """The instance that is asked."""

    service: str
    version: str
    unit: str
    generation: int
    since: float
    standing: Standing
    declarations: Declarations
    parameters: Parameters
    progress: Progress
    settings: Settings
    refusal: Refusal

    @property
    def overrides(self) -> Mapping[str, str]:
        """The parameters that were set since it was started, and before by instances it follows."""

    def override(self, parameters: Mapping[str, str]) -> None:
        """Set parameters; raises ParameterError, and sets none then."""

    def try_states(self) -> Sequence[Trial]:
        """Find out which states can be saved now; called from any thread."""

    def refused(self, why: str, refusal: Refusal | None) -> None:
        """Show why a newer version has not taken over; `refusal` if that was its own fault."""

    def connections_open(self) -> Sequence[tuple[str, Open]]:
        """All open connections with their backend; called from any thread."""
