# SPDX-License-Identifier: LGPL-2.1-or-later
"""A side that cannot perform all that its table names, for `mypy --strict`; never run."""

from upgrader.instance.live_destination import LiveDestination
from upgrader.instance.live_source import LiveSource
from upgrader.protocol import interpreter
from upgrader.protocol.switchover import Event


class LoadsOnly:
    def send_go(self) -> Event | None: ...
    def load(self) -> Event | None: ...


class Silent(LoadsOnly):
    """All of them, but one finds out what is no event."""

    def send_ack(self) -> bool:
        return True

    def send_abort(self) -> Event | None: ...
    def serve(self) -> Event | None: ...
    def exit(self) -> Event | None: ...


def sides(live_source: LiveSource, live_destination: LiveDestination) -> None:
    interpreter.source(live_source)
    interpreter.destination(live_destination)
    interpreter.source(live_destination)  # type: ignore[arg-type]
    interpreter.destination(LoadsOnly())  # type: ignore[arg-type]
    interpreter.destination(Silent())  # type: ignore[arg-type]
