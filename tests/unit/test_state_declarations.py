# SPDX-License-Identifier: LGPL-2.1-or-later
"""Declaring a state: what is refused before anything runs, and what is a state."""

import asyncio
import dataclasses
import io
import socket
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, Generic, NamedTuple, TypedDict, TypeVar

import msgspec
import pytest

import upgrader
from tests.unit.states import Job, Room1, Tree
from upgrader.errors import DeclarationError
from upgrader.instance.declarations import Connections, Declarations
from upgrader.instance.declared_socket import Bound
from upgrader.instance.declared_state import DeclaredState
from upgrader.protocol.kinds import Kind
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.state import describe
from upgrader.protocol.state_codec import load, save


class Named(NamedTuple):
    at: int = 0
    worker: threading.Thread | None = None


class Options(TypedDict, total=False):
    hook: Callable[[], None]


class Struct(msgspec.Struct):
    done: "asyncio.Future[int] | None" = None


T = TypeVar("T")


@dataclasses.dataclass
class Box(Generic[T]):
    value: T


@dataclasses.dataclass
class Locked:
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)  # no class in 3.11


@dataclasses.dataclass
class Child:
    wake: threading.Event | None = None
    more: "list[Child]" = dataclasses.field(default_factory=list)


NEVER: dict[str, tuple[Any, str]] = {
    "queue": (asyncio.Queue, "value is a asyncio.queues.Queue"),
    "queue of": (asyncio.Queue[int], "value is a asyncio.queues.Queue"),
    "task or none": (asyncio.Task[None] | None, "value is a _asyncio.Task"),
    "union": (int | asyncio.Queue, "value can never be saved"),
    "socket": (dict[str, socket.socket], "value[...] is a socket.socket"),
    "file": (list[io.BytesIO], "value[...] is a _io.BytesIO"),
    "text file": (IO[str], "value is a typing.IO"),
    "generator": (Iterator[int], "value is a collections.abc.Iterator"),
    "callable": (Callable[[], None], "value is a collections.abc.Callable"),
    "class": (type[int], "value is a type"),
    "awaitable": (Annotated[Awaitable[int], "x"], "value is a collections.abc.Awaitable"),
    "path": (Path, "value is a pathlib.Path"),
    "deque": (deque[int], "value is a collections.deque"),
    "nested": (dict[str, list[Child]], "value[...][...].wake is a threading.Event"),
    "lock": (threading.Lock, "value "),
    "nested lock": (dict[str, Box[Locked]], "value[...]"),
    "lock in a list": (list[Locked] | None, "value[...].lock "),
    "generic": (Box[asyncio.Event], "value.value is a asyncio.locks.Event"),
    "named tuple": (Named, "value[1] is a threading.Thread"),
    "tuple": (tuple[int, bytes, range], "value[2] is a range"),
    "typed dict": (Options, "value.hook is a collections.abc.Callable"),
    "struct": (Struct, "value.done is a _asyncio.Future"),
    "key": (dict[Path, int], "value[key] is a pathlib.Path"),
    "set": (set[Path], "value[...] is a pathlib.Path"),
    "two classes": (Job | Child, "value can never be saved and loaded: Type unions"),
}


@pytest.mark.parametrize(("annotation", "message"), NEVER.values(), ids=NEVER.keys())
def test_p5_what_can_never_be_saved_is_refused_where_it_is_declared(
    annotation: Any, message: str
) -> None:
    """At any depth, with the path of the field, before anything runs."""
    made = dataclasses.make_dataclass("State", [("value", annotation, None)])

    with pytest.raises(DeclarationError, match="state 'x': ") as caught:
        upgrader.state("x")(made)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    "annotation",
    [Any, object, Hashable, Iterable[int], Mapping[str, Any], Sequence[Job], list["Tree"], T],
)
def test_p5_what_may_be_saved_is_left_to_the_trial(annotation: Any) -> None:
    """Not even an annotation that says nothing is refused."""
    made = dataclasses.make_dataclass("State", [("value", annotation, None)])

    upgrader.state("x")(made)


@upgrader.state("early")
class Early:
    later: "list[Later]" = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Later:
    queue: "asyncio.Queue[int] | None" = None


def test_p5_a_class_that_is_defined_later_is_looked_at_when_it_is_there() -> None:
    """At `instance.state()`, which is still before anything runs."""
    with pytest.raises(DeclarationError, match=r"'early': later\[...\].queue is a asyncio"):
        DeclaredState(Early)


def test_p5_a_class_that_is_never_defined() -> None:
    """It says what to do."""

    @upgrader.state("lost")
    class Lost:
        value: "list[Nowhere] | None" = None  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(DeclarationError, match=r"'lost': .*'Nowhere'.*top level of the module"):
        DeclaredState(Lost)


def test_p5_a_state_of_connections_that_cannot_be_saved_as_it_begins() -> None:
    """No connection could ever move: that is refused as well."""

    @upgrader.state("odd")
    class Odd:
        value: Any = object

    listener = Bound(Kind.LISTENER, "x")
    with pytest.raises(DeclarationError, match="'odd': cannot be saved: value: "):
        Declarations("x").add_connections(Connections(listener, Odd, lambda peer: None))


@pytest.mark.parametrize(
    ("version", "readable_from"), [(0, None), (-1, None), (1, 2), (2, 0), (3, 4)]
)
def test_versions_that_make_no_sense(version: int, readable_from: int | None) -> None:
    """They are refused when declared, with both in the message."""
    with pytest.raises(DeclarationError, match=f"'x'.*version={version}"):
        upgrader.state("x", version=version, readable_from=readable_from)


def test_a_field_of_a_future_version() -> None:
    """A field cannot be newer than its state."""
    with pytest.raises(DeclarationError, match="topic is since 3 > 2"):

        @upgrader.state("x", version=2)
        class X:
            topic: str = upgrader.since(3, default="")


def test_since_needs_a_default() -> None:
    """An older image has no value for it."""
    with pytest.raises(DeclarationError, match="default"):
        upgrader.since(2)


def test_a_dataclass_of_the_authors_stays_one() -> None:
    """With its own options, default factories and all."""

    @upgrader.state("x", version=2)
    @dataclasses.dataclass(kw_only=True, slots=True)
    class Own:
        names: list[str] = dataclasses.field(default_factory=list)
        more: int = upgrader.since(2, default=7)

    assert (Own(names=["a"]), ()) == load(Own, save(Own(names=["a"])))
    saved = SavedState("x", 1, 1, msgspec.msgpack.encode({"names": []}))
    assert (Own(), ()) == load(Own, saved)


def test_only_declared_classes_are_states() -> None:
    """A plain class is none, and neither is one that only inherits from a state."""

    class Plain:
        pass

    class Heir(Room1):
        extra: int = 0

    for cls in (Plain, Heir, int):
        with pytest.raises(DeclarationError, match=r"is not a state \(add @upgrader.state\)"):
            describe(cls)


def test_a_state_may_inherit_from_a_state() -> None:
    """It is declared anew, with its own name and version."""

    @upgrader.state("hall", version=4)
    class Hall(Room1):
        size: int = 1

    assert (Hall(2, 3), ()) == load(Hall, save(Hall(2, 3)))
    assert ("hall", 4) == (describe(Hall).name, describe(Hall).version)
    assert "room" == describe(Room1).name
