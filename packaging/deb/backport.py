# SPDX-License-Identifier: LGPL-2.1-or-later
"""python3-msgspec for Debian 12: built from its released source, and kept in the cache."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from upgrader.lab.private_systemd import PrivateSystemd, TreeError, suites

_SUITE = "bookworm"
_VERSION = "0.19.0"
_SHA256 = "604037e7cd475345848116e89c553aa9a233259733ab51986ac924ab1b976f8e"
_PACKAGING = Path(__file__).parent / "msgspec"

_BUILD = f"""
set -eu
cd /build
mv msgspec-{_VERSION}.tar.gz python-msgspec_{_VERSION}.orig.tar.gz
tar -xzf *.orig.tar.gz
mv debian msgspec-{_VERSION}
cd msgspec-{_VERSION}
dpkg-buildpackage -us -uc -b
"""


def fetch(suite: str, tree: Path, progress: Callable[[str], None]) -> list[Path]:
    """The packages that a suite does not have, made now if need be; raises PrivateSystemdError."""
    if suite != _SUITE:
        return []
    place = suites.cache_directory().with_name("backports")
    place.mkdir(parents=True, exist_ok=True)
    with suites.locked(place / ".lock"):
        if not (found := list(place.glob(f"python3-msgspec_{_VERSION}-*.deb"))):
            progress(f"{suite} has no python3-msgspec: building it (once)")
            with tempfile.TemporaryDirectory(dir=place) as work:
                source = _download(Path(work))
                built = _build(tree, source, Path(work))
                found = [path.rename(place / path.name) for path in built]
        return found


def _download(work: Path) -> Path:
    listed = work / "requirements.txt"
    listed.write_text(f"msgspec=={_VERSION} --hash=sha256:{_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    options = ["--no-deps", "--no-binary=:all:", "--require-hashes", "-d", str(work)]
    done = subprocess.run(
        [*pip, *options, "-r", listed],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise TreeError(
            "the source of python3-msgspec could not be fetched",
            remedy="is there a network, or a package index (pip config list)?",
            detail=done.stderr,
        )
    return work / f"msgspec-{_VERSION}.tar.gz"


def _build(tree: Path, source: Path, to: Path) -> list[Path]:
    with PrivateSystemd.boot(tree) as machine:
        machine.copy_in(source, f"/build/{source.name}")
        machine.copy_in(_PACKAGING, "/build/debian")
        machine.run(["sh", "-c", _BUILD], timeout=900)
        built = Path(f"/proc/{machine.pid}/root/build").glob("python3-msgspec_*.deb")
        return [Path(shutil.copy(path, to)) for path in built]
