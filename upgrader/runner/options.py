# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of a runner, read; ExecStopPost= reads that of ExecStart= as well."""

import argparse
import functools
import os
import re
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Self

from upgrader.protocol.programs import Passing, Readiness, known, signal_named
from upgrader.protocol.rendezvous import RUNNER
from upgrader.protocol.systemd_syntax import LONGEST, time_span
from upgrader.protocol.values import Value

if TYPE_CHECKING:
    from upgrader.runner.socket_modes import SocketMode

_USAGE = "python -m upgrader.run [OPTIONS] -- PROGRAM [ARGUMENTS]"
_DATAGRAMS = "--datagrams"
_LISTEN = "--listen"
_SOCKET_MODE = "--socket-mode"
_DRAIN_LIMIT = 3600.0  # seconds


class Listen(Value):
    """One listener, or datagram socket: its name, and where to bind it unless a `.socket` unit passes it."""

    name: str
    address: str | None
    datagrams: bool = False


class RunnerOptions(Value):
    """What a runner is told. `ready_after` and `drain_limit` are in seconds; `reload` is a signal, a
    command, or None; `test`: arguments with which the program only tests its configuration; `adapter`:
    see `adapters`, empty for the one of most programs; `blocking`: its listeners must be."""

    program: Sequence[str]
    name: str
    listen: Sequence[Listen]
    passing: Passing
    ready: Readiness
    ready_after: float
    check: Sequence[str]
    drain: signal.Signals
    drain_limit: float
    reload: signal.Signals | Sequence[str] | None
    pid_file: str
    test: Sequence[str]
    adapter: str
    version_command: Sequence[str]
    blocking: bool
    socket_modes: "Sequence[SocketMode]" = ()

    @classmethod
    def parse(cls, arguments: Sequence[str], environment: Mapping[str, str]) -> Self:
        """Read a command line, and the variables of what it does not say (see `option_table`); ends the
        process with a message and 2 for what makes no sense."""
        listens = bool(_parser().parse_args(arguments).listen)
        given = _parser().parse_args([*_said(environment, listens), *arguments])
        words = given.program[1:] if given.program[:1] == ["--"] else given.program
        if not words:
            _parser().error("which program? It comes after --")
        try:
            program = known(words[0])
        except ValueError as error:
            _parser().error(str(error))
        ready, after = given.ready or (program.ready, 0.0)
        return cls(
            program=tuple(words),
            name=given.name or os.path.basename(words[0]),
            listen=tuple(given.listen),
            passing=given.passing or program.passing,
            ready=ready,
            ready_after=after,
            check=tuple(given.check),
            drain=given.drain_signal or program.drain,
            drain_limit=given.drain_limit,
            reload=given.reload or program.reload,
            pid_file=given.pid_file,
            test=program.test,
            adapter=given.adapter or program.adapter,
            version_command=tuple(given.version_command)
            or ((words[0], *program.version) if program.version else ()),
            blocking=program.blocking,
            socket_modes=tuple(given.socket_mode),
        )


class OptionText(Value):
    """One option as people read it: its name, the variable of the unit that says the same, what its value
    is called, and its help."""

    name: str
    variable: str
    value: str
    text: str


def option_table() -> list[OptionText]:
    """All options of a runner."""
    return [
        OptionText(
            each.option_strings[0],
            RUNNER + each.option_strings[0][2:].upper().replace("-", "_"),
            str(each.metavar),
            (each.help or "").replace("%%", "%"),
        )
        for each in _parser()._actions
        if each.metavar and each.option_strings
    ]


def _said(environment: Mapping[str, str], listens: bool) -> Iterator[str]:
    """The options that variables say, with which a command line begins; in one there are several listeners,
    which those of a command line replace."""
    table = option_table()
    named = {each.variable for each in table}
    for variable in environment:
        if variable.startswith(RUNNER) and variable not in named:
            _parser().error(f"there is no option for {variable}=")
    for option in table:
        text = environment.get(option.variable, "")
        if option.name in (_LISTEN, _DATAGRAMS, _SOCKET_MODE):
            yield from (f"{option.name}={word}" for word in text.split() if not listens)
        elif text:
            yield f"{option.name}={text}"


