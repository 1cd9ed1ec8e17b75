# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loading what is parked: every FD verified, every item claimed, and nothing consumed by a refusal."""

import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import upgrader
from tests.unit.loading import Bench, Counters, Counters3, Session, Session2, Session3, image
from upgrader.errors import (
    ImageError,
    MismatchError,
    RefusedError,
    UnclaimedError,
    UnsavableState,
)
from upgrader.instance.declarations import Connections, Declarations
from upgrader.instance.declared_socket import Bound
from upgrader.instance.freeze import freeze_again
from upgrader.instance.frozen import Frozen
from upgrader.instance.save import Readers, build, insurance
from upgrader.protocol import channel, records
from upgrader.protocol.channel import park
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import Identity, identify
from upgrader.protocol.image import Manifest, ManifestEntry, seal
from upgrader.protocol.kinds import Kind, Waiting
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.state_codec import encode, save
from upgrader.protocol.status_text import Origin


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


def test_everything_is_loaded(bench: Bench) -> None:
    """State, listener, datagrams, and the connection with all that moved along."""
    manifest, fds = image(bench)
    bench.park(manifest, fds)
    loaded = bench.load()

    assert (4, Origin.RESTART, 3, 3, 0) == (
        loaded.status.generation, loaded.status.origin, loaded.status.source_generation,
        loaded.status.fds, loaded.status.left_behind,
    )  # fmt: skip
    assert Counters(5) == bench.declarations.states["counters"].value
    (adopted,) = loaded.adopted
    assert (Session(7), b"half", b"rest") == (
        adopted.session, adopted.state.unread, adopted.state.unsent,
    )  # fmt: skip
    assert [identify(fd) for fd in fds] == [
        identify(owner.socket) for owner in bench.declarations.sockets.values()
    ] + [identify(adopted)]


def test_loading_again_finds_the_same(bench: Bench) -> None:
    """Nothing is consumed or told before the commit, however often it is loaded."""
    manifest, fds = image(bench)
    bench.park(manifest, fds)
    for _ in range(3):
        loaded = bench.load()
        assert 3 == loaded.status.fds
        assert loaded.channel is not None
        loaded.channel.close()  # as the end of the process does
    assert [] == bench.told()


def test_the_commit_is_one_datagram(bench: Bench) -> None:
    """READY=1, the status and the removal of the channel together; then it is spent."""
    manifest, fds = image(bench)
    bench.park(manifest, fds)
    loaded = bench.load()
    loaded.commit(bench.notifier, bench.store, lambda: None)
    ready = [text for text in bench.told() if text.startswith("READY=1")]

    (text,) = ready
    assert text == (
        f"READY=1\nSTATUS={loaded.status.status_text}\nFDSTOREREMOVE=1\nFDNAME=upgrader-channel-3"
    )
    with pytest.raises(upgrader.DeclarationError, match="PID 1 passed none of that name"):
        bench.load()
    assert "FDSTOREREMOVE=1\nFDNAME=upgrader-channel-3" in bench.told()


Change = Callable[[Bench, Manifest, list[Any]], tuple[Manifest, list[Any]]]


def swapped(bench: Bench, manifest: Manifest, fds: list[Any]) -> tuple[Manifest, list[Any]]:
    return manifest, [fds[1], fds[0], fds[2]]


def a_pipe(bench: Bench, manifest: Manifest, fds: list[Any]) -> tuple[Manifest, list[Any]]:
    reading, writing = os.pipe()
    bench.kept += [("x", Fd(reading)), ("y", Fd(writing))]
    return manifest, [bench.kept[-1][1], *fds[1:]]


def another_inode(bench: Bench, manifest: Manifest, fds: list[Any]) -> tuple[Manifest, list[Any]]:
    return manifest, [bench.socket(), *fds[1:]]


def entries(manifest: Manifest, *changed: ManifestEntry) -> Manifest:
    return msgspec.structs.replace(manifest, entries=[*changed])


def lying(**fields: Any) -> Change:
    def change(bench: Bench, manifest: Manifest, fds: list[Any]) -> tuple[Manifest, list[Any]]:
        first, *rest = manifest.entries
        identity = msgspec.structs.replace(first.identity, **fields)
        return entries(manifest, msgspec.structs.replace(first, identity=identity), *rest), fds

    return change


