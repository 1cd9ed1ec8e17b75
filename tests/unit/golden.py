# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is committed of stream versions 1 to 3 and image formats 1 to 4: every later version must read it.

`python -m tests.unit.golden` writes the files; a released one is never written again.
"""

import os
import stat
from array import array
from pathlib import Path

from upgrader.codes import Code
from upgrader.protocol import records
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.crowd import Crowd
from upgrader.protocol.identity import Identity
from upgrader.protocol.image import (
    BackendFacts,
    LeftBehind,
    Manifest,
    ManifestEntry,
    ManifestOverTls,
    in_columns,
    seal,
)
from upgrader.protocol.kinds import Kind, Waiting
from upgrader.protocol.saved_state import SavedState
from upgrader.protocol.table_pieces import Head, Writing
from upgrader.protocol.tls_state import TlsState

STREAMS = Path(__file__).with_name("streams")

#: By the version of the stream.
FRAMES: dict[int, dict[str, records.Record]] = {
    1: {
        "hello": records.Hello(generation=3, fds=300),
        "fds-first": records.Fds(first=0, count=253),
        "fds-last": records.Fds(first=253, count=47),
        "end-complete": records.End(sent=300, reason=records.EndReason.COMPLETE),
        "end-in-flight": records.End(sent=253, reason=records.EndReason.TOO_MANY_IN_FLIGHT),
        "end-full": records.End(sent=253, reason=records.EndReason.CHANNEL_FULL),
        "go": records.Go(),
        "progress": records.Progress(loaded=253),
        "ack": records.Ack(),
        "abort": records.Abort("VerifyError: no"),
    },
    2: {
        "hello": records.Hello(generation=3, fds=300),
        "fds": records.Fds(first=0, count=253),
        "end": records.End(sent=300, reason=records.EndReason.COMPLETE),
        "go": records.Go(),
        "progress": records.Progress(loaded=253),
        "ack": records.Ack(generation=3, image=0xDEADBEEF),
        "abort": records.abort(Code.STATE_INCOMPATIBLE, "IncompatibleState: state 'counters'"),
    },
    3: {"table-piece": records.TablePiece(number=7)},
}
#: (version, name of the file without its end, record)
ALL_FRAMES = [
    (version, f"v{version}-{name}", record)
    for version, frames in FRAMES.items()
    for name, record in frames.items()
]

PIECE = "v1-piece"
IMAGE = "v1-image"
MANIFEST = Manifest(
    service="web",
    generation=3,
    program="2.1",
    frozen_at=123_456_789_000,
    states=[SavedState("counters", 2, 1, b"\x81\xa8requests\x07")],
    sessions={"http": SavedState("session", 1, 1, b"")},
    entries=[
        ManifestEntry("http", Kind.LISTENER, Identity(11, stat.S_IFSOCK, 2, 1, "127.0.0.1:80")),
        ManifestEntry("local", Kind.LISTENER, Identity(12, stat.S_IFSOCK, 1, 1, "/run/web"), 99),
        ManifestEntry("dns", Kind.DATAGRAMS, Identity(13, stat.S_IFSOCK, 10, 2, "[::]:53")),
        ManifestEntry(
            "http",
            Kind.CONNECTION,
            Identity(14, stat.S_IFSOCK, 2, 1, "127.0.0.1:80"),
            0,
            ConnectionState(Waiting.MESSAGE, b"GET /", b"\xff\x00", b"\x80"),
        ),
        ManifestEntry(
            "http",
            Kind.CONNECTION,
            Identity(15, stat.S_IFSOCK, 2, 1, "127.0.0.1:80"),
            0,
            ConnectionState(Waiting.SAFE),
        ),
        ManifestEntry(
            "http",
            Kind.CONNECTION,
            Identity(16, stat.S_IFSOCK, 2, 1, "127.0.0.1:80"),
            0,
            ConnectionState(Waiting.CLOSING, unsent=b"rest"),
        ),
    ],
    left_behind=[LeftBehind("http", "127.0.0.1:5000", "its handler is busy")],
)
#: By the name of its file: an image of each format.
IMAGES = {
    IMAGE: MANIFEST,
    "v2-image": Manifest(
        service="switch",
        generation=4,
        program="2.2",
        frozen_at=123_456_789_000,
        entries=[
            MANIFEST.entries[0],
            ManifestEntry("cache", "memory", Identity(4711, stat.S_IFREG)),
            ManifestEntry("uplink", "tap", Identity(105, stat.S_IFCHR)),
            ManifestEntry("uplink", "tap", Identity(105, stat.S_IFCHR)),
            ManifestEntry("dice", "acme.dice", Identity(12, 0)),
        ],
        backends={
            "cache": BackendFacts(1, 1, [b"\x81\xa4size\xcd\x10\x00"]),
            "uplink": BackendFacts(3, 2, [b"\x81\xa6device\xa4tap0", b"\x81\xa6device\xa4tap0"]),
            "dice": BackendFacts(1, 1, [b"\x80"]),
        },
    ),
    "v3-image": Manifest(
        service="web",
        generation=5,
        program="2.3",
        frozen_at=123_456_789_000,
        states=[
            SavedState(
                "rooms", 1, 1, b"\x81\xa5users\x80", shape=7, tables={"users": [1, 2**32 - 1]}
            )
        ],
        entries=[
            MANIFEST.entries[0],
            ManifestEntry("table", Kind.TABLE, Identity(18, stat.S_IFREG)),
        ],
    ),
    "v4-image": in_columns(
        Manifest(
            service="web",
            generation=6,
            program="2.4",
            frozen_at=123_456_789_000,
            sessions={"http": SavedState("session", 1, 1, b"")},
            entries=MANIFEST.entries[:1],
        ),
        [
            Crowd("http", 2, 1, "127.0.0.1:80", array("Q", [21, 22]).tobytes(), [b"\x80"]),
            Crowd("http", 10, 1, "[::1]:80", array("Q", [23, 24]).tobytes(), [b"\x80", b"\x81"]),
        ],
    ),
    "v1-image-tls": ManifestOverTls(
        service="web",
        generation=3,
        program="2.1",
        frozen_at=123_456_789_000,
        entries=[
            *MANIFEST.entries[:1],
            MANIFEST.entries[4],
            ManifestEntry("tls", Kind.SECRETS, Identity(17, stat.S_IFREG)),
        ],
        tls={
            1: TlsState(
                "TLS_AES_256_GCM_SHA384",
                7,
                9,
                b"\x17\x03\x03",
                True,
                512,
                "http/1.1",
                True,
                b"0\x82",
                {"subject": [[["commonName", "x"]]]},
                b"binding",
            )
        },
    ),
}


def image_bytes(manifest: Manifest = MANIFEST) -> bytes:
    """What is in the memfd of a manifest."""
    with seal(manifest) as memfd:
        return os.pread(memfd.fileno(), 1 << 20, 0)


def piece_bytes() -> bytes:
    """What is in the memfd of a piece of a table."""
    writing = Writing(Head("rooms", "users", 1, 7))
    writing.add({"a": ["A"]}, [])
    writing.add({}, ["b", "c"])
    with writing.seal().memfd as memfd:
        return os.pread(memfd.fileno(), 1 << 20, 0)


if __name__ == "__main__":
    STREAMS.mkdir(exist_ok=True)
    for version, name, record in ALL_FRAMES:
        (STREAMS / f"{name}.bin").write_bytes(records.encode(record, version))
    (STREAMS / f"{PIECE}.bin").write_bytes(piece_bytes())
    for image, manifest in IMAGES.items():
        (STREAMS / f"{image}.bin").write_bytes(image_bytes(manifest))
