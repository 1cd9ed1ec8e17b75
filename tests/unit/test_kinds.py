# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kinds of backends: how they are named, what they offer, and which FDs they refuse in place of others."""

import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest

from upgrader.backends import BackendKind, Memory, Pipe, Tap
from upgrader.errors import (
    BackendError,
    DeclarationError,
    ImageError,
    IncompatibleState,
    MismatchError,
    Retired,
    UpgradeError,
)
from upgrader.instance.declarations import Declarations
from upgrader.instance.declared_backend import DeclaredBackend
from upgrader.instance.declared_socket import Bound
from upgrader.instance.load import Loader
from upgrader.instance.offer import Offer
from upgrader.instance.save import build, insurance
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import Identity, identify
from upgrader.protocol.image import BackendFacts, ManifestEntry
from upgrader.protocol.kinds import Kind
from upgrader.protocol.parameters import Parameters
from upgrader.protocol.varlink import VarlinkError
from upgrader.systemd.fdstore import FdStore, StoreName
from upgrader.systemd.notify import Notifier
from upgrader.testing import notify_socket


class Counter(BackendKind, name="test.counter"):
    """An eventfd, with what others may change, and what the program knows of it."""

    version = 3
    readable_from = 2
    changing = frozenset({"count"})
    replayable = False

    def __init__(self, start: int = 1) -> None:
        self.start = start
        self.set: list[Mapping[str, Any]] = []

    def open(self) -> int:
        return os.eventfd(self.start)

    def describe(self, fd: int) -> dict[str, Any]:
        count = os.eventfd_read(fd)
        os.eventfd_write(fd, count)
        return {"count": count, "start": self.start}

    def adopt(self, said: Mapping[str, Any]) -> None:
        self.start = said["start"]

    def guard(self, fd: int, said: Mapping[str, Any]) -> None:
        self.set.append(said)


class Failing(BackendKind, name="test.failing"):
    """Raises what no kind should, where it is told to."""

    def __init__(self, where: str) -> None:
        self.where = where

    def open(self) -> int:
        return self._at("open", os.eventfd(0))

    def describe(self, fd: int) -> dict[str, Any]:
        return self._at("describe", {"number": 1})

    def refuse(self, fd: int) -> str:
        return self._at("refuse", "")

    def adopt(self, said: Mapping[str, Any]) -> None:
        self._at("adopt", None)

    def _at(self, place: str, value: Any) -> Any:
        if place == self.where:
            if isinstance(value, int):
                os.close(value)
            raise ZeroDivisionError("of its own")
        return value


@pytest.fixture
def opened() -> Iterator[Callable[[DeclaredBackend], DeclaredBackend]]:
    """Opens backends, and closes them in the end."""
    with ExitStack() as owned:

        def open_one(declared: DeclaredBackend) -> DeclaredBackend:
            declared.use(declared.open())
            owned.callback(declared.close)
            return declared

        yield open_one


Open = Callable[[DeclaredBackend], DeclaredBackend]


def moved(
    source: DeclaredBackend, destination: DeclaredBackend, fds: list[Fd] | None = None, **said: Any
) -> None:
    """Have a destination verify what the source says, of its own FDs or of others."""
    facts = msgspec.structs.replace(source.describe(), **said)
    entries = [
        ManifestEntry(source.name, source.kind.kind, identify(fd)) for fd in fds or source.fds
    ]
    destination.verify(entries, fds or source.fds, facts)
    destination.adopt()


# Names


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "Acme.thing",
        "acme.",
        ".thing",
        "a.b.c",
        "acme.thi:ng",
        "listener",
        "kept",
        "x" * 80,
    ],
)
def test_a_kind_of_others_has_a_dot(name: str) -> None:
    """No other name can be registered; the error says what one looks like."""
    with pytest.raises(DeclarationError, match="a dot after that of its maker"):
        type("Bad", (BackendKind,), {}, name=name)


def test_a_kind_is_defined_once() -> None:
    """A second class of that name says where the first one is."""
    with pytest.raises(DeclarationError, match=rf"defined twice, in {__name__}"):
        type("Again", (BackendKind,), {}, name="test.counter")


def test_what_several_kinds_share_needs_no_name() -> None:
    """It cannot be declared itself."""

    class Base(Counter):
        pass

    class Unnamed(BackendKind):
        def open(self) -> int:
            raise NotImplementedError

        def describe(self, fd: int) -> dict[str, Any]:
            raise NotImplementedError

    assert "test.counter" == Base.kind
    with pytest.raises(DeclarationError, match="without name="):
        Declarations("web").add_backend("x", Unnamed())


