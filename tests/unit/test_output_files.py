# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a service writes to files, from a given time on."""

import os
import subprocess
from pathlib import Path

from upgrader.tool.output_files import OutputFiles


def test_u11_what_is_new_in_them(tmp_path: Path) -> None:
    """Appended, or written anew into a shorter file; another file of that name is not read."""
    out = tmp_path / "out"
    out.write_text("before\n")
    with (
        out.open("a") as file,
        subprocess.Popen(["sleep", "60"], stdout=file, stderr=file) as program,
    ):
        try:
            noted = OutputFiles.of(program.pid)
            assert [] == noted.lines()
            os.write(file.fileno(), b"one\ntwo\n")
            assert ["one", "two"] == noted.lines()
            os.truncate(out, 0)
            os.write(file.fileno(), b"three")
            assert ["three"] == noted.lines()
            out.rename(tmp_path / "old")
            out.symlink_to("/etc/passwd")
            assert ["three"] == noted.lines()
        finally:
            program.kill()


def test_no_files(tmp_path: Path) -> None:
    """Pipes, terminals and processes that are gone have none."""
    with subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, stderr=2) as program:
        pid = program.pid
        program.kill()
    assert [] == OutputFiles.of(pid).lines()
    assert [] == OutputFiles().lines()