def replaced(**fields: Any) -> Change:
    def change(bench: Bench, manifest: Manifest, fds: list[Any]) -> tuple[Manifest, list[Any]]:
        return msgspec.structs.replace(manifest, **fields), fds

    return change


def renamed(index: int, **fields: Any) -> Change:
    def change(bench: Bench, manifest: Manifest, fds: list[Any]) -> tuple[Manifest, list[Any]]:
        changed = list(manifest.entries)
        changed[index] = msgspec.structs.replace(changed[index], **fields)
        return entries(manifest, *changed), fds

    return change


def twice(bench: Bench, manifest: Manifest, fds: list[Any]) -> tuple[Manifest, list[Any]]:
    return entries(manifest, manifest.entries[0], *manifest.entries), [fds[0], *fds]


def fewer_entries(bench: Bench, manifest: Manifest, fds: list[Any]) -> tuple[Manifest, list[Any]]:
    return entries(manifest, *manifest.entries[:2]), fds


def more_entries(bench: Bench, manifest: Manifest, fds: list[Any]) -> tuple[Manifest, list[Any]]:
    return manifest, fds[:2]


STATE = SavedState("other", 1, 1, b"\x80")
BAD: dict[str, tuple[Change, type[RefusedError], str]] = {
    "swapped FDs": (swapped, MismatchError, "listener of 'door': the manifest says AF_INET SOCK_S"),
    "a pipe": (a_pipe, MismatchError, "listener of 'door': .*the FD is a file of type 0o10000"),
    "another inode": (another_inode, MismatchError, "listener of 'door': the manifest says"),
    "another family": (lying(family=10), MismatchError, "says AF_INET6 .*the FD is AF_INET "),
    "unknown family": (lying(family=9999), MismatchError, "listener of 'door': .*says 9999"),
    "another type": (lying(type=2), MismatchError, "says AF_INET SOCK_DGRAM"),
    "no socket": (lying(file_type=stat.S_IFREG), MismatchError, "listener of 'door'"),
    "a state too much": (replaced(states=[STATE]), UnclaimedError, "state 'other'"),
    "a state twice": (replaced(states=[STATE, STATE]), ImageError, "'other': is in the image 2"),
    "a backend too much": (renamed(0, backend="x"), UnclaimedError, "listener of 'x'"),
    "a listener twice": (twice, ImageError, "listener of 'door': is in the image 2 times"),
    "a connection too much": (renamed(2, backend="x"), UnclaimedError, "connection of 'x'"),
    "a kind too much": (renamed(0, backend="inbox"), UnclaimedError, "listener of 'inbox'"),
    "a kind of others": (renamed(0, kind="acme.dice"), UnclaimedError, "acme.dice of 'door'"),
    "no name of a kind": (renamed(0, kind="x\nMAINPID=1"), ImageError, "is of no kind that can be"),
    "another service": (replaced(service="mail"), ImageError, "of service 'mail', this is 'web'"),
    "too many FDs": (fewer_entries, ImageError, "image: 2 entries, 3 FDs"),
    "too few FDs": (more_entries, ImageError, "image: 3 entries, 2 FDs"),
    "no state of a connection": (
        renamed(2, connection=ConnectionState(Waiting.MESSAGE)), RefusedError, "'session'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_refused(
    change: Change, error: type[RefusedError], message: str, bench: Bench
) -> None:
    """The item is named, and the image is as it was."""
    manifest, fds = change(bench, *image(bench))
    bench.park(manifest, fds)
    channels = [item for item in bench.kept if item[0].startswith("upgrader")]
    bench.kept = [item for item in bench.kept if item not in channels] + channels
    for _ in range(2):
        with pytest.raises(error, match=message):
            bench.load()
    assert [] == bench.told()


def test_another_generation_in_the_image(bench: Bench) -> None:
    """The stream and the image must agree on whose it is."""
    manifest, fds = image(bench)
    with seal(manifest) as memfd:
        park(4, memfd, fds, lambda reader: bench.keep("upgrader-channel-4", reader))
    with pytest.raises(ImageError, match="generation 3, not 4"):
        bench.load()


def test_the_newer_of_two_images(bench: Bench) -> None:
    """It is loaded, whatever their order; the older one is set aside and named."""
    for generations in ((3, 5), (5, 3)):
        older, newer = sorted(generations)
        for _, fd in bench.kept:
            fd.close()
        bench.kept.clear()
        for generation in generations:
            bench.park(*image(bench, generation))
        assert newer == bench.load().status.source_generation
        told = bench.told()

        assert f"FDSTORE=1\nFDNAME=upgrader-aside-{older}\nFDPOLL=0" in told
        assert f"FDSTOREREMOVE=1\nFDNAME=upgrader-channel-{older}" in told
        assert f"FDSTOREREMOVE=1\nFDNAME=upgrader-channel-{newer}" not in told


@pytest.mark.parametrize("make", [lambda: os.memfd_create("x"), lambda: os.open("/", os.O_RDONLY)])
def test_a_channel_that_is_no_socket(make: Callable[[], int], bench: Bench) -> None:
    """It is named and kept under another name, and the instance starts cold."""
    bench.kept.append(("upgrader-channel-3", Fd(make())))
    bench.keep("door", bench.socket())
    bench.keep("inbox", bench.socket(socket.SOCK_DGRAM))
    loaded = bench.load()
    assert Origin.COLD is loaded.status.origin
    loaded.commit(bench.notifier, bench.store, lambda: None)
    told = bench.told()
    assert ["FDSTOREREMOVE=1\nFDNAME=upgrader-channel-3"] == told[:1]
    assert "FDSTORE=1\nFDNAME=upgrader-aside-channel-3\nFDPOLL=0" in told


def test_fields_of_sessions_that_are_dropped_are_named(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for all connections of a door."""
    manifest, fds = image(bench)
    data = msgspec.msgpack.encode(Session2(1, "y"))
    moved = ConnectionState(Waiting.MESSAGE, session=data)
    first = msgspec.structs.replace(manifest.entries[2], connection=moved)
    second = bench.socket()
    manifest = msgspec.structs.replace(
        manifest,
        sessions={"door": SavedState("session", 2, 1, b"")},
        entries=[
            *manifest.entries[:2],
            first,
            msgspec.structs.replace(first, identity=identify(second)),
        ],
    )
    bench.park(manifest, [*fds, second])
    loaded = bench.load()

    assert [Session(1), Session(1)] == [adopted.session for adopted in loaded.adopted]
    assert ["state 'session' of connections of 'door': dropped, unknown to this version: name"] == [
        record.getMessage() for record in caplog.records
    ]
    assert ("state 'session' of connections of 'door': name",) == loaded.status.dropped


def built(bench: Bench, readers: Readers) -> tuple[Manifest, list[Any]]:
    """What version 3 of the program makes of a state and two connections."""
    declarations = Declarations("web")
    declarations.add_state(Counters3).fill(Counters3(5, ["a"]))
    door = Bound(Kind.LISTENER, "door")
    declarations.add_socket(door)
    declarations.add_connections(Connections(door, Session3, lambda peer: None))
    door.open(bench.socket())
    frozen = []
    for number in (1, 2):
        sock = bench.socket()
        moved = ConnectionState(Waiting.MESSAGE, session=encode(Session3(number)))
        frozen.append(Frozen("door", sock, identify(sock), moved))
    manifest, fds = build(declarations, 3, "3", frozen, [], None, readers)
    inbox = bench.socket(socket.SOCK_DGRAM)
    return msgspec.structs.replace(
        manifest,
        entries=[*manifest.entries, ManifestEntry("inbox", Kind.DATAGRAMS, identify(inbox))],
    ), [*fds, inbox]


@pytest.mark.parametrize(
    "readers", [Readers(), Readers({"counters": 2}, {"door": 1}), Readers({"counters": 2}, {})]
)
@pytest.mark.parametrize("session", [Session, Session2, Session3])
def test_p6_connections_take_renamed_fields_down_with_them(
    readers: Readers, session: type, bench: Bench
) -> None:
    """Whether their source knew who comes (live) or not (restart); all dropped fields are told."""
    manifest, fds = built(bench, readers)
    if readers.sessions:
        assert not manifest.earlier
        assert 2 == manifest.sessions["door"].version
        if session is Session3:
            return  # it would never ask for version 1
    bench.park(manifest, fds)
    bench.session = session
    loaded = bench.load()

    expected = {
        Session: [Session(1), Session(2)],
        Session2: [Session2(1, "back"), Session2(2, "back")],
        Session3: [Session3(1), Session3(2)],
    }[session]
    assert expected == [adopted.session for adopted in loaded.adopted]
    # Nobody has heard them: they go on as this version saves them, with or without being saved anew.
    again = [freeze_again(adopted) for adopted in loaded.adopted]
    assert list(map(encode, expected)) == [each.state.session for each in again]
    assert {session is Session3} == {adopted.as_it_came for adopted in loaded.adopted}
    assert Counters(5) == bench.declarations.states["counters"].value
    name = ["state 'session' of connections of 'door': name"] if session is Session else []
    assert ("state 'counters': seen", *name) == loaded.status.dropped


@upgrader.state("odd", version=2, readable_from=1)
class Odd:
    value: Any = 1


@upgrader.convert_back(Odd, 1)
def fails(fields: dict[str, Any]) -> dict[str, Any]:
    raise ValueError("as told")


def test_p5_a_converter_back_that_fails_costs_only_a_downgrade(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a restart the state is parked as it is; a live source serves on instead."""
    declarations = Declarations("web")
    declarations.add_state(Odd).fill(Odd(5))
    manifest, _ = build(declarations, 1, "2", [], [], partial=True)

    assert [save(Odd(5))] == manifest.states
    assert not manifest.unsaved
    assert "'odd' cannot be saved: cannot be converted back to version 1: ValueError" in caplog.text
    with pytest.raises(UnsavableState, match="as told"):
        build(declarations, 1, "2", [], [])


def test_p5_only_a_state_that_cannot_be_saved_is_left_behind() -> None:
    """The others are parked; a live source serves on instead."""
    declarations = Declarations("web")
    declarations.add_state(Counters).fill(Counters(5))
    declarations.add_state(Odd).fill(Odd(len))
    manifest, _ = build(declarations, 1, "2", [], [], partial=True)

    assert [save(Counters(5))] == manifest.states
    assert ["odd"] == manifest.unsaved
    assert [("odd", "state", "value: ")] == [
        (item.backend, item.what, item.why[:7]) for item in manifest.left_behind
    ]
    with pytest.raises(UnsavableState, match="'odd' cannot be saved: value: "):
        build(declarations, 1, "2", [], [])


def test_p6_an_insurance_has_no_forms_of_connections(bench: Bench) -> None:
    """It has no connections."""
    manifest, fds = insurance(*built(bench, Readers()))

    assert [Kind.LISTENER, Kind.DATAGRAMS] == [entry.kind for entry in manifest.entries]
    assert len(fds) == len(manifest.entries)
    assert not manifest.earlier


def test_a_cut_list_is_left_behind(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """What did not cross is named and counted; the rest is loaded."""
    manifest, fds = image(bench)
    far = Identity(1, stat.S_IFSOCK, 2, 1)
    more = msgspec.structs.replace(manifest.entries[2], identity=far)
    reader, writer = channel.pair()
    with (
        seal(entries(manifest, *manifest.entries, more)) as memfd,
        Fd(os.memfd_create("ledger")) as ledger,
        reader,
        writer,
    ):
        bench.keep("upgrader-channel-3", reader)
        channel.send(writer, records.Hello(3, 4), [memfd, ledger], version=records.PARKED)
        channel.send(writer, records.Fds(0, 3), fds, version=records.PARKED)
        channel.send(writer, records.End(3, records.EndReason.CHANNEL_FULL), version=records.PARKED)
    loaded = bench.load()

    assert (3, 1) == (loaded.status.fds, loaded.status.left_behind)
    assert "channel-full" in caplog.text


def test_however_much_is_dropped_systemd_is_told_that_it_is_ready(bench: Bench) -> None:
    """PID 1 takes 4096 bytes: what is longer it drops, READY=1 included."""
    manifest, fds = image(bench)
    names = [f"a field with a long name {number}" + "x" * 500 for number in range(300)]
    data = msgspec.msgpack.encode({"requests": 5, **dict.fromkeys(names, 0)})
    saved = SavedState("counters", 3, 1, data)
    bench.park(msgspec.structs.replace(manifest, states=[saved], unsaved=["x\nREADY=0"]), fds)
    loaded = bench.load()
    loaded.commit(bench.notifier, bench.store, lambda: None)
    (ready,) = [text for text in bench.told() if text.startswith("READY=1")]

    assert 100 == len(loaded.status.dropped)
    assert "100 fields dropped" in ready
    assert "READY=0" not in ready
    assert len(ready) < 4096