def test_a_backend_is_declared_once() -> None:
    """By its name, among all backends, and by its object."""
    declarations = Declarations("web")
    declarations.add_socket(Bound(Kind.LISTENER, "http"))
    memory = Memory(10)
    declarations.add_backend("cache", memory)
    for name, kind in (
        ("cache", Memory(1)),
        ("http", Memory(1)),
        ("other", memory),
        ("a:b", Memory(1)),
    ):
        with pytest.raises(DeclarationError):
            declarations.add_backend(name, kind)
    with pytest.raises(DeclarationError, match="declared twice"):
        declarations.add_socket(Bound(Kind.LISTENER, "cache"))


def test_names_in_the_fd_store() -> None:
    """Library 0.1.0 lets go of all of them by name; no two are alike."""
    names = [
        StoreName.of_kind("tap", "up", 0),
        StoreName.of_kind("tap", "up", 1),
        StoreName.of_kind("tap", "up.1", 0),
        StoreName.of_kept("up"),
        StoreName.of_backend(Kind.LISTENER, "up", 1),
    ]
    assert "upgrader-entry-tap.up" == str(names[0])
    assert len(names) == len({str(name) for name in names})
    assert all(str(name).startswith("upgrader-entry-") for name in names)
    assert names == [StoreName.parse(str(name)) for name in names]


# What moves


def test_numbers_are_there_while_it_is_owned(opened: Open) -> None:
    """Not before it is open, and not once another instance has it."""
    memory = Memory(10)
    declared = DeclaredBackend("cache", memory)
    with pytest.raises(DeclarationError, match="memory 'cache': is not open"):
        memory.fileno()
    opened(declared)
    assert memory.fds == (memory.fileno(),)
    declared.retire()
    with pytest.raises(Retired, match="memory 'cache'"):
        memory.fileno()


def test_what_is_described_is_adopted(opened: Open) -> None:
    """What others may change is not compared, and guarded with what was said."""
    source = opened(DeclaredBackend("hits", Counter(5)))
    kind = Counter(5)
    destination = DeclaredBackend("hits", kind)
    moved(source, destination)
    assert ["start"] == destination.verified
    destination.use(source.fds)
    os.eventfd_write(source.fds[0].fileno(), 1)
    moved(source, destination)
    destination.guard()
    assert [{"count": 6, "start": 5}] == kind.set
    source.serve_on(source.describe())
    assert [{"count": 6, "start": 5}] == source.kind.set  # type: ignore[attr-defined]


def another_memfd(memory: Memory) -> Fd:
    return Fd(memory.open())


def unsealed(memory: Memory) -> Fd:
    fd = Fd(os.memfd_create("x", os.MFD_ALLOW_SEALING))
    os.truncate(fd.fileno(), 4096)
    return fd


def no_memfd(memory: Memory) -> Fd:
    return Fd(os.open("/dev/null", os.O_RDONLY))


@pytest.mark.parametrize("wrong", [another_memfd, unsealed, no_memfd])
def test_a_wrong_fd_for_memory_is_refused_by_name(
    opened: Open, wrong: Callable[[Memory], Fd]
) -> None:
    """Another memfd, one without the seals, another file; even if the manifest has its inode."""
    source = opened(DeclaredBackend("cache", Memory(4096)))
    with wrong(Memory(4096)) as fd, pytest.raises(UpgradeError, match="memory 'cache'") as caught:
        moved(source, DeclaredBackend("cache", Memory(4096)), [fd])
    assert isinstance(caught.value, MismatchError | BackendError)


def test_a_seal_that_is_missing_is_named(opened: Open) -> None:
    """The same memfd as the manifest says, but without the seal that it had there."""
    source = opened(DeclaredBackend("cache", Memory(4096)))
    facts = msgspec.msgpack.decode(source.describe().facts[0])
    facts["seals"] = ["grow", "shrink", "write"]
    with pytest.raises(MismatchError, match=r"seals=\['grow', 'shrink', 'write'\]"):
        moved(source, DeclaredBackend("cache", Memory(4096)), facts=[msgspec.msgpack.encode(facts)])


