# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line, used inside a machine, and what an instance tells it; asserts only that it can be read."""

import json
import socket
import subprocess
from typing import Any

from tests.support import SETTLE
from tests.system.serving import Service
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.protocol.varlink import INTERFACE
from upgrader.protocol.varlink_client import call

#: As nobody, but able to read a Python that lies in a private directory.
NOBODY = (
    *("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)
NOWHERE = {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nowhere"}


def upgrader(
    machine: PrivateSystemd, *arguments: str, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run the command line inside."""
    return machine.run(["upgrader", *arguments], check=False, **more)


def status(service: Service) -> Any:
    """What `upgrader status --json` says."""
    return json.loads(upgrader(service.machine, "status", service.unit, "--json").stdout)


def described(service: Service) -> Any:
    """What the instance says of itself, asked from outside, which takes no new process."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(SETTLE)
        try:
            sock.connect(str(service.inside(f"/run/{service.name}/upgrader.sock")))
            return call(sock, f"{INTERFACE}.Describe", {})
        except OSError:  # between two instances
            return {"backends": [{}], "generation": 0, "phase": "", "migration": {"phase": ""}}


def found(service: Service, *arguments: str) -> Any:
    """What `upgrader check --json` says."""
    return json.loads(upgrader(service.machine, "check", service.unit, "--json", *arguments).stdout)


def upgrade(service: Service, *more: str) -> dict[str, Any]:
    """What `upgrader upgrade --json` says, its exit code included."""
    done = service.machine.run(["upgrader", "upgrade", service.unit, "--json", *more], check=False)
    answer: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == answer["exit_code"], done.stderr
    return answer
