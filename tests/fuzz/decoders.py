# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every decoder of what another process, or a file, says; each with what is done with the result.

Left out is what only systemd itself or the author of the program can write.
"""

import contextlib
import itertools
import json
import os
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec

import upgrader
from tests.fuzz.disk_decoders import disk_decoders
from tests.fuzz.fuzz import Decoder
from tests.fuzz.mutations import change_bytes, change_json, change_msgpack, change_text
from tests.fuzz.tls_decoders import tls_decoders
from tests.unit.units import unit
from upgrader.backends import Memory
from upgrader.backends.listener import Address
from upgrader.cli.history_dump import _image, recounted
from upgrader.cli.overview_text import listed, shown
from upgrader.cli.screen import Screen
from upgrader.errors import (
    ChannelError,
    DeclarationError,
    ImageError,
    IncompatibleState,
    ParameterError,
    ProtocolError,
    RefusedError,
    UnreadableState,
    UpgradeError,
)
from upgrader.hooks import policy
from upgrader.hooks.queue import QueueTurn
from upgrader.instance.control_listener import Places
from upgrader.instance.control_socket import Control
from upgrader.instance.declared_backend import DeclaredBackend
from upgrader.instance.notify_relay import NotifyRelay
from upgrader.instance.phases import News
from upgrader.instance.self_report import SelfReport
from upgrader.protocol import (
    channel,
    connection_secrets,
    image,
    ledger,
    records,
    saved_state,
    state,
    state_codec,
    systemd_syntax,
    table_pieces,
    takeover_line,
    varlink,
)
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.crowd import Crowd
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import Identity, identify
from upgrader.protocol.image import LeftBehind, Manifest, ManifestEntry
from upgrader.protocol.kinds import Kind, Waiting, show_address
from upgrader.protocol.parameters import Parameters
from upgrader.protocol.record_order import Incoming, batches
from upgrader.protocol.table_pieces import Head
from upgrader.protocol.table_reader import TableReader
from upgrader.protocol.varlink import VarlinkError
from upgrader.protocol.varlink_client import call
from upgrader.protocol.varlink_messages import Call
from upgrader.protocol.varlink_types import (
    Backend,
    Connection,
    Description,
    Last,
    Loaded,
    Migration,
    Refusal,
    Started,
    Trial,
)
from upgrader.runner.notifications import Notifications, relayed
from upgrader.systemd import bus_values, listen_fds
from upgrader.systemd.bus import _Connection
from upgrader.systemd.cgroup import unit_of
from upgrader.systemd.fdstore import StoreName
from upgrader.systemd.live_limits import live_limits
from upgrader.takeover.running_instance import RunningInstance, TakeoverError
from upgrader.tool import counts, dump_image, failure_cause, history, hold, instance_client
from upgrader.tool.blockers import all_settings
from upgrader.tool.history_svg import plot
from upgrader.tool.instance_client import InstanceError
from upgrader.tool.overview import Overview
from upgrader.tool.plain_text import plain
from upgrader.tool.prometheus import metrics

_RECORDED = Path(__file__).parent.parent / "unit"
_STREAMS = {path.name: path.read_bytes() for path in (_RECORDED / "streams").glob("*.bin")}
_FRAMES = [data for data in _STREAMS.values() if len(data) == records.RECORD_SIZE]
_UNIT = unit(active_state="active")
_WIDE = Screen()  # no terminal: nothing is wrapped

SAID = Description(
    service="web", version="1.2", unit="web.service", pid=7, generation=3, phase="serving",
    library="0.2", since=1.7e9, credentials="/run/credentials/web.service", changed=["/srv/web.py"],
    late=["json"], expected=True, upgrade="0" * 32, states={"counters": 2},
    trials=[Trial("counters", 2, bytes=10, seconds=0.1, at=1.7e9, problem="no")],
    backends=[Backend("door", "listener", fd=3, address="127.0.0.1:80", inode=7, connections=1, busy=1)],
    connections=1,
    held=[Connection("door", "127.0.0.1:9", fd=4, age=1.0, what="GET /")],
    parameters={"drain-timeout": "5s", "downtime-limit": "300ms"}, overrides={"drain-timeout": "5s"},
    migration=Migration(mode="live", source=2, destination=3, reason="no", times={"frozen": 0.1}),
    started=Started(["door=stream 127.0.0.1:80"], ["key"], memory=4096, settings="00000000"), interface=2,
    last=Last(id="0" * 32, side="source", code="refused", reason="no", mode="live"),
    loaded=Loaded("live", source=2, left_behind=1, pause=0.01, dropped=["counters.old"], unsaved=["other"]),
    refused=Refusal(id="0" * 32, reason="no", fingerprint="abc", since=1.7e9), fingerprint="abc",
)  # fmt: skip
_JOURNAL = {
    "__REALTIME_TIMESTAMP": "1700000000000000", "__MONOTONIC_TIMESTAMP": "1", "MESSAGE": "no licence",
    "MESSAGE_ID": "98e322203f7a4ed290d09fe03c09fe15", "PRIORITY": "3", "_PID": "7", "_TRANSPORT": "stdout",
    "COMMAND": "ExecStart", "EXIT_CODE": "killed", "EXIT_STATUS": "9", "UNIT_RESULT": "signal",
    "INVOCATION_ID": "1" * 32, "UPGRADER_GENERATION": "3", "UPGRADER_SIDE": "source",
    "UPGRADER_PHASE": "migrate", "UPGRADER_OUTCOME": "done", "UPGRADER_MODE": "live",
    "UPGRADER_SOURCE": "1", "UPGRADER_DESTINATION": "2", "UPGRADER_PAUSE_USEC": "1000",
    "UPGRADER_SECONDS": "0.5", "UPGRADER_FDS": "3", "UPGRADER_BYTES": "9", "UPGRADER_LEFT_BEHIND": "1",
    "UPGRADER_TIMES": "setup=0.1 frozen=0.001", "UPGRADER_REASON": "no",
}  # fmt: skip


@upgrader.state("inner")
class _Inner:
    when: float = 0.0
    words: list[str] = field(default_factory=list)


@upgrader.state("fuzzed")
class _State:
    total: int = 0
    names: dict[str, int] = field(default_factory=dict)
    inner: _Inner | None = None


_MANIFEST = Manifest(
    "web", 3, "1.2", 10**12,
    states=[saved_state.SavedState("counters", 2, 1, b"\x81\xa1a\x01", {1: b"\x80"}, 7)],
    sessions={"door": saved_state.SavedState("session", 1, 1, b"")},
    entries=[
        ManifestEntry("door", Kind.LISTENER, Identity(7, 0o140000, 2, 1, "127.0.0.1:80"), 9),
        ManifestEntry("door", Kind.CONNECTION, Identity(8, 0o140000, 2, 1),
                      connection=ConnectionState(Waiting.MESSAGE, b"GET", b"x", b"\x80")),
        ManifestEntry("uplink", "tap", Identity(105, 0o20000)),
    ],
    left_behind=[LeftBehind("door", "127.0.0.1:9", "busy")],
    parameters={"drain-timeout": "5s"}, passed=["door"], activated=["door=stream"],
    unsaved=["other"], earlier={1: {1: b"\x80"}},
    backends={"uplink": image.BackendFacts(1, 1, [b"\x81\xa6device\xa4tap0"])},
)  # fmt: skip


def _order(data: bytes) -> None:
    """One frame after the other, each with as many FDs as its first byte says."""
    incoming = Incoming()
    for at in range(0, len(data), records.RECORD_SIZE + 1):
        frame = data[at + 1 : at + 1 + records.RECORD_SIZE]
        incoming.receive(records.decode(frame), data[at])


def _parked(data: bytes) -> None:
    """As PID 1 passes it: the first record has the image and the ledger, each other one an FD."""
    reader, writer = channel.pair()
    with reader, writer, ledger.new_ledger() as attempts, image.seal(_MANIFEST) as memfd:
        reader.setblocking(False)
        for at in range(0, len(data), records.RECORD_SIZE):
            frame = data[at : at + records.RECORD_SIZE]
            fds = [memfd.fileno(), attempts.fileno()] if at == 0 else [memfd.fileno()]
            with contextlib.suppress(BlockingIOError):
                writer.setblocking(False)
                socket.send_fds(writer, [frame], [] if b"end" in frame else fds)
        parked = channel.ParkedChannel(Fd(os.dup(reader.fileno())).socket(), "x")
        try:
            if parked.open():
                parked.count_attempt()
                parked.peek()
                image.unseal(parked.image)
        finally:
            parked.close()


def _memfd(data: bytes) -> Fd:
    memfd = Fd(os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.write(memfd.fileno(), data)
    image.protect(memfd)
    return memfd


def _with_header(document: bytes) -> bytes:
    header = struct.pack(
        "!8sIIQ", image.MAGIC, image.FORMATS[-1], zlib.crc32(document), len(document)
    )
    return header + document


@upgrader.state("tables")
class _Tables:
    names: upgrader.Table[str, int] = field(default_factory=upgrader.Table)


def _piece_of(frame: bytes) -> bytes:
    """A piece of a table of these, with one frame behind its head."""
    head = msgspec.msgpack.encode(Head("tables", "names", 1, 7))
    document = b"".join(struct.pack("!I", len(data)) + data for data in (head, frame))
    header = image.HEADER.pack(table_pieces.MAGIC, 1, zlib.crc32(document), len(document))
    return header + document


def _piece(data: bytes) -> None:
    reader = TableReader({"tables": state.describe(_Tables)})
    with _memfd(data) as memfd:
        reader.add(memfd)


def _secrets(data: bytes) -> None:
    with Fd(os.memfd_create("fuzz", os.MFD_CLOEXEC)) as memfd:
        os.write(memfd.fileno(), data)
        connection_secrets.read(memfd)


def _unseal(data: bytes) -> None:
    with _memfd(data) as memfd:
        for crowd in image.unseal(memfd).crowds or ():
            crowd.check()
            assert len(crowd) == len(crowd.each_session) == len(crowd.numbers)
            crowd.identity(len(crowd) - 1), crowd.state(len(crowd) - 1)
        image.checksum(memfd)


def _dumped(place: Path) -> Callable[[bytes], None]:
    path = place / "image"

    def run(document: bytes) -> None:
        path.write_bytes(_with_header(document))
        dumped = dump_image.of_file(str(path))
        msgspec.json.encode(dumped)
        for text in _image(_WIDE, dumped):
            assert text.replace("\n", "").isprintable()

    return run


_KNOWN: dict[str, Any] = {"device": 1, "inode": 4711, "size": 4096, "seals": ["grow", "shrink"]}


class _Known(Memory, name="fuzz.memory"):
    """Memory of which these facts are true."""

    def describe(self, fd: int) -> Any:
        return _KNOWN


def _facts(data: bytes) -> None:
    """Of a backend; adopted if they fit."""
    declared = DeclaredBackend("cache", _Known(4096))
    fds = declared.open()
    try:
        entries = [ManifestEntry("cache", "fuzz.memory", identify(fd)) for fd in fds]
        declared.verify(entries, fds, image.BackendFacts(1, 1, [data]))
        declared.adopt()
    finally:
        for fd in fds:
            fd.close()


def _ledger(data: bytes) -> None:
    with Fd(os.memfd_create("fuzz", os.MFD_CLOEXEC)) as memfd:
        os.write(memfd.fileno(), data)
        ledger.is_taken_back(memfd)
        ledger.count_attempt(memfd)


def _state(data: bytes) -> None:
    state_codec.load(_State, saved_state.SavedState("fuzzed", 1, 1, data))


def _saved(data: bytes) -> None:
    """As it comes out of an image."""
    try:
        saved = msgspec.msgpack.decode(data, type=saved_state.SavedState)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return
    state_codec.load(_State, saved)


def _body(data: bytes) -> None:
    size = min(len(data), records.RECORD_SIZE - 8)
    frame = struct.pack("!4sHH", records.MAGIC, 2, size) + data
    records.decode(frame[: records.RECORD_SIZE].ljust(records.RECORD_SIZE, b"\0"))


def _call(data: bytes) -> None:
    msgspec.convert(varlink.decode(data), Call)


def _reply(data: bytes) -> None:
    here, there = socket.socketpair()
    with here, there:
        there.setblocking(False)
        there.send(data[:100_000] + b"\0")
        there.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(BrokenPipeError):  # of the call itself
            here.settimeout(1)
            call(here, "x", {})


class _Answers:
    """Answers every question of a control socket at once, with nothing."""

    def query(self) -> News:
        return News(Migration(), 0)

    def migrate(self, sock: socket.socket) -> None:
        sock.close()

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: {}


def _control(
    place: Path, stack: contextlib.ExitStack, name: str = "socket"
) -> Callable[[bytes], None]:
    """Whatever one client says, another one is answered."""
    path = place / name
    control = Control(Places(str(place / "socket")), _Answers(), "0")
    stack.callback(control.close)
    control.open()

    def ask(data: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(path))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(data + b"\0")
                sock.shutdown(socket.SHUT_WR)
                return sock.recv(65536)
            return b""

    def run(data: bytes) -> None:
        ask(data)
        assert ask(b'{"method":"io.upgrader.Instance.Describe"}') == b"{}\0"

    return run


def _shown(data: bytes) -> None:
    """What an instance says, as every verb shows it."""
    said = instance_client._description(varlink.decode(data))
    status = instance_client.status(said)
    held = hold.standing(_UNIT, said, user=True)
    found = Overview(
        "web.service", "active (running)", True, 7, status, said, "", True, status.refused,
        (said,), held, ("upgrader-listener-door",),
    )  # fmt: skip
    for there in (_WIDE, Screen(80)):
        text = [*shown(there, found, 1.7e9), listed(there, [found], 1.7e9), metrics([found])]
        assert "".join(text).replace("\n", "").isprintable()
    assert len(listed(_WIDE, [found], 1.7e9).splitlines()) == 2
    found.json()


def _at_takeover(data: bytes) -> None:
    live_limits(_UNIT, RunningInstance.from_answer(varlink.decode(data)).running)


def _line(data: bytes) -> None:
    word = takeover_line.decode(data)
    if word is not None:
        assert len(takeover_line.encode(word)) <= takeover_line.LIMIT
        takeover_line.encode_1(word)


def _cause(data: bytes) -> None:
    entries = list(failure_cause.parse(data.decode(errors="replace").splitlines(), 0))
    failure_cause.cause(entries, _UNIT)
    failure_cause.reported(entries, "0" * 32)
    failure_cause.killed(entries)
    failure_cause.last_words(entries)


def _history(data: bytes) -> None:
    events = list(history.parse(data.decode(errors="replace").splitlines()))
    history.encode(events)
    past = history.upgrades(events)
    ElementTree.fromstring(plot("web.service", past))
    assert len(recounted(_WIDE, past).splitlines()) == 1 + len(past)


def _hold_file(place: Path) -> Callable[[bytes], None]:
    path = place / "upgrader/hold/web.service"
    path.parent.mkdir(parents=True)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = hold.read("web.service", user=True)
        assert found is not None
        assert plain(str(found)).isprintable()
        hold.standing(_UNIT, SAID, user=True)

    return run


def _count_file(place: Path) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        (place / "web.service").write_bytes(data)
        counts.add("web.service", SAID.migration, place)

    return run


def _queue_files(place: Path) -> Callable[[bytes], None]:
    for name in ("filed", "claimed", "last"):
        (place / name).mkdir()

    def run(data: bytes) -> None:
        for name in ("filed", "claimed", "last"):
            (place / name / "web.service").write_bytes(data)
        turn = QueueTurn(place, "web.service")
        assert turn.origins or not data.strip()
        msgspec.json.encode(turn.last)
        turn.claim()
        turn.served(True, "done")

    return run


def _policy_file(place: Path) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        (place / "x.conf").write_bytes(data)
        policy.decide("web.service", policy.read([place]))

    return run


def _environment(data: bytes) -> None:
    pairs = (line.partition("=") for line in data.decode(errors="surrogateescape").splitlines())
    environment = {name: value for name, _, value in pairs}
    Parameters.unknown(environment)
    parameters = Parameters.from_environment(environment)
    assert Parameters().updated(parameters.shown(), ()).shown() == parameters.shown()


def _set(data: bytes) -> None:
    values = varlink.decode(data)
    if not all(isinstance(v, str) for v in values.values()):
        return  # the instance has refused it by then
    Parameters().updated(values, ("door",)).shown()


def _span(data: bytes) -> None:
    text = data.decode(errors="replace")
    with contextlib.suppress(ValueError):
        systemd_syntax.boolean(text)
    systemd_syntax.show_span(systemd_syntax.time_span(text))


def _listen(data: bytes) -> None:
    """With two FDs from number 900 on."""
    count, _, names = data.decode(errors="surrogateescape").partition("\n")
    own = str(os.getpid())
    with open("/dev/null") as null:
        first, listen_fds.FIRST = listen_fds.FIRST, 900
        try:
            for number in (900, 901):
                os.dup2(null.fileno(), number)
            environment = {"LISTEN_PID": own, "LISTEN_FDS": count, "LISTEN_FDNAMES": names}
            with contextlib.suppress(DeclarationError):
                for passed in listen_fds.take(environment):
                    passed.fd.close()
        finally:
            listen_fds.FIRST = first
            for number in (900, 901):
                with contextlib.suppress(OSError):
                    os.close(number)


def _names(data: bytes) -> None:
    text = data.decode(errors="surrogateescape")
    if (name := StoreName.parse(text)) is not None:
        assert str(name) == text
        assert isinstance(name.kept, str)


def _properties(data: bytes) -> None:
    """Of a unit: texts are of the admin or the service, types and lengths are
    systemd's, and D-Bus has no NUL in a text."""
    data = data.replace(b"\0", b"")[:256]
    text = data.decode(errors="replace")
    values: dict[str, Any] = dict.fromkeys(
        ("Id", "StatusText", "User", "Type", "NotifyAccess", "KillMode", "ProtectProc", "Result"),
        data,
    ) | {"Names": text.split(), "Environment": text.split("\n"), "RuntimeDirectory": text.split()}
    found = type(_UNIT).from_properties("/x", values)
    live_limits(found)
    list(all_settings(found))