def test_another_inode_is_refused(opened: Open) -> None:
    """Before the kind is asked."""
    source = opened(DeclaredBackend("hits", Counter()))
    with os.fdopen(os.memfd_create("x")) as file, Fd(os.dup(file.fileno())) as fd:
        entry = ManifestEntry("hits", "test.counter", identify(source.fds[0]))
        with pytest.raises(MismatchError, match=r"test.counter 'hits': the manifest says"):
            DeclaredBackend("hits", Counter()).verify([entry], [fd], source.describe())


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"facts": []}, ImageError),
        ({"facts": [b"\x81"]}, ImageError),
        ({"facts": [b"\xc1" * 10]}, ImageError),
        ({"facts": [b"\x81" * 5000]}, ImageError),
        ({"facts": [msgspec.msgpack.encode([1])]}, ImageError),
        ({"facts": [msgspec.msgpack.encode({"size": "large"})]}, ImageError),
        ({"version": 9, "readable_from": 4}, IncompatibleState),
    ],
)
def test_what_does_not_fit_is_refused(
    opened: Open, said: Mapping[str, Any], error: type[Exception]
) -> None:
    """Counts, types, depth and versions are checked, and the backend is named."""
    source = opened(DeclaredBackend("cache", Memory(4096)))
    with pytest.raises(error, match="memory 'cache'"):
        moved(source, DeclaredBackend("cache", Memory(4096)), **said)


def test_a_later_version_that_can_be_read(opened: Open) -> None:
    """With facts that this one does not know."""
    source = opened(DeclaredBackend("hits", Counter(5)))
    facts = msgspec.msgpack.encode({"start": 5, "later": True})
    moved(source, DeclaredBackend("hits", Counter(5)), version=9, readable_from=3, facts=[facts])


def test_facts_come_back_as_they_are(opened: Open) -> None:
    """A tuple would be a list in the next instance, and another one each time."""

    class Tuples(Counter):
        def describe(self, fd: int) -> dict[str, Any]:
            return {"pair": (1, 2)}

    with pytest.raises(BackendError, match=r"no plain values: .*\(1, 2\)"):
        opened(DeclaredBackend("hits", Tuples())).describe()


@pytest.mark.parametrize("where", ["open", "describe", "refuse", "adopt"])
def test_whatever_a_kind_raises_has_the_name_of_the_backend(opened: Open, where: str) -> None:
    """And what it was asked for."""
    if where in ("open", "refuse"):
        with pytest.raises(BackendError, match=r"test.failing 'x': cannot be .*ZeroDivisionError"):
            opened(DeclaredBackend("x", Failing(where)))
        return
    source = opened(DeclaredBackend("x", Failing("describe" if where == "describe" else "")))
    with pytest.raises(BackendError, match=r"test.failing 'x': cannot .*ZeroDivisionError"):
        moved(source, DeclaredBackend("x", Failing(where)))
    assert "" == DeclaredBackend("x", Failing(where)).show()


def test_what_cannot_be_described_is_left_behind_by_a_restart(opened: Open) -> None:
    """Nobody can serve on with it; a live upgrade is refused, and nothing has changed."""
    declarations = Declarations("web")
    declarations.add_backend("x", Failing("describe"))
    declarations.add_backend("hits", Counter())
    for declared in declarations.backends.values():
        opened(declared)
    with pytest.raises(BackendError):
        build(declarations, 1, "", [], [])
    manifest, fds = build(declarations, 1, "", [], [], partial=True)
    assert ["hits"] == [entry.backend for entry in manifest.entries]
    assert len(fds) == 1
    assert [("x", "test.failing")] == [(e.backend, e.what) for e in manifest.left_behind]
    assert msgspec.UNSET is manifest.unsaved
    manifest, fds = build(declarations, 1, "", [], [], withheld=["x", "hits"])
    assert ([], []) == (manifest.entries, fds)
    assert 1 == manifest.format


def test_what_holds_only_once_is_not_insured(opened: Open) -> None:
    """The FD is in the FD store, and what was said of it is old by then."""
    declarations = Declarations("web")
    declarations.add_backend("hits", Counter())
    declarations.add_backend("cache", Memory(10))
    for declared in declarations.backends.values():
        opened(declared)
    manifest, fds = build(declarations, 1, "", [], [])
    lean, kept = insurance(manifest, fds, {"hits"})
    assert ["cache"] == [entry.backend for entry in lean.entries]
    assert ["cache"] == list(lean.backends or ())
    assert fds[1:] == kept


def test_as_many_fds_as_are_declared(opened: Open) -> None:
    """A backend with another number is refused, whoever has opened it."""
    pipe = opened(DeclaredBackend("jobs", Pipe()))
    with pytest.raises(BackendError, match="pipe 'jobs': it has 1 FDs, and 2 are declared"):
        pipe.require(pipe.fds[:1])

    class Two(Counter):
        def open_all(self) -> list[int]:
            return [self.open(), self.open()]

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BackendError, match="has 2 FDs, and 1 are declared"):
        opened(DeclaredBackend("hits", Two()))
    assert before == len(os.listdir("/proc/self/fd"))


