# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `check` says of a unit whose main process is a runner, and what a runner tells of its programs."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.unit.units import unit
from upgrader.protocol.varlink_types import Description, RunProgram
from upgrader.runner.connections import count
from upgrader.runner.program_report import version_in
from upgrader.tool.check_runner import about_runner
from upgrader.tool.unit_sockets import open_sockets

AFTER = [("/usr/bin/python3", ("python3", "-m", "upgrader.run", "--after-stop"), ())]


def said(values: dict[str, Any], memory: int = 0, **changes: Any) -> list[str]:
    """The first word of each warning."""
    instance = Description("web", programs=[RunProgram(7, memory=memory)])
    runner = unit(**({"start_limit_usec": 0} | changes))
    found = about_runner(runner, instance, {"ExecStopPostEx": AFTER} | values, (), (), "python3")
    return [each.what.partition("=")[0].partition(" ")[0] for each in found]


@pytest.mark.parametrize(
    ("values", "changes", "expected"),
    [
        ({}, {}, []),
        ({}, {"start_limit_usec": 10_000_000}, ["StartLimitIntervalSec"]),
        ({"ExecStopPostEx": []}, {}, ["no"]),
        ({"PrivateTmp": True}, {}, ["PrivateTmp"]),
        ({"PrivateTmp": "disconnected", "DynamicUser": True}, {}, ["PrivateTmp", "DynamicUser"]),
        ({"PrivateTmp": "no", "DynamicUser": False}, {}, []),
        ({}, {"memory_max": 299}, ["MemoryMax"]),
        ({}, {"memory_max": 300}, []),
    ],
)
def test_what_surprises(
    values: dict[str, Any], changes: dict[str, Any], expected: list[str]
) -> None:
    """Each setting alone; two programs may be drained beside the one that serves."""
    assert expected == said(values, memory=100, **changes)


def test_sockets_that_a_program_has_bound_and_that_nobody_accepts_from() -> None:
    """Here, this process is the runner, or is the program."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        instance, pid = Description("web", programs=[RunProgram(7)]), os.getpid()
        port = bound.getsockname()[1]
        for main, words in (pid, "does not accept from"), (1, "has bound"):
            runner = unit(start_limit_usec=0, main_pid=main)
            values = {"ExecStopPostEx": AFTER}
            found = [*about_runner(runner, instance, values, (pid,), (pid,), "python3")]

            assert any(words in e.what and f":{port}" in e.what for e in found), (words, found)


def test_a_socket_that_was_made_for_one_program(tmp_path: Path) -> None:
    """The next program has another one."""
    path = str(tmp_path / "own")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path)
        bound.listen()
        instance, pid = Description("web", programs=[RunProgram(7, sockets=[path])]), os.getpid()
        runner = unit(start_limit_usec=0, main_pid=1)
        found = about_runner(runner, instance, {"ExecStopPostEx": AFTER}, (pid,), (pid,), "python3")

        assert not [each for each in found if path in each.what]


@pytest.fixture
def clean() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_connections_are_counted_by_the_kernel(tmp_path: Path, clean: ExitStack) -> None:
    """Those of one address: TCP of both families, and UNIX; 0 of what cannot be asked."""
    listeners = [
        socket.create_server(("127.0.0.1", 0)),
        socket.create_server(("::1", 0), family=socket.AF_INET6),
        socket.socket(socket.AF_UNIX),
        socket.socket(socket.AF_UNIX),
    ]
    listeners[2].bind(str(tmp_path / "a b"))
    listeners[3].bind(f"\0{tmp_path}")
    for listener in map(clean.enter_context, listeners):
        listener.listen()
        assert 0 == count(listener)
        for number in (1, 2):
            client = clean.enter_context(socket.socket(listener.family))
            client.connect(listener.getsockname())
            accepted = clean.enter_context(listener.accept()[0])
            assert number == count(listener)
        accepted.close()
        client.close()
        assert 1 == count(listener)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        assert 0 == count(datagrams)


def test_sockets_of_processes(tmp_path: Path, clean: ExitStack) -> None:
    """With the address for --listen: whether one takes IPv4 too, and whether its path is another's."""
    sockets = [
        socket.create_server(("", 0)),
        socket.create_server(("", 0), family=socket.AF_INET6),
        socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True),
        socket.socket(socket.AF_UNIX),
        socket.socket(socket.AF_UNIX),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    ]
    for sock in sockets:
        clean.enter_context(sock)
    before = {each.inode for each in open_sockets([os.getpid()])}
    for sock, name in zip(sockets[3:5], ("stays", "goes"), strict=True):
        sock.bind(str(tmp_path / name))
        sock.listen()
    (tmp_path / "goes").rename(tmp_path / "new")
    client = clean.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    client.connect(("127.0.0.1", 9))
    sockets[5].bind(("127.0.0.1", 1023 if os.geteuid() == 0 else 10_000))
    ports = [sock.getsockname()[1] for sock in sockets[:3]]
    found = [each for each in open_sockets([os.getpid()]) if each.inode not in before]
    inodes = {os.fstat(sock.fileno()).st_ino for sock in sockets[:3]}
    listening = {e.address for e in open_sockets([os.getpid()]) if e.inode in inodes}

    assert {f"0.0.0.0:{ports[0]}", f"[::]:{ports[1]}", f":{ports[2]}"} == listening
    assert {(f"unix:{tmp_path}/stays", False), (f"unix:{tmp_path}/goes", True)} == {
        (each.address, each.removed) for each in found if each.is_stream
    }
    assert 1 == len([each for each in found if not each.is_stream])


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("nginx version: nginx/1.26.3\nx 2.0", "1.26.3"),
        ("HAProxy version 3.0.11-1+deb13u4 2025/01/01 - https://x", "3.0.11-1+deb13u4"),
        ("gunicorn (version 23.0.0)\n", "23.0.0"),
        ("blue\ngreen\n", "blue"),
        ("", ""),
        ("7" * 100, "7" * 64),
    ],
)
def test_the_version_in_what_a_command_says(text: str, version: str) -> None:
    """The first number with a dot, or else the first line."""
    assert version == version_in(text)