def _wire(data: bytes) -> None:
    for signature in ("a{sv}", "a(usssoo)", "v", "as", "a(ssssssouso)", "s"):
        with contextlib.suppress(ValueError):
            bus_values.read(signature, data)


def _message(data: bytes) -> None:
    bus_values.read("yyyyuua(yv)", data)


class _Pid1Socket(socket.socket):
    """One end of a pair, whose other end is reached already."""

    def connect(self, address: object) -> None:
        """Nothing to do."""


def _framing(data: bytes) -> None:
    """What PID 1, or who has its place, says from the first byte of a connection on."""
    here, there = socket.socketpair()
    with there, _Pid1Socket(fileno=here.detach()) as sock:
        there.setblocking(False)
        there.send(data[:100_000])
        there.shutdown(socket.SHUT_WR)
        connection = _Connection(sock, time.monotonic() + 10)
        connection.authenticate("")
        body = connection.call("x", "/x", "x", "x", "argument")
        with contextlib.suppress(ValueError):
            bus_values.read("v", body)


def _bus_reply(serial: int, body: bytes) -> bytes:
    """A reply to the call of that serial, with a variant in it."""
    fields = struct.pack("<B2sxI", 5, b"\1u", serial)
    head = struct.pack("<4BII", ord("l"), 2, 0, 1, len(body), 7) + struct.pack("<I", len(fields))
    return head + fields + body


