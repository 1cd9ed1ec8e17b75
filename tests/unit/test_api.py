# SPDX-License-Identifier: LGPL-2.1-or-later
"""What authors import: the list is pinned, everything on it is documented, and it type-checks."""

import asyncio
import inspect
import re
import runpy
import shutil
import socket
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import upgrader
from tests.support import cannot_run
from upgrader import aio, blocking, errors
from upgrader.aio.handled_connection import HandledConnection
from upgrader.aio.safe_points import SafePoints
from upgrader.blocking.handled_connection import BlockingConnection
from upgrader.blocking.runtime import BlockingRuntime
from upgrader.instance.connection import ConnectionStream
from upgrader.instance.declarations import Connections

Wrong = Callable[[upgrader.Instance], Any]

TYPING = Path(__file__).parents[1] / "typing"
ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "packaging" / "api-reference"
AUTHORS = ROOT / "docs" / "authors.md"

PUBLIC = [
    "ChannelError",
    "Datagrams",
    "DeclarationError",
    "Declared",
    "Ended",
    "Frame",
    "IncompatibleState",
    "Instance",
    "Listener",
    "MessageTooLong",
    "Peer",
    "Peers",
    "Retired",
    "Table",
    "UnclaimedError",
    "UpgradeError",
    "VerifyError",
    "attach",
    "convert",
    "convert_back",
    "since",
    "state",
]


def test_the_public_names() -> None:
    """A change here is a change for every author: it goes into the release notes."""
    assert PUBLIC == upgrader.__all__
    assert sorted(PUBLIC) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist_and_are_documented(name: str) -> None:
    """Each has a docstring of its own, and so does each of its public methods."""
    value = getattr(upgrader, name)
    if name == "Frame":  # a type alias has no docstring
        assert typing.get_args(value)
        return
    assert vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    for member, function in vars(value).items() if inspect.isclass(value) else ():
        if not member.startswith("_") and inspect.isroutine(function):
            assert inspect.getdoc(function), f"{name}.{member}"


def test_the_public_names_for_asyncio() -> None:
    """Likewise for what only programs on an asyncio loop need."""
    names = ["Adapter", "Instance", "Peer", "Server", "Task", "start_server", "start_unix_server"]
    assert names == aio.__all__
    for name in names:
        value = getattr(aio, name)
        if name != "Task":  # a type alias
            assert value.__doc__
        for member, function in vars(value).items() if inspect.isclass(value) else ():
            if not member.startswith("_") and inspect.isroutine(function):
                assert inspect.getdoc(function), f"{name}.{member}"


def test_the_reference_is_of_this_code() -> None:
    """Every public name is in docs/authors.md, with its signature and what it is for."""
    text = AUTHORS.read_text()

    assert text == runpy.run_path(str(REFERENCE))["filled"](text)


def documented(module: str, name: str) -> set[str]:
    """The members of a class in docs/authors.md."""
    section = AUTHORS.read_text().partition(f"\n### {module}\n")[2].partition("\n### ")[0]
    entry = section.partition(f"\n**`{name}`**")[2].partition("\n**")[0]
    return set(re.findall(r"^- `(?:await )?(\w+)", entry, re.MULTILINE))


async def asyncio_objects(sock: socket.socket) -> list[tuple[str, str, object]]:
    """An instance as `attach` makes it, and a connection of it, as an author has them."""
    async with upgrader.attach("api") as instance:
        connection = HandledConnection(
            "x", ConnectionStream(sock), None, SafePoints(), lambda _: None, adopted=False
        )
        return [
            ("upgrader.aio", "Instance", instance),
            ("upgrader", "Peer", aio.Peer(connection)),
            ("upgrader", "Peers", instance.peers),
        ]


def blocking_objects(sock: socket.socket) -> list[tuple[str, str, object]]:
    """The same without asyncio, and what they declare."""

    @upgrader.state("api")
    class State:
        pass

    with upgrader.attach("api") as instance:
        listener = instance.listener("x")
        declared = Connections(listener._bound, None, lambda peer: None)
        with BlockingRuntime(instance._parts, {}, [], blocking.Peer) as runtime:
            connection = BlockingConnection(
                runtime, declared, ConnectionStream(sock), None, adopted=False
            )
        return [
            ("upgrader", "Instance", instance),
            ("upgrader.blocking", "Peer", blocking.Peer(connection)),
            ("upgrader", "Listener", listener),
            ("upgrader", "Datagrams", instance.datagrams("y")),
            ("upgrader", "Declared", instance.state(State)),
        ]


