# SPDX-License-Identifier: LGPL-2.1-or-later
"""Credentials whose files hold something else than the service has."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.units import unit
from upgrader.protocol.varlink_types import Description
from upgrader.tool.credentials import show_stale, stale_credentials


def stale(given: Path, **values: Any) -> tuple[str, ...]:
    systemd: Any = SimpleNamespace(properties=lambda _: values)
    said = Description("web", credentials=str(given))
    return stale_credentials(systemd, unit(main_pid=os.getpid()), said)


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """What a service has: one credential of a file, one of a directory, one of a store."""
    directory = tmp_path / "given"
    directory.mkdir()
    for name in "key", "tls_cert", "stored":
        (directory / name).write_text(name)
        (tmp_path / name).write_text(name)
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls" / "cert").write_text("tls_cert")
    return directory


def test_u8_a_credential_with_another_content(given: Path) -> None:
    """A file, and one in a directory; what cannot be read is not judged."""
    place = given.parent
    load = [("key", f"{place}/key"), (b"tls", f"{place}/tls".encode()), ("gone", f"{place}/gone")]
    assert () == stale(given, LoadCredential=load)
    (place / "tls" / "cert").write_text("renewed")
    assert ("tls_cert",) == stale(given, LoadCredential=load)
    (place / "key").write_text("renewed")
    names = stale(given, LoadCredential=load)

    assert ("key", "tls_cert") == names
    assert "credentials key, tls_cert: " in show_stale("web.service", names)
    assert () == stale(given, LoadCredential=load, RefreshOnReload=[b"extensions", b"credentials"])
    assert () == stale(Path(), LoadCredential=load)


def test_u8_a_credential_of_a_live_instance(given: Path) -> None:
    """It has them by an FD of the directory."""
    number = os.open(given, os.O_PATH | os.O_DIRECTORY)
    try:
        load = [("key", f"{given.parent}/key")]
        there = Path(f"/proc/self/fd/{number}")
        assert () == stale(there, LoadCredential=load)
        (given.parent / "key").write_text("renewed")
        assert ("key",) == stale(there, LoadCredential=load)
    finally:
        os.close(number)


def test_u8_a_credential_of_a_store(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked up where PID 1 does."""
    stores = (f"{given.parent}/none", str(given.parent))
    monkeypatch.setattr("upgrader.tool.credentials._STORES", stores)
    (given.parent / "stored").write_text("renewed")

    assert ("stored",) == stale(given, LoadCredential=[("stored", "stored")])