def _formatter(prog: str) -> argparse.HelpFormatter:
    """That of argparse asks the module shutil for the width, which takes a start milliseconds to import."""
    try:
        columns = int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size().columns
    except (OSError, ValueError):
        columns = 80
    return argparse.HelpFormatter(prog, width=columns - 2)


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=_formatter,
        prog="python -m upgrader.run",
        usage=_USAGE,
        allow_abbrev=False,
        description="Run any program as a service whose upgrades nobody notices: it is given its"
        " listeners, which outlive it. For ExecStart= of a unit; see docs/programs.md.",
    )
    add = parser.add_argument
    add(_LISTEN, metavar="NAME[=ADDRESS]", type=_listen, action="append", default=[],
        help="a listener: host:port, [v6]:port, :port or unix:/path; without an address that of the"
        " .socket unit with FileDescriptorName=NAME (may be repeated)")  # fmt: skip
    add(_DATAGRAMS, dest="listen", metavar="NAME[=ADDRESS]", type=_datagrams, action="append",
        help="a datagram socket, likewise")  # fmt: skip
    add(_SOCKET_MODE, metavar="NAME=MODE[:USER[:GROUP]]", type=_socket_mode, action="append",
        default=[], help="who may connect to a UNIX listener, such as app=0660:root:www-data (may be"
        " repeated)")  # fmt: skip
    add("--pass", dest="passing", type=_word(Passing), metavar="HOW",
        help=f"how the program is given its listeners: {', '.join(Passing)}; {{fd:NAME}} in its"
        " arguments is the number of an FD in any case")  # fmt: skip
    add("--ready", type=_ready, metavar="HOW",
        help="when it is ready: notify (it sends READY=1), listening (it waits for its listeners in"
        " epoll), or after:SPAN")  # fmt: skip
    add("--check", metavar="COMMAND", type=shlex.split, default=[],
        help="run when it is ready, with its PID in $MAINPID and an address for {address:NAME}; the"
        " program is taken if that ends with 0")  # fmt: skip
    add("--drain-signal", type=_signal, metavar="SIGNAL",
        help="the signal at which it ends after what it is at (SIGTERM; nginx: SIGQUIT)")  # fmt: skip
    add("--drain-limit", type=_span, default=_DRAIN_LIMIT, metavar="SPAN",
        help="how long a program that was replaced may take for that (1h)")  # fmt: skip
    add("--reload", type=_reload, metavar="SIGNAL|COMMAND",
        help="what a reload does if there is nothing to upgrade (nginx, gunicorn: SIGHUP)")  # fmt: skip
    add("--pid-file", default="", metavar="PATH",
        help="where the program writes its PID; put back if an old one takes it away")  # fmt: skip
    add("--adapter", default="", metavar="NAME",
        help="upgrader.programs.NAME, or a module of yours with a dot in its name: for a program that"
        " needs more than these options can say")  # fmt: skip
    add("--version-command", metavar="COMMAND", type=shlex.split, default=[],
        help="what tells the version of the program, for upgrader status (nginx, haproxy: -v)")  # fmt: skip
    add("--name", default="", metavar="NAME", help="the name of the service (that of the program)")
    add("program", nargs=argparse.REMAINDER, metavar="PROGRAM")
    return parser


def _word(kind: type[Passing]) -> type[Passing]:
    return kind


def _listen(text: str) -> Listen:
    name, equals, address = text.partition("=")
    return Listen(name, address if equals else None)


def _datagrams(text: str) -> Listen:
    listen = _listen(text)
    return Listen(listen.name, listen.address, datagrams=True)


def _socket_mode(text: str) -> "SocketMode":
    from upgrader.runner.socket_modes import SocketMode  # seldom needed

    return SocketMode.parse(text)


def _ready(text: str) -> tuple[Readiness, float]:
    how, colon, span = text.partition(":")
    readiness = Readiness(how)
    if bool(colon) is not (readiness is Readiness.AFTER):
        raise ValueError(text)
    return readiness, time_span(span) if colon else 0.0


def _signal(text: str) -> signal.Signals:
    try:
        return signal_named(text)
    except KeyError:
        raise ValueError(text) from None


def _span(text: str) -> float:
    return min(time_span(text), LONGEST)


def _reload(text: str) -> signal.Signals | Sequence[str]:
    if re.fullmatch(r"SIG[A-Z0-9]+", text):
        return _signal(text)
    return tuple(shlex.split(text))
