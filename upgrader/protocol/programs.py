# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each program wants of its runner, as one table."""

import glob
import os
import re
import signal
from enum import StrEnum
from typing import Any

from upgrader.protocol.values import Value


class Passing(StrEnum):
    """How a program learns which of its FDs are listeners. `{fd:NAME}` works beside each of them."""

    LISTEN_FDS = "listen-fds"  #: LISTEN_FDS=, from FD 3 on; sd_listen_fds(3)
    PHP_FPM = "php-fpm"  #: FPM_SOCKETS=, as PHP-FPM hands them to itself at a reload
    NGINX = "nginx"  #: NGINX=, as nginx hands them to the binary that it upgrades itself to
    SERVER_STARTER = "server-starter"  #: SERVER_STARTER_PORT=; start_server(1) of Server::Starter
    HAPROXY = "haproxy"  #: -x, as an old HAProxy hands them to a new one
    NONE = "none"  #: by `{fd:NAME}` alone


class Readiness(StrEnum):
    """How it is known that a program serves."""

    NOTIFY = "notify"  #: it sends READY=1; sd_notify(3)
    LISTENING = "listening"  #: it waits for each listener in epoll(7)
    AFTER = "after"  #: it has lived for a time span, `after:SPAN`


class Program(Value):
    """One program: what its own documentation says of inherited listeners, its end and its reload.

    `drain`: the signal at which it ends after what it is at; `reload`: the signal at which it reads
    its configuration again, None if it knows none; `test`: arguments with which it only tests that;
    `background`: words with which it leaves the foreground, `foreground`: those that it needs to stay
    there. `exclusive`: what two of them cannot share; `binds`: it takes no listeners, and binds its own.
    `adapter`: as of --adapter; `version`: arguments with which it tells its version, and ends.
    `blocking`: it waits in accept(2), so O_NONBLOCK must be off.
    """

    passing: Passing = Passing.LISTEN_FDS
    ready: Readiness = Readiness.NOTIFY
    drain: signal.Signals = signal.SIGTERM
    reload: signal.Signals | None = None
    test: tuple[str, ...] = ()
    background: tuple[str, ...] = ()
    foreground: tuple[str, ...] = ()
    exclusive: str = ""
    binds: bool = False
    adapter: str = ""
    version: tuple[str, ...] = ()
    blocking: bool = False

    @property
    def adoptable(self) -> bool:
        """Whether it can be the program of a runner."""
        return not (self.exclusive or self.binds)


#: Programs of one unit that are drained at a time: of more, the oldest is ended.
MOST_DRAINED = 2

#: Of two that write the same files, or hold the same data in memory, one at most serves clients.
_POSTGRESQL = Program(exclusive="its data directory and shared memory")
_MARIADB = Program(exclusive="a lock on its data")
_REDIS = Program(exclusive="its data in memory, which two would write to the same files")
_DBUS = Program(exclusive="the connections of its clients, and the names that these own")
_APACHE = Program(binds=True)
#: By the name of the binary. Of nginx: https://nginx.org/en/docs/control.html; of gunicorn:
#: https://docs.gunicorn.org/en/stable/signals.html and .../deploy.html#systemd; of HAProxy: its
#: management.txt, 3 and 4; of node: `server.listen({fd: 3})`, https://nodejs.org/api/net.html; of uvicorn: its --fd; of PHP-FPM: php-fpm(8), "SIGNAL", and FPM_SOCKETS in its
#: sapi/fpm/fpm/fpm_sockets.c; of Puma: its docs/systemd.md and docs/signals.md.
PROGRAMS = {
    "nginx": Program(Passing.NGINX, Readiness.LISTENING, signal.SIGQUIT, signal.SIGHUP, ("-t",), version=("-v",),
        adapter="workers_first"),
    "gunicorn": Program(
        reload=signal.SIGHUP, test=("--check-config",), background=("-D", "--daemon")
    ),
    "haproxy": Program(
        Passing.HAPROXY, Readiness.NOTIFY, signal.SIGUSR1, signal.SIGUSR2, ("-c",),
        background=("-D", "-W"), foreground=("-Ws",), version=("-v",),
    ),
    "node": Program(Passing.LISTEN_FDS, Readiness.LISTENING),
    "php-fpm": Program(
        Passing.PHP_FPM, Readiness.NOTIFY, signal.SIGQUIT, signal.SIGUSR2, ("-t",),
        background=("-D", "--daemonize"), foreground=("--nodaemonize",), adapter="workers_first", blocking=True,
    ),
    "puma": Program(reload=signal.SIGUSR2),
    "uvicorn": Program(Passing.NONE, Readiness.LISTENING),
    "apache2": _APACHE,
    "apache2ctl": _APACHE,
    "apachectl": _APACHE,
    "dbus-broker-launch": _DBUS,
    "dbus-daemon": _DBUS,
    "mariadbd": _MARIADB,
    "mysqld": _MARIADB,
    "pg_ctlcluster": _POSTGRESQL,
    "postgres": _POSTGRESQL,
    "redis-server": _REDIS,
    "valkey-server": _REDIS,
    "varnishd": Program(exclusive="its cache in memory", binds=True),
}  # fmt: skip
#: Where an admin says more: a table for each program, by the name of its binary.
DIRECTORY = "/etc/upgrader/programs.d"


