# SPDX-License-Identifier: LGPL-2.1-or-later
"""A unit value for tests: a healthy instance, with what a test wants changed."""

from typing import Any

from upgrader.protocol.identity import HasFileno
from upgrader.systemd.unit import UNSET, UNSET_ID, ExecCommand, Unit

_HEALTHY = Unit(
    id="web.service",
    names=("web.service",),
    path="/org/freedesktop/systemd1/unit/web_2eservice",
    load_state="loaded",
    load_error="",
    active_state="active",
    sub_state="running",
    result="success",
    type="notify",
    main_pid=7,
    exec_main_pid=7,
    exec_main_code=0,
    exec_main_status=0,
    status_text="generation 1, cold start",
    job_id=0,
    need_daemon_reload=False,
    stored_fds=1,
    fd_store_max=16,
    fd_store_preserve="yes",
    notify_access="exec",
    restart="always",
    restart_usec=100_000,
    restarts=0,
    invocation_id="0" * 32,
    fragment_path="/etc/systemd/system/web.service",
    drop_in_paths=(),
    environment=(),
    timeout_start_usec=2_000_000,
    timeout_stop_usec=90_000_000,
    start_limit_usec=10_000_000,
    active_enter_usec=0,
    active_enter_time=0,
    active_exit_usec=0,
    state_change_usec=0,
    control_pid=0,
    reload_result="success",
    watchdog_usec=0,
    exec_start=(ExecCommand("/usr/bin/web", ("web",), ()),),
    exec_reload=(ExecCommand("/usr/bin/python3", ("python3", "-m", "upgrader.takeover"), ()),),
    user="",
    group="",
    dynamic_user=False,
    private_users=False,
    protect_proc="default",
    uid=UNSET_ID,
    gid=UNSET_ID,
    private_pids="",
    kill_mode="control-group",
    kill_signals=(15, 15),
    oom_policy="continue",
    runtime_directories=("web",),
    credentials=(),
    triggered_by=(),
    unset_environment=(),
    exec_search_path=(),
    memory_max=UNSET,
    memory_current=UNSET,
    memory_available=UNSET,
    log_namespace="",
)


def unit(**changes: Any) -> Unit:
    """The unit with these values instead."""
    return _HEALTHY.replace(**changes)


class Keeping:
    """PID 1's FD store, as a destination has the source use it; by name."""

    def __init__(self) -> None:
        self.kept: list[str] = []

    def keep(self, name: str, fd: HasFileno) -> None:
        self.kept.append(name)

    def forget(self, name: str) -> None:
        self.kept.remove(name)
