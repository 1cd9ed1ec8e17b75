# SPDX-License-Identifier: LGPL-2.1-or-later
"""What forbids a live upgrade is found before anything is asked for, and says what to do."""

import pwd
from typing import Any

import pytest

from tests.unit.units import unit
from upgrader.systemd.live_limits import Running, changed_sockets, live_limits
from upgrader.systemd.unit import UNSET_ID, ExecCommand, SocketUnit, show_socket

GROUP = pwd.getpwnam("daemon").pw_gid
DAEMON = pwd.getpwnam("daemon").pw_uid
WEB = SocketUnit("web.socket", True, "web", (("Stream", "[::]:80"), ("FIFO", "/run/fifo")))


def test_a_healthy_unit_has_no_limits() -> None:
    assert () == live_limits(unit(), Running(), ())


@pytest.mark.parametrize(
    ("changes", "cause", "remedy"),
    [
        ({"exec_reload": ()}, "no ExecReload=", "-m upgrader.takeover"),
        (
            {"exec_reload": (ExecCommand("/bin/kill", ("kill", "-HUP", "$MAINPID"), ()),)},
            "no ExecReload=",
            "-m upgrader.takeover",
        ),
        ({"runtime_directories": ()}, "no RuntimeDirectory=", "RuntimeDirectory=web"),
        ({"notify_access": "main"}, "NotifyAccess=main", "NotifyAccess=exec"),
        ({"notify_access": "none"}, "NotifyAccess=none", "NotifyAccess=exec"),
        ({"kill_mode": "mixed"}, "KillMode=mixed", "KillMode=control-group"),
        ({"kill_mode": "process"}, "KillMode=process", "KillMode=control-group"),
        ({"oom_policy": "kill"}, "OOMPolicy=kill", "OOMPolicy=continue"),
        ({"private_pids": "yes"}, "PrivatePIDs=", "upgrader restart web.service"),
        (
            {"private_users": True, "protect_proc": "invisible"},
            "PrivateUsers= together with ProtectProc=invisible hides",
            "upgrader restart web.service",
        ),
        ({"user": "daemon"}, "User= has changed: it runs as uid 0", "upgrader restart"),
        ({"uid": DAEMON}, f"it runs as uid {DAEMON}, and would as uid 0", "upgrader restart"),
        ({"user": "no-such-user"}, "no user 'no-such-user'", "upgrader restart"),
        (
            {"group": "daemon"},
            f"Group= has changed: it runs as gid 0, and would as gid {GROUP}",
            "",
        ),
        ({"group": "no-such-group"}, "no group 'no-such-group'", "upgrader restart"),
        (
            {"user": "web-dynamic", "dynamic_user": True, "uid": DAEMON},
            "DynamicUser= has changed",
            "upgrader restart",
        ),
        ({"uid": 61184}, "uid 61184, and would as uid 0", "upgrader restart"),
        (
            {"exec_start": (ExecCommand("/usr/bin/web", ("web",), ("privileged",)),)},
            "prefixes of other privileges",
            "upgrader restart",
        ),
        (
            {"triggered_by": ("web.socket",)},
            "web.socket has changed",
            "systemctl restart web.socket",
        ),
        ({"credentials": ("key", "new")}, "new credentials: new", "upgrader restart"),
        (
            {"memory_max": 100 << 20, "memory_current": 70 << 20},
            "leaves 30 MiB, and a second instance needs about 40 MiB",
            "upgrader restart",
        ),
        (
            {"memory_max": 100 << 20, "memory_current": 0, "memory_available": 20 << 20},
            "MemoryMax= of its slice, MemoryHigh= or the machine leaves 20 MiB",
            "upgrader restart",
        ),
    ],
)
def test_each_limit_says_what_to_do(changes: dict[str, Any], cause: str, remedy: str) -> None:
    """One thing that is wrong is one limit, with the names and numbers in it."""
    running = Running(activated=(), credentials=("key",), memory=40 << 20)
    sockets = (WEB,) if "triggered_by" in changes else ()

    (limit,) = live_limits(unit(**changes), running, sockets)

    assert cause in limit.cause
    assert remedy in limit.remedy


@pytest.mark.parametrize(
    "changes",
    [
        {"user": "daemon", "uid": DAEMON, "gid": GROUP},
        {"user": str(DAEMON), "uid": DAEMON, "gid": GROUP},
        {"user": "daemon", "uid": DAEMON, "group": "0", "gid": 0},
        {"user": "web", "dynamic_user": True, "uid": 65519},
        {"private_users": True},
        {"protect_proc": "invisible"},
        {"user": "root", "uid": UNSET_ID},
        {"memory_max": 100 << 20, "memory_current": 60 << 20},
        {"memory_max": 100 << 20},
        {"private_pids": "no"},
        {"credentials": ("key",)},
        {"notify_access": "all"},
        {"exec_reload": (ExecCommand("/usr/bin/upgrader-takeover", ("upgrader-takeover",), ()),)},
    ],
)
def test_what_is_no_limit(changes: dict[str, Any]) -> None:
    running = Running(credentials=("key",), memory=40 << 20)

    assert () == live_limits(unit(**changes), running)


def test_sockets_are_compared_by_name_and_address() -> None:
    """What the running instance was passed is what PID 1 would pass to a start; kinds that no
    program can declare are not compared."""
    running = Running(activated=(show_socket("web", "SOCK_STREAM", "[::]:80"),))

    assert {} == changed_sockets(running, [WEB])
    assert {"web.socket": ["[::]:80"]} == changed_sockets(Running(activated=()), [WEB])
    assert {} == changed_sockets(Running(), [WEB])
    renamed = WEB.replace(name="other")
    assert {"web.socket": ["[::]:80"]} == changed_sockets(running, [renamed])
    assert {} == changed_sockets(running, [renamed.replace(active=False)])


def test_u11_files_in_memory_are_no_memory_in_use() -> None:
    """The kernel gives them up for a second instance."""
    narrow = unit(memory_max=100 << 20, memory_current=90 << 20, memory_available=10 << 20)
    running = Running(memory=40 << 20, cache=30 << 20)

    assert () == live_limits(narrow, running)
    (limit,) = live_limits(narrow, running.replace(cache=29 << 20))
    assert "leaves 39 MiB" in limit.cause


def test_what_an_instance_does_not_say_is_not_looked_at() -> None:
    assert Running() == Running.from_description({"service": "web"})
    described = {"started": {"activated": [], "credentials": ["key"], "memory": 7, "cache": 8}}
    assert Running((), ("key",), 7, 8) == Running.from_description(described)