# What is offered


def offer(**changes: Any) -> dict[str, Any]:
    """What a destination with a counter says."""
    declarations = Declarations("web")
    declarations.add_backend("hits", Counter())
    notifier = Notifier("")
    said = Loader(declarations, Parameters(), FdStore(notifier), []).offer()
    return {**said, **changes}


def source(kind: BackendKind) -> Declarations:
    declarations = Declarations("web")
    declarations.add_backend("hits", kind)
    return declarations


def test_an_offer_names_kinds_and_versions() -> None:
    """And all formats of images."""
    said = offer()
    assert ([1, 2, 3, 4], 1) == (said["images"], said["image"])
    assert {"hits": "test.counter"} == said["backend_kinds"]
    assert {"test.counter": 3} == said["kind_versions"]
    assert ["hits"] == said["backends"]
    Offer.read(said, source(Counter()))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"images": None},
            "test.counter 'hits': the library of the new version reads image format",
        ),
        ({"images": [1]}, "needs format 2"),
        ({"images": 2}, "images"),
        ({"backend_kinds": ["hits"]}, "backend_kinds"),
        ({"kind_versions": {"test.counter": "3"}}, "kind_versions"),
        ({"backends": []}, "test.counter 'hits' is not declared by the new version"),
        ({"backend_kinds": {"hits": "memory"}}, "is declared as memory by the new version"),
        ({"kind_versions": {"test.counter": 1}}, "readable from version 2 on"),
    ],
)
def test_an_offer_that_is_not_enough(changes: dict[str, Any], why: str) -> None:
    """Is refused by name before anything is disturbed."""
    with pytest.raises(VarlinkError, match=why):
        Offer.read(offer(**changes), source(Counter()))


def test_what_does_not_move_need_not_be_offered() -> None:
    """Whoever says that it does not; and what is dropped needs no kind."""
    old = offer(images=None, backend_kinds=None, kind_versions=None)
    Offer.read({**old, "withheld": ["hits"]}, source(Counter()))
    Offer.read(old, source(Counter()), lambda name: False)
    Offer.read(offer(backend_kinds={}), source(Counter()))


# Others


def test_a_tap_is_declared_as_the_kernel_takes_it() -> None:
    """Names and sizes are checked."""
    for device in ("", "x" * 16, "a/b", "tap%d"):
        with pytest.raises(DeclarationError):
            Tap(device)
    for named in ({"queues": 0}, {"queues": 257}, {"header": 11}):
        with pytest.raises(DeclarationError):
            Tap("tap0", **named)  # type: ignore[arg-type]
    for size in (0, -1, 1 << 62):
        with pytest.raises(DeclarationError):
            Memory(size)


def test_an_fd_of_something_else_is_no_tap() -> None:
    """Nor is one that is attached to no device."""
    tap = Tap("tap0")
    with open("/dev/null", "rb") as file:
        assert "attached to no device" in tap.refuse(file.fileno())


def test_a_new_memfd_cannot_shrink(opened: Open) -> None:
    """So no access to a mapping fails."""
    memory = Memory(4096)
    opened(DeclaredBackend("cache", memory))
    with pytest.raises(PermissionError):
        os.truncate(memory.fileno(), 1)
    assert fcntl.fcntl(memory.fileno(), fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    with memory.map() as region:
        region[0] = 7
        with memory.map() as again:
            assert 7 == again[0]
        with pytest.raises(OSError, match="busy"):
            memory.seal()
    memory.seal()
    with memory.map() as region, pytest.raises(TypeError):
        region[0] = 8


def test_a_manifest_of_sockets_only_is_no_backend_kind() -> None:
    """The words that version 0.1.0 knows stay its own."""
    said = [ManifestEntry("x", kind, Identity(1, stat.S_IFSOCK)) for kind in Kind]
    assert not any(entry.is_declared_by_kind for entry in said)
    assert ManifestEntry("x", "tap", Identity(1, 0)).is_declared_by_kind
    assert BackendFacts(1, 1, []) == BackendFacts(1, 1, [])


def test_one_open_file_is_told_from_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """By either system call; two FDs with one inode are two, and a duplicate is one."""
    with ExitStack() as owned:
        one, other = (owned.enter_context(Fd(os.eventfd(0))) for _ in range(2))
        again = owned.enter_context(one.duplicate())
        for query in (notify_socket._DUPFD_QUERY, 9999):
            monkeypatch.setattr(notify_socket, "_DUPFD_QUERY", query)
            assert notify_socket.same_open_file(one.fileno(), again.fileno())
            assert not notify_socket.same_open_file(one.fileno(), other.fileno())
