# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking a real PID 1, as root over its own socket and as nobody over the system bus."""

from collections.abc import Iterator

import pytest

from upgrader.lab.private_systemd import PrivateSystemd

#: A unit with a digit in front, an instance and an escape: the object path is the hard part.
UNIT = "9-web\\x2d@1.service"

ASK = """
import os, sys
uid = int(sys.argv[1])
os.setgroups([]); os.setgid(uid); os.setuid(uid)
from upgrader.errors import BusError
from upgrader.systemd.bus import PRIVATE, SYSTEM_BUS, Bus
with Bus(10) as bus:
    assert bus._path == (SYSTEM_BUS if uid else PRIVATE)
    jobs = [f"{job.unit}:{job.type}" for job in bus.list_jobs()]
    print(*jobs)
    print(bus.stored_fds(sys.argv[2]), bus.stop_timeout(sys.argv[2]))
    try:
        bus.stored_fds("no-such@unit.socket")
    except BusError as error:
        print(error)
"""


@pytest.fixture
def unit(any_machine: PrivateSystemd) -> Iterator[PrivateSystemd]:
    """A unit that stores two FDs, says READY=1, and never ends to start its second part."""
    any_machine.write(
        "/etc/systemd/system/waiting.service", "[Service]\nType=oneshot\nExecStart=sleep infinity\n"
    )
    any_machine.write(
        "/etc/systemd/system/9-web\\x2d@.service",
        "[Service]\nType=notify\nNotifyAccess=all\nFileDescriptorStoreMax=8\nTimeoutStopSec=17\n"
        f"ExecStart={' '.join(any_machine.python)} /run/store.py\n",
    )
    any_machine.write(
        "/run/store.py",
        "import os, signal\n"
        "from upgrader.protocol.fd import Fd\n"
        "from upgrader.systemd.fdstore import FdStore, Stored, StoreName\n"
        "from upgrader.systemd.notify import Notifier\n"
        "notifier = Notifier.from_environment(os.environ)\n"
        "for name in '12':\n"
        "    FdStore(notifier).push(StoreName(Stored.ASIDE, name), Fd(os.memfd_create(name)))\n"
        "notifier.send('READY=1')\n"
        "signal.pause()\n",
    )
    any_machine.write("/run/ask.py", ASK)
    any_machine.run(["systemctl", "daemon-reload"])
    any_machine.run(["systemctl", "start", UNIT])
    any_machine.run(["systemctl", "start", "--no-block", "waiting.service"])
    yield any_machine
    any_machine.run(["systemctl", "stop", UNIT, "waiting.service"])


@pytest.mark.parametrize("uid", [0, 65534])
def test_pid_1_answers(unit: PrivateSystemd, uid: int) -> None:
    """Jobs, the number of stored FDs and the stop timeout are those that systemctl shows."""
    done = unit.run([*unit.python, "/run/ask.py", str(uid), UNIT])
    jobs, numbers, refusal = done.stdout.splitlines()
    shown = unit.run(["systemctl", "show", "--value", "-p", "NFileDescriptorStore", UNIT]).stdout

    assert "waiting.service:start" in jobs.split()
    assert f"{shown.strip()} 17.0" == numbers
    assert "2" == shown.strip()
    assert "refused" in refusal
