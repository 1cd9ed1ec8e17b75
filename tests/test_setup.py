# SPDX-License-Identifier: LGPL-2.1-or-later
"""packaging/bootstrap: what it asks apt-get for, and two of them at a time; apt-get itself is not run."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.isolation import OWN
from tests.support import cannot_run, eventually
from upgrader.lab.private_systemd import linux

ROOT = Path(__file__).resolve().parent.parent
#: All that it finds on a machine without anything.
_TOOLS = ("cat", "cksum", "dirname", "flock", "id", "mkdir", "mktemp", "rm", "sed", "sleep", "tail")
#: In place of the real one: takes until it is told to end, and installs nothing.
_APT = """\
#!/bin/sh
echo "$*" >>"$DIRECTORY/log"
until [ -e "$DIRECTORY/end" ]; do sleep 0.02; done
exit 1
"""


def setup(directory: Path, name: str, *arguments: str, **env: str) -> "subprocess.Popen[str]":
    """A setup that runs in a checkout of that name, on a machine where everything is missing."""
    tools = directory / "bin"
    if not tools.exists():
        tools.mkdir()
        for tool in _TOOLS:
            place = shutil.which(tool)
            assert place is not None
            (tools / tool).symlink_to(place)
        (tools / "apt-get").write_text(_APT)
        (tools / "apt-get").chmod(0o755)
    place = directory / name / "packaging"
    place.mkdir(parents=True)
    shutil.copy(ROOT / "packaging" / "bootstrap", place)
    shutil.copy(ROOT / "pyproject.toml", directory / name)
    return subprocess.Popen(
        ["/bin/sh", place / "bootstrap", *arguments],
        env={"PATH": str(tools), "DIRECTORY": str(directory), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wanted(directory: Path, name: str, *arguments: str, **env: str) -> set[str]:
    """The packages that it says it installs."""
    with setup(directory, name, *arguments, **env) as running:
        _, said = running.communicate(timeout=60)
    assert "installing Debian packages" in said
    return set(re.findall(r"^    (\S+): ", said, re.MULTILINE))


@pytest.fixture
def alone() -> Iterator[None]:
    """As root, whom it asks apt-get for, and with a lock that no real setup holds."""
    if OWN.cgroup is None:
        cannot_run("needs root: others are only told what to install")
    os.makedirs("/run/lock", exist_ok=True)
    linux.mount("tmpfs", "/run/lock")
    yield
    linux.unmount("/run/lock")


def test_it_is_quiet_when_all_is_done() -> None:
    """Where everything is set up, packaging/bootstrap installs nothing and says nothing."""
    if not (ROOT / ".venv" / "upgrader-setup").exists():
        cannot_run("no .venv here: run packaging/bootstrap")
    done = subprocess.run(
        [ROOT / "packaging" / "bootstrap"], capture_output=True, text=True, check=False
    )

    assert (0, "", "") == (done.returncode, done.stdout, done.stderr)


@pytest.mark.usefixtures("alone")
def test_a_demo_needs_little(tmp_path: Path) -> None:
    """No compiler, no test tools, and mmdebstrap only for the systemd of another Debian suite."""
    (tmp_path / "end").touch()
    few = wanted(tmp_path, "demo", "demo")
    suite = wanted(tmp_path, "suite", "demo", SYSTEMD="host trixie")
    test = wanted(tmp_path, "test", "test")

    assert few.isdisjoint({"gcc", "libc6-dev", "libsystemd-dev", "mmdebstrap", "curl", "wrk"})
    assert few | {"mmdebstrap"} == suite - {"debian-archive-keyring"}
    assert {"gcc", "mmdebstrap", "curl", "wrk"} <= test


@pytest.mark.usefixtures("alone")
def test_more_than_the_tests_need(tmp_path: Path) -> None:
    """The programs of a matrix, and the peers of the bench, besides all that tests need."""
    (tmp_path / "end").touch()
    test, matrix, bench = (wanted(tmp_path, each, each) for each in ("test", "matrix", "bench"))

    assert test | {"golang-go", "puma", "ruby-sd-notify"} <= matrix
    assert test | {"golang-go", "libserver-starter-perl"} <= bench


@pytest.mark.usefixtures("alone")
def test_two_checkouts_install_one_after_the_other(tmp_path: Path) -> None:
    """The second one says that it waits, and asks apt-get only after the first one's has ended."""
    log = tmp_path / "log"
    with setup(tmp_path, "one", "test") as one:
        try:
            assert eventually(log.exists)
            with setup(tmp_path, "other", "test") as other:
                assert other.stderr is not None
                assert "another setup is at work" in other.stderr.readline()
                assert ["update"] == log.read_text().splitlines()
                (tmp_path / "end").touch()
                assert "apt-get could not install them" in other.communicate(timeout=60)[1]
        finally:
            (tmp_path / "end").touch()
        assert "apt-get could not install them" in one.communicate(timeout=60)[1]

    assert ["update", "update"] == log.read_text().splitlines()
