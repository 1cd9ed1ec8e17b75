# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each program wants of its runner, as one table; starts nothing."""

import os
import signal
from dataclasses import dataclass
from enum import StrEnum


class Passing(StrEnum):
    """How a program learns which of its FDs are listeners. `{fd:NAME}` works beside each of them."""

    LISTEN_FDS = "listen-fds"  #: LISTEN_FDS=, from FD 3 on; sd_listen_fds(3)
    NGINX = "nginx"  #: NGINX=, as nginx hands them to the binary that it upgrades itself to
    SERVER_STARTER = "server-starter"  #: SERVER_STARTER_PORT=; start_server(1) of Server::Starter
    NONE = "none"  #: by `{fd:NAME}` alone


class Readiness(StrEnum):
    """How it is known that a program serves."""

    NOTIFY = "notify"  #: it sends READY=1; sd_notify(3)
    LISTENING = "listening"  #: it waits for each listener in epoll(7)
    AFTER = "after"  #: it has lived for a time span, `after:SPAN`


@dataclass(frozen=True, slots=True)
class Program:
    """One program: what its own documentation says of inherited listeners, its end and its reload.

    `drain`: the signal at which it ends after what it is at; `reload`: the signal at which it reads
    its configuration again, None if it knows none; `test`: arguments with which it only tests that.
    """

    passing: Passing = Passing.LISTEN_FDS
    ready: Readiness = Readiness.NOTIFY
    drain: signal.Signals = signal.SIGTERM
    reload: signal.Signals | None = None
    test: tuple[str, ...] = ()


#: By the name of the binary. Of nginx: https://nginx.org/en/docs/control.html; of gunicorn:
#: https://docs.gunicorn.org/en/stable/signals.html and .../deploy.html#systemd.
PROGRAMS = {
    "nginx": Program(Passing.NGINX, Readiness.LISTENING, signal.SIGQUIT, signal.SIGHUP, ("-t",)),
    "gunicorn": Program(reload=signal.SIGHUP, test=("--check-config",)),
}


def known(path: str) -> Program:
    """What is known of a program, or else what most programs for systemd do."""
    return PROGRAMS.get(os.path.basename(path), Program())
