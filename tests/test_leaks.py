# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fixtures that watch every test do fail one that leaves something behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.isolation import OWN
from tests.support import cannot_run, eventually
from upgrader.lab.private_systemd import cgroups, linux

ROOT = Path(__file__).resolve().parent.parent

LEAKS = {
    "fd": ("import os\ndef test(): os.dup(0)\n", "left open"),
    "process": (
        "import subprocess\ndef test(): subprocess.run(['setsid', '-f', 'sleep', '30'])\n",
        "left running: {.*sleep 30",
    ),
    "mount": (
        "from upgrader.lab.private_systemd.linux import mount\ndef test(tmp_path): mount('tmpfs', str(tmp_path))\n",
        r"left mounted: \['.*/test0 \(tmpfs\)'\]",
    ),
    "cgroup": (
        "from tests.isolation import OWN\ndef test(): (OWN.cgroup / 'mine').mkdir()\n",
        r"left in the cgroup tree: \['mine'\]",
    ),
    "nothing": ("def test(): pass\n", "1 passed"),
}

#: A test that looks for leaks while somebody else is at work.
PATIENT = """
from tests.support import eventually
def test(tmp_path):
    there = tmp_path.parent.parent
    (there / "begun").touch()
    assert eventually((there / "done").exists)
"""


def _command(directory: Path, code: str) -> list[str]:
    (directory / "test_it.py").write_text(code)
    options = ["-q", "-p", "tests.conftest", "-c", "/dev/null", "--rootdir", str(directory)]
    return [
        sys.executable,
        "-m",
        "pytest",
        *options,
        "--basetemp",
        f"{directory}/t",
        str(directory),
    ]


@pytest.mark.parametrize("kind", LEAKS)
def test_a_leak_fails_the_test(kind: str, tmp_path: Path) -> None:
    """A test that leaks is reported, with the name of what it left; the run leaves nothing of it."""
    if kind in ("mount", "cgroup") and os.geteuid() != 0:
        cannot_run("needs root: without it, tests can leave none")
    code, said = LEAKS[kind]
    before = OWN.cgroups()
    done = subprocess.run(
        _command(tmp_path, code), cwd=ROOT, capture_output=True, text=True, check=False
    )
    # What the leaking test left was then given to this process.
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x0030\x00":
            os.kill(int(pid), signal.SIGKILL)
            os.waitpid(int(pid), 0)

    assert re.search(said, done.stdout), done.stdout
    assert (done.returncode == 0) == (kind == "nothing")
    left = OWN.cgroups() - before
    assert len(left) == (kind == "process")
    for cgroup in left:
        cgroups.remove(cgroup)


def test_what_others_do_fails_nothing(tmp_path: Path) -> None:
    """A mount, a cgroup and a process that come from elsewhere during a test are not its leaks."""
    if OWN.cgroup is None:
        cannot_run("needs root: without it, others cannot be kept out")
    (tmp_path / "mounted").mkdir()
    foreign = OWN.cgroup / "foreign"
    command = _command(tmp_path, PATIENT)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert eventually((tmp_path / "begun").exists)
            linux.mount("tmpfs", str(tmp_path / "mounted"))
            foreign.mkdir()
            with subprocess.Popen(["sleep", "30"]) as other:
                (tmp_path / "done").touch()
                said, _ = running.communicate(timeout=60)
                other.kill()
        finally:
            running.kill()
            linux.unmount(str(tmp_path / "mounted"))
            foreign.rmdir()

    assert "1 passed" in said