def known(path: str, directory: str = DIRECTORY) -> Program:
    """What is known of a program, or else what most programs for systemd do; raises ValueError that
    names the file of an admin. One that is no TOML is left out, and logged: it may be of another program."""
    return look_up(path, directory, strict=False) or Program()


def look_up(path: str, directory: str = DIRECTORY, *, strict: bool = True) -> Program | None:
    """What is known of a program, from an admin first; raises ValueError that names the file."""
    name, own = program_name(path), os.path.basename(path)
    for file in sorted(glob.glob(f"{glob.escape(directory)}/*.toml")):
        import tomllib  # seldom needed

        try:
            with open(file, "rb") as opened:
                tables = tomllib.load(opened)
        except (OSError, ValueError) as error:
            if strict:
                raise ValueError(f"{file}: {error}") from error
            import logging  # seldom needed

            logging.getLogger("upgrader").warning("%s is left out: %s", file, error)
            continue
        try:
            table = tables.get(own, tables.get(name))
            if table is not None:
                return _read(table)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{file}: {name}: {error}") from error
    return PROGRAMS.get(name)


def program_name(path: str) -> str:
    """The name in the table of the binary at a path: that of `/usr/sbin/php-fpm8.4` is php-fpm."""
    name = os.path.basename(path)
    return name if name in PROGRAMS else re.sub(r"(?<=[a-z])-?[0-9.]+$", "", name)


def signal_named(text: str) -> signal.Signals:
    """SIGTERM and the like, also without SIG or in lower case; raises KeyError."""
    return signal.Signals["SIG" + text.upper().removeprefix("SIG")]


def _read(table: dict[str, Any]) -> Program:
    unknown = table.keys() - {
        "pass", "ready", "drain-signal", "reload", "test", "background", "foreground", "exclusive",
        "binds", "adapter", "blocking",
    }  # fmt: skip
    if unknown:
        raise ValueError(f"there is no {', '.join(sorted(unknown))}")
    exclusive, binds = table.get("exclusive", ""), table.get("binds", False)
    adapter, blocking = table.get("adapter", ""), table.get("blocking", False)
    texts, flags = (exclusive, adapter), (binds, blocking)
    if not all(isinstance(t, str) for t in texts) or not all(isinstance(f, bool) for f in flags):
        raise ValueError(
            "exclusive is a text, adapter as well; binds and blocking are true or false"
        )
    return Program(
        Passing(table.get("pass", Passing.LISTEN_FDS)),
        Readiness(table.get("ready", Readiness.NOTIFY)),
        signal_named(table.get("drain-signal", "SIGTERM")),
        signal_named(table["reload"]) if "reload" in table else None,
        _words(table, "test"),
        _words(table, "background"),
        _words(table, "foreground"),
        exclusive,
        binds,
        adapter,
        blocking=blocking,
    )


def _words(table: dict[str, Any], name: str) -> tuple[str, ...]:
    words = table.get(name, [])
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise ValueError(f"{name} is a list of words")
    return tuple(words)