def _relayed(place: Path, stack: contextlib.ExitStack) -> Callable[[bytes], None]:
    """Whatever the program says, with an FD or without one, its next word reaches PID 1."""
    pid1 = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    pid1.bind(str(place / "notify"))
    pid1.settimeout(10)
    environment = {"NOTIFY_SOCKET": str(place / "notify")}
    report = SelfReport("web", "1", environment)
    stack.callback(report.close)
    relay = NotifyRelay(report, environment, live=False)
    stack.callback(relay.close)
    sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    sock.connect(environment["NOTIFY_SOCKET"].replace("@", "\0", 1))
    words = itertools.count()

    def run(data: bytes) -> None:
        with open("/dev/null") as null:
            socket.send_fds(sock, [data[:100_000]], [null.fileno()] * (len(data) % 3))
        word = b"STATUS=word %d" % next(words)
        sock.send(word)
        while (heard := socket.recv_fds(pid1, 65536, 3))[0] != word:
            assert b"READY=1" not in heard[0].split(b"\n")
            for number in heard[1]:
                os.close(number)

    return run


def _to_runner(stack: contextlib.ExitStack) -> Callable[[bytes], None]:
    """Whatever a program says that a runner has started, its next word is heard."""
    heard: list[Mapping[str, str]] = []
    runner = Notifications(heard.append)
    stack.callback(runner.close)
    runner.program = os.getpid()
    sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    sock.connect(runner.address.replace("@", "\0", 1))

    def run(data: bytes) -> None:
        heard.clear()
        with open("/dev/null") as null:
            socket.send_fds(sock, [data[:100_000]], [null.fileno()] * (len(data) % 3))
        sock.send(b"X=next")
        runner.receive()
        assert {"X": "next"} == heard[-1]
        for fields in heard:
            assert not [line for line in relayed(fields) if "\n" in line]

    return run


