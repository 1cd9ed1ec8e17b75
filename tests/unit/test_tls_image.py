# SPDX-License-Identifier: LGPL-2.1-or-later
"""TLS connections in an image: their secrets are apart, are taken once, and are never left with PID 1."""

import os
import socket
from collections.abc import Iterator

import msgspec
import pytest

from upgrader.errors import ImageError, MismatchError
from upgrader.instance import load_tls, save
from upgrader.instance.declarations import Connections, Declarations
from upgrader.instance.declared_socket import Bound
from upgrader.protocol import image, secret_memory
from upgrader.protocol.connection_state import ConnectionState
from upgrader.protocol.fd import Fd
from upgrader.protocol.identity import HasFileno, identify
from upgrader.protocol.kinds import Kind, Waiting
from upgrader.protocol.tls_state import TlsSecrets, TlsState

SECRETS = TlsSecrets(b"c" * 32, b"s" * 32)
STATE = TlsState("TLS_AES_128_GCM_SHA256", 1, 2)


class Taker:
    """In the place of a listener that takes TLS connections."""

    def load(self, state: TlsState, secrets: TlsSecrets) -> tuple[TlsState, TlsSecrets]:
        return state, secrets


@pytest.fixture
def socks() -> Iterator[list[socket.socket]]:
    pairs = [socket.socketpair() for _ in range(3)]
    yield [ours for ours, _ in pairs]
    for pair in pairs:
        for sock in pair:
            sock.close()


def declared(moving: object = None) -> Declarations:
    declarations = Declarations("web")
    bound = Bound(Kind.LISTENER, "door")
    declarations.connections["door"] = Connections(bound, None, print, moving_tls=moving)
    return declarations


def built(socks: list[socket.socket]) -> tuple[image.Manifest, list[HasFileno]]:
    """An image of three connections, of which the first and the last speak TLS."""
    state = ConnectionState(Waiting.MESSAGE)
    frozen = [
        save.Frozen("door", sock, identify(sock), state, None if n == 1 else (STATE, SECRETS))
        for n, sock in enumerate(socks)
    ]
    return save.build(declared(), 1, "1", frozen, [])


def duplicates(fds: list[HasFileno]) -> list[Fd]:
    return [Fd(os.dup(fd.fileno())) for fd in fds]


def test_secrets_cross_apart(socks: list[socket.socket]) -> None:
    """The image has none of them; they are read once, and gone."""
    manifest, fds = built(socks)
    with image.seal(manifest) as memfd:
        content = os.pread(memfd.fileno(), 1 << 16, 0)
        assert b"c" * 32 not in content
        assert b"s" * 32 not in content
        manifest = image.unseal(memfd)
    came = duplicates(fds)
    tls = load_tls.take(manifest, came, declared(Taker()))
    assert {1: (STATE, SECRETS), 2: (STATE, SECRETS)} == tls
    assert -1 == came[-1].fileno()
    again = duplicates(fds)
    with pytest.raises(ImageError):
        load_tls.take(manifest, again, declared(Taker()))


@pytest.mark.parametrize("leave", [save.lasting, save.insurance])
def test_nothing_of_them_is_left_with_pid_1(socks: list[socket.socket], leave: object) -> None:
    """Neither in an insurance, nor where the destination has died: it may have sealed records already."""
    manifest, fds = built(socks)
    kept, left = leave(manifest, fds)  # type: ignore[operator]
    assert not kept.tls
    kinds = [(entry.kind, fd) for entry, fd in zip(kept.entries, left, strict=True)]
    assert ([(Kind.CONNECTION, socks[1])] if leave is save.lasting else []) == kinds
    with image.seal(kept) as memfd:
        assert kept.entries == image.unseal(memfd).entries
    told = [item.why for item in kept.left_behind]
    why = ["its secrets are never left with systemd"] * 2
    assert (why if leave is save.lasting else []) == told


def test_what_does_not_fit(socks: list[socket.socket]) -> None:
    """Too few secrets, a place that is no connection, another file, a listener without TLS."""
    manifest, fds = built(socks)

    def refused(**changed: object) -> str:
        other = msgspec.structs.replace(manifest, **changed)
        with pytest.raises(ImageError) as caught:
            load_tls.take(other, duplicates(fds), declared(Taker()))
        return caught.value.message

    assert "of 2 connections, and 1 speak TLS" in refused(tls={1: STATE})
    for place in (-1, 3, 99):
        manifest, fds = built(socks)
        secrets = secret_memory.write({1: SECRETS, place: SECRETS})
        fds[-1] = secrets
        entries = [
            *manifest.entries[:-1],
            image.ManifestEntry("tls", Kind.SECRETS, identify(secrets)),
        ]
        why = refused(tls={1: STATE, place: STATE}, entries=entries)
        assert f"of entry {place}, which is no connection" in why
    manifest, fds = built(socks)
    with pytest.raises(ImageError, match="of 0 connections"):
        load_tls.take(manifest, duplicates(fds), declared())
    with open("/dev/null") as null, pytest.raises(MismatchError):
        load_tls.take(
            manifest, [*duplicates(fds[:-1]), Fd(os.dup(null.fileno()))], declared(Taker())
        )


@pytest.mark.parametrize("kind", secret_memory.SecretMemory)
def test_both_kinds_of_memory(
    kind: secret_memory.SecretMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written, read once, overwritten; whoever has a copy of the FD reads zeros."""
    monkeypatch.setattr(secret_memory, "kind", lambda: kind)
    fd = secret_memory.write({7: SECRETS})
    copy = fd.duplicate()
    assert {7: SECRETS} == secret_memory.take(fd)
    with pytest.raises(ImageError):
        secret_memory.take(copy)
    wrong = Fd(os.memfd_create("wrong", os.MFD_CLOEXEC))
    for content in (b"", b"x" * 8, (9).to_bytes(8, "big") + b"x", (1).to_bytes(8, "big") + b"\xc1"):
        os.pwrite(wrong.fileno(), content, 0)
        os.ftruncate(wrong.fileno(), len(content))
        with pytest.raises(ImageError):
            secret_memory.take(wrong.duplicate())
    wrong.close()