def test_completion_shows_what_is_documented() -> None:
    """`dir()` of what authors hold is what docs/authors.md describes, and hardly anything private."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        objects = [*asyncio.run(asyncio_objects(ours)), *blocking_objects(theirs)]
        for module, name, made in objects:
            public = {each for each in dir(made) if not each.startswith("_")}
            own = {each for each in vars(made) if not each.startswith("__")}
            inherited = {"count", "index"} if name == "Peers" else set()  # of a sequence

            assert documented(module, name) == public - inherited, f"{module}.{name}"
            assert len(own) <= 2, own


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As in any module."""
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        upgrader.Nothing  # noqa: B018


def test_all_errors_are_in_the_tree() -> None:
    """The drawing in the module's docstring is complete and right."""
    drawn: dict[str, str] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        bare = line.lstrip("│├└─ ")
        name = bare.split()[0] if bare.split() else ""
        if isinstance(vars(errors).get(name), type):
            depth = (len(line) - len(bare)) // 4
            above[depth:] = [name]
            drawn[name] = above[depth - 1] if depth else "Exception"
    real = {
        name: value.__base__.__name__
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }

    assert real == drawn


@pytest.mark.parametrize("error", [e for e in vars(errors).values() if inspect.isclass(e)])
def test_errors_are_documented(error: type) -> None:
    """What happened, for every one of them."""
    assert error.__doc__


def test_a_remedy_is_shown() -> None:
    """An error says what to do next."""
    error = errors.UpgradeError("it is broken", remedy="mend it")

    assert ("it is broken", "mend it") == (error.message, error.remedy)
    assert "it is broken (mend it)" == str(error)
    assert "it is broken" == str(errors.UpgradeError("it is broken"))


def test_a_service_type_checks() -> None:
    """What is in tests/typing is clean for `mypy --strict`, and the mistakes in it are found."""
    beside = Path(sys.executable).with_name("mypy")
    program = str(beside) if beside.exists() else shutil.which("mypy")
    if program is None:
        cannot_run("mypy is missing: packaging/bootstrap installs it")
    done = subprocess.run(
        [
            program,
            "--strict",
            "--warn-unused-ignores",
            "--no-error-summary",
            *sorted(TYPING.glob("*.py")),
        ],
        cwd=TYPING.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )

    assert "" == done.stdout


async def ticking() -> None:
    """What a program might give to `serve`."""


async def yielding(peer: object) -> Any:
    """No handler."""
    yield peer


WRONG: dict[str, Wrong] = {
    r"ticking: has been called \(give the function, without \(\)\)": lambda instance: (
        instance.serve(tasks=[ticking()])  # type: ignore[list-item]
    ),
    r"serve\(tasks=...\): wants a list of functions": lambda instance: instance.serve(
        tasks=ticking
    ),  # type: ignore[arg-type]
    "42: is no function": lambda instance: instance.quiesce(42),  # type: ignore[type-var]
    "yielding: yields, and nobody takes what it yields": lambda instance: instance.connections(
        instance.listener("chat", bind="127.0.0.1:0")
    )(yielding),
    r"connections\(\): wants what instance.listener\(\) has returned": lambda instance: (
        instance.connections("chat")  # type: ignore[arg-type]
    ),
    r"@state: wants a name \(write @upgrader.state\(\"room\"\)\)": lambda _: upgrader.state(
        ValueError
    ),  # type: ignore[arg-type]
    r"with attach\(\): is for programs without asyncio \(write async with\)": lambda _: (
        upgrader.attach("other").__enter__()
    ),
}


@pytest.mark.parametrize("said", WRONG)
def test_what_an_author_may_get_wrong(said: str) -> None:
    """It is said when it is declared, in one line, and what to write instead."""

    async def play() -> None:
        async with upgrader.attach("api") as instance:
            result = WRONG[said](instance)
            if inspect.isawaitable(result):
                await result

    with pytest.raises(upgrader.DeclarationError, match=f"^{said}$"):
        asyncio.run(play())


def test_a_coroutine_function_in_a_blocking_program() -> None:
    """Nobody would ever await it."""
    with upgrader.attach("api") as instance:
        listener = instance.listener("chat", bind="127.0.0.1:0")
        for declare in (instance.quiesce, instance.verify, instance.connections(listener)):
            with pytest.raises(
                upgrader.DeclarationError, match=r"^ticking: is a coroutine function"
            ):
                declare(ticking)


def test_serve_is_called_once() -> None:
    """A second call would bind all sockets again."""
    program = (
        "import asyncio, upgrader\n"
        "async def main():\n"
        "    async with upgrader.attach('api') as instance:\n"
        "        await instance.serve(tasks=[lambda: instance.serve()])\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )

    assert ended.stderr.endswith("DeclarationError: serve(): is called twice\n")
