# SPDX-License-Identifier: LGPL-2.1-or-later
"""A live upgrade of a service under test, from its beginning to its decision."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import upgrader
from upgrader.codes import Code
from upgrader.errors import UpgradeError
from upgrader.protocol.rendezvous import SOCKET
from upgrader.protocol.status_text import Origin, Status
from upgrader.protocol.varlink import INTERFACE
from upgrader.protocol.varlink_client import call

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upgrader.testing.service import Service

#: As ExecReload= runs it, with this library whatever is installed.
TAKEOVER = f"""
import sys
sys.path.insert(0, {str(Path(upgrader.__file__).parents[1])!r})
from upgrader.takeover.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


class ServiceError(UpgradeError):
    """The program did not become ready, did not end, or was not upgraded.

    `stderr` is what the newest process said, `code` (see `upgrader.codes`) is why a live upgrade
    failed.
    """

    def __init__(self, message: str, stderr: str, code: str = "") -> None:
        super().__init__(f"{message}:\n{stderr}" if stderr else message)
        self.stderr = stderr
        self.code = Code(code)


class LiveUpgrade:
    """A live upgrade under way: both versions run. Made by `Service.begin_live`."""

    def __init__(self, service: Service, generation: int, stderr: Path) -> None:
        self._service = service
        self._generation = generation
        self._stderr = stderr
        self._takeover: subprocess.Popen[bytes] | None = None

    def _begin(self, environment: Mapping[str, str]) -> int:
        """Start takeover, in the environment of a start; returns its PID."""
        with self._stderr.open("wb") as stderr:
            self._takeover = subprocess.Popen(
                [sys.executable, "-c", TAKEOVER], env=environment, stderr=stderr,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        return self._takeover.pid

    def wait(self) -> Status:
        """Wait for the decision; raises ServiceError with the reason if the old version serves on."""
        if self._end() != 0:
            raise self._refused()
        status = self._service._until(
            lambda status: status.generation > self._generation and status.origin is Origin.LIVE
        )
        if status is None:
            raise ServiceError("was not upgraded, only reloaded", self._said)
        return status

    def abort(self) -> None:
        """Call it off, as `systemctl stop` of the reload would; raises ServiceError if it was too
        late: the new version serves."""
        assert self._takeover is not None
        self._takeover.send_signal(signal.SIGTERM)
        if self._end() == 0:
            raise ServiceError("could not be called off any more", self._said)

    def _close(self) -> None:
        """End what is left of it."""
        if self._takeover and self._takeover.poll() is None:
            self._takeover.kill()
            self._takeover.wait()

    def _end(self) -> int:
        assert self._takeover is not None
        try:
            return self._takeover.wait(self._service.timeout)
        except subprocess.TimeoutExpired:
            self._close()
            raise ServiceError("takeover did not end", self._said) from None
        finally:
            self._service._over()

    @property
    def _said(self) -> str:
        return self._stderr.read_text(errors="replace")

    def _refused(self) -> ServiceError:
        """Why the source serves on, as it says itself."""
        told = describe(self._service)
        last: dict[str, Any] = told.get("last") or {}
        reason = last.get("reason") or told.get("migration", {}).get("reason")
        message = f"was not upgraded: {reason or 'takeover says why'}"
        return ServiceError(message, self._said, str(last.get("code", "")))


def describe(service: Service) -> dict[str, Any]:
    """All that the newest instance says of itself when it is asked; raises ServiceError."""
    deadline = time.monotonic() + service.timeout
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(service.timeout)
                sock.connect(os.path.join(service.runtime_directory, SOCKET))
                return call(sock, f"{INTERFACE}.Describe", {})
        except (OSError, UpgradeError) as error:
            if time.monotonic() > deadline:
                raise ServiceError(f"does not answer: {error}", service.stderr) from error
            time.sleep(0.01)  # between two instances, or it has only just become ready
