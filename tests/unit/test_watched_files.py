# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a file is another one now: by stat(2), and by what is in it where that says nothing."""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from upgrader.instance import watched_files
from upgrader.instance.watched_files import WatchedFiles


def watching(*paths: Path, reread: bool = False) -> WatchedFiles:
    watched = WatchedFiles(time.monotonic_ns())
    for path in paths:
        watched.add(str(path), reread=reread)
    watched.read()
    return watched


def same_dates(path: Path, like: os.stat_result) -> None:
    os.utime(path, ns=(like.st_atime_ns, like.st_mtime_ns))


def test_u8_a_file_that_was_replaced(tmp_path: Path) -> None:
    """Also by one with the same size and time of modification; and one that was taken away, or was
    not there."""
    old, gone, new = (tmp_path / name for name in ("old", "gone", "new"))
    for path in old, gone:
        path.write_text("one")
    watched = watching(old, gone, new)
    assert not watched.look().changed
    before = old.stat()
    shutil.copy2(old, tmp_path / "copy")
    (tmp_path / "copy").write_text("two")
    same_dates(tmp_path / "copy", before)
    (tmp_path / "copy").rename(old)
    gone.unlink()
    new.write_text("")

    assert {str(old), str(gone), str(new)} == set(watched.look().changed)


def test_u8_a_file_that_was_written_in_place(tmp_path: Path) -> None:
    """With its size and time of modification as before: the change time is another."""
    path = tmp_path / "config"
    path.write_text("one")
    watched, before = watching(path), path.stat()
    path.write_text("two")
    same_dates(path, before)

    assert [str(path)] == watched.look().changed


def test_u9_a_file_with_another_change_time_only(tmp_path: Path) -> None:
    """After a backup, a link, or chmod: it has the same content, so it is the same."""
    path = tmp_path / "config"
    path.write_text("one")
    watched, before = watching(path), path.stat().st_ctime_ns
    fingerprint = watched.look().fingerprint
    os.link(path, tmp_path / "link")
    while path.stat().st_ctime_ns == before:  # until the kernel's clock has ticked
        path.chmod(0o600)

    assert ([], fingerprint) == (watched.look().changed, watched.look().fingerprint)


def test_u8_an_image_with_the_same_dates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that nobody writes to, stat(2) may say the same of two files."""
    path = tmp_path / "module.py"
    path.write_text("one")
    watched, before = watching(path), path.stat()
    device = before.st_dev
    line = f"1 1 {os.major(device)}:{os.minor(device)} / / ro - squashfs /dev/loop0 ro"
    monkeypatch.setattr(
        watched_files, "_stamp", lambda _: watched_files._Seen((1, 3, 3), device, 9)
    )
    watched = watching(path)
    path.write_text("two")

    assert not watched.look().changed
    monkeypatch.setattr(
        watched_files, "_never_written", lambda: frozenset(watched_files._read_only([line]))
    )
    assert [str(path)] == watched.look().changed


def test_only_file_systems_that_nobody_writes_to(tmp_path: Path) -> None:
    """Not those that are read-only at one place, as ProtectSystem= has them."""
    lines = [
        "22 1 8:1 / / ro,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro",
        "23 1 7:0 / /opt rw - squashfs /dev/loop0 ro,errors=continue",
    ]

    assert [os.makedev(7, 0)] == list(watched_files._read_only(lines))


def test_u8_a_link_that_names_another_directory(tmp_path: Path) -> None:
    """What is in the directory does not count."""
    link = tmp_path / "current"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    link.symlink_to("one")
    watched = WatchedFiles(time.monotonic_ns())
    watched.add_directory(str(link))
    (link / "file").touch()
    assert not watched.look().changed
    link.unlink()
    link.symlink_to("two")

    assert [str(link)] == watched.look().changed


def test_a_file_that_a_reload_reads_anew(tmp_path: Path) -> None:
    """It is no change of the program, and the same again after the reload that read it; not if it
    was replaced in the middle of that."""
    path = tmp_path / "certificate"
    path.write_text("one")
    watched = watching(path, reread=True)
    for text in ("second", "the third"):
        path.write_text(text)
        assert ([], [str(path)]) == (watched.look().changed, watched.look().reread)
        watched.reloaded(watched.before_reload())
        assert not watched.look().reread
    read = watched.before_reload()
    path.write_text("in the middle")
    watched.reloaded(read)

    assert [str(path)] == watched.look().reread


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules, of zip files too, its interpreter and itself; a module that was written after the
    process had begun is of another version."""
    program = tmp_path / "program.py"
    program.write_text("")
    monkeypatch.setattr(sys, "argv", [str(program)])
    early = WatchedFiles(time.monotonic_ns())
    early.add_program()
    assert not early.look().changed
    begun = time.time_ns()
    early = WatchedFiles(time.monotonic_ns())
    while program.stat().st_ctime_ns <= begun:
        program.write_text("later")
    early.add_program()
    assert [str(program)] == early.look().changed
    monkeypatch.setattr(time, "time_ns", lambda: 1)  # a machine that does not know the time
    early = WatchedFiles(time.monotonic_ns())
    early.add_program()
    assert not early.look().changed


def test_the_fingerprint_is_of_what_lies_on_disk(tmp_path: Path) -> None:
    """Two instances that began with different files agree on it."""
    path = tmp_path / "module.py"
    path.write_text("one")
    first = watching(path)
    one = first.look().fingerprint
    path.write_text("other")

    assert one != first.look().fingerprint == watching(path).look().fingerprint
