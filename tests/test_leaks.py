# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fixtures that watch every test do fail one that leaves something behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LEAKS = {
    "fd": ("import os\ndef test(): os.dup(0)\n", "left open"),
    "process": (
        "import subprocess\ndef test(): subprocess.run(['setsid', '-f', 'sleep', '30'])\n",
        "left running: {.*sleep 30",
    ),
    "nothing": ("def test(): pass\n", "1 passed"),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_a_leak_fails_the_test(kind: str, tmp_path: Path) -> None:
    """A test that leaks is reported, with the name of what it left."""
    code, said = LEAKS[kind]
    (tmp_path / "test_it.py").write_text(code)
    options = ["-q", "-p", "tests.conftest", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # What the leaking test left was then given to this process.
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x0030\x00":
            os.kill(int(pid), signal.SIGKILL)
            os.waitpid(int(pid), 0)

    assert re.search(said, done.stdout), done.stdout
    assert (done.returncode == 0) == (kind == "nothing")