def _address(data: bytes) -> None:
    """As an author, an admin's variable or an option names it; no name is looked up in a network."""
    look_up = socket.getaddrinfo

    def without_network(*arguments: Any, flags: int = 0, **more: Any) -> Any:
        return look_up(*arguments, flags=flags | socket.AI_NUMERICHOST, **more)

    socket.getaddrinfo = without_network
    try:
        for address in Address.parse(data.decode(errors="surrogateescape")):
            show_address(address.name)
    finally:
        socket.getaddrinfo = look_up


def _bus_seeds() -> Iterator[bytes]:
    for sides in json.loads((_RECORDED / "recorded/bus.json").read_text()).values():
        for messages in sides.values():
            yield from (bytes.fromhex(each) for each in messages if each.startswith("6c"))


def _bodies() -> Iterator[bytes]:
    for each in _bus_seeds():
        size = int.from_bytes(each[4:8], "little")
        if size:
            yield each[-size:]


def decoders(place: Path, stack: contextlib.ExitStack) -> list[Decoder]:
    """All of them; files of theirs are in `place`, an empty directory, and `stack` closes the rest."""

    def own(name: str) -> Path:
        path = place / name
        path.mkdir()
        return path

    os.environ["XDG_STATE_HOME"] = str(place / "state")
    answer = msgspec.json.encode(SAID)
    journal = json.dumps(_JOURNAL).encode()
    document = msgspec.msgpack.encode(_MANIFEST)
    crowds = [Crowd("door", 2, 1, "127.0.0.1:80", bytes(24), [b"\x80"] * 3)]
    columns = msgspec.msgpack.encode(image.in_columns(_MANIFEST, crowds))
    facts = msgspec.msgpack.encode(_KNOWN)
    complete = records.EndReason.COMPLETE
    large = (records.Hello(1, 254), *batches(254), records.End(254, complete))
    small = (records.Hello(1, 2), records.Fds(0, 1), records.Fds(1, 1), records.End(2, complete))
    counted = b"".join(
        bytes([fds]) + records.encode(record, 1)
        for fds, record in zip((2, 253, 1, 0), large, strict=True)
    )
    parked = b"".join(records.encode(record, records.PARKED) for record in small)
    fields = msgspec.msgpack.encode(
        {"total": 1, "names": {"a": 1}, "inner": {"when": 1.0, "words": ["x"]}}
    )
    saved = msgspec.msgpack.encode(saved_state.SavedState("fuzzed", 1, 1, fields))
    hold_seed = msgspec.json.encode(hold.Hold.now("web.service", "no", "abc"))
    served = json.dumps({"ended": 1.0, "done": True, "line": "done"}).encode()
    environment = (
        b"UPGRADER=on\nUPGRADER_DRAIN_TIMEOUT=1min 30s\nUPGRADER_LOAD_ATTEMPTS=3\nUPGRADER_MODE=live\n"
        b"UPGRADER_BACKEND_TRANSFER=yes door=no\nUPGRADER_DISCARD=3"
    )
    settings = b'{"drain-timeout": "1min", "backend-transfer.door": "no", "backend-transfer": "yes", "mode": "live"}'
    opened = b"OK 0123456789abcdef\r\n"
    text = b"\1s\0\0\4\0\0\0done\0"
    framed = [
        opened + _bus_reply(7, text) + _bus_reply(1, text),
        opened + _bus_reply(1, b"\1u\0\0\7\0\0\0"),
    ]
    notes = [
        b"READY=1\nSTATUS=serves\nMAINPID=7", b"STATUS=\xe2\x80\xa8READY=1", b"FDSTORE=1\nFDNAME=mine", b"WATCHDOG=1",
        b"EXTEND_TIMEOUT_USEC=1000000\nERRNO=2\nSTOPPING=1\nRELOADING=1\nMONOTONIC_USEC=1", b"BARRIER=1",
    ]  # fmt: skip
    addresses = [
        b"127.0.0.1:80",
        b"[::1]:80",
        b":80",
        b"0.0.0.0:65535",
        b"unix:/run/web.sock",
        b"unix:@web",
    ]
    calls = [
        json.dumps(
            {"method": f"io.upgrader.Instance.{name}", "parameters": values, **more}
        ).encode()
        for name, values, more in (
            ("Describe", {}, {}),
            ("QueryMigration", {}, {"more": True}),
            ("SetParameters", {"parameters": {"mode": "live"}}, {}),
            ("Register", {"pid": 7, "upgrade": "0" * 32}, {"oneway": True}),
            ("Revoke", {"pid": 7, "why": "no", "code": "refused"}, {}),
            ("Migrate", {"stream": 1, "states": {"a": 1}, "backends": ["x"]}, {"upgrade": True}),
        )
    ]
    group = b"0::/system.slice/web.service/worker\n12:name=systemd:/system.slice/web.service"
    frames = [frame[8 : 8 + int.from_bytes(frame[6:8], "big")] for frame in _FRAMES]
    return [
        Decoder("record", records.decode, (ProtocolError,), _FRAMES, change_bytes),
        Decoder("body of a record", _body, (ProtocolError,), frames, change_msgpack),
        Decoder("order of records", _order, (ProtocolError,), [counted], change_bytes),
        Decoder("parked channel", _parked, (RefusedError, ChannelError), [parked], change_bytes),
        Decoder("image", _unseal, (ImageError,), [_with_header(document), _STREAMS["v1-image.bin"], _STREAMS["v1-image-tls.bin"], _STREAMS["v4-image.bin"]], change_bytes),
        Decoder("manifest", lambda data: _unseal(_with_header(data)), (ImageError,), [document, columns], change_msgpack),
        Decoder("piece of a table", _piece, (ImageError, UnreadableState), [_piece_of(b"\x92\x81\xa1a\x01\x91\xa1b")], change_bytes),
        Decoder("keys of a table", lambda data: _piece(_piece_of(data)), (ImageError, UnreadableState), [b"\x92\x81\xa1a\x01\x91\xa1b"], change_msgpack),
        Decoder("secrets of connections", _secrets, (ImageError,), [b"UPGSECR\1\x81\x07\xc4\x01x"], change_bytes),
        Decoder("facts of a backend", _facts, (RefusedError,), [facts], change_msgpack),
        Decoder("dump of a manifest", _dumped(own("dump")), (UpgradeError,), [document], change_msgpack),
        Decoder("ledger", _ledger, (ProtocolError,), [b"\0\0\0\1\0"], change_bytes),
        Decoder("state", _state, (UnreadableState,), [fields], change_msgpack),
        Decoder("saved state", _saved, (UnreadableState, IncompatibleState),
                [saved], change_msgpack),
        Decoder("varlink call", _call, (ValueError, msgspec.MsgspecError),
                [b'{"method":"a.B","parameters":{"pid":1,"states":{"a":1},"kinds":["x"]},"more":true}'], change_json),
        Decoder("control socket", _control(own("control"), stack), (), calls, change_json),
        Decoder(
            "status.sock", _control(own("read"), stack, "status.sock"), (), calls, change_json
        ),
        Decoder("varlink reply", _reply, (VarlinkError, OSError),
                [b'{"parameters":' + answer + b"}", b'{"continues":true}'], change_json),
        Decoder("answer to Describe", _shown, (ValueError, InstanceError), [answer], change_json),
        Decoder("answer to Describe, at takeover", _at_takeover, (ValueError, TakeoverError), [answer], change_json),
        Decoder("line to takeover", _line, (),
                [b'{"said": "failed", "code": "load-failed", "reason": "no"}', b"failed: no"], change_json),
        Decoder("journal", _cause, (), [journal, journal + b"\n" + journal], change_json),
        Decoder("history", _history, (), [journal, journal + b"\n" + journal], change_json),
        Decoder("hold file", _hold_file(place / "state"), (), [hold_seed], change_json),
        Decoder("count file", _count_file(own("count")), (), [b'{"done":1,"failed":2,"last":{"phase":"done","mode":"live","began":1.0}}'], change_json),
        Decoder("queue files", _queue_files(own("queue")), (), [served, b"installed\nstale\n"], change_json),
        Decoder("policy file", _policy_file(own("policy")), (), [b"# x\nweb@*.service = live\n* = never"], change_text),
        Decoder("environment", _environment, (DeclarationError,), [environment], change_text),
        Decoder("parameters", _set, (ParameterError, ValueError), [settings], change_json),
        Decoder("time span", _span, (ValueError,), [b"1min 30s", b"infinity", b"500ms 3us"], change_text),
        Decoder("LISTEN_FDS", _listen, (), [b"2\ndoor:other", b"0\n"], change_text),
        Decoder("name in the FD store", _names, (),
                [b"upgrader-channel-3", b"upgrader-entry-kept.x", b"upgrader-image-1"], change_text),
        Decoder("properties of a unit", _properties, (), [b"web.service notify exec root"], change_text),
        Decoder("D-Bus message", _message, (ValueError,), [*_bus_seeds()], change_bytes),
        Decoder("D-Bus framing", _framing, (OSError, ValueError, struct.error, IndexError), framed, change_bytes),
        Decoder("notify relay", _relayed(own("relay"), stack), (OSError,), notes, change_text),
        Decoder("runner's datagrams", _to_runner(stack), (OSError,), notes, change_text),
        Decoder("address", _address, (DeclarationError,), addresses, change_text),
        Decoder("D-Bus body", _wire, (), [*_bodies()], change_bytes),
        *tls_decoders(),
        *disk_decoders(),
        Decoder("cgroup", lambda data: unit_of(data.decode(errors="replace")), (), [group], change_text),
    ]  # fmt: skip
