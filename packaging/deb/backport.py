# SPDX-License-Identifier: LGPL-2.1-or-later
"""Python packages that a Debian suite does not have: built from what was released, and kept in the cache."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from upgrader.lab.private_systemd import PrivateSystemd, TreeError, suites

_BUILD = """
set -eu
cd /build/unpacked
if [ -e ../*.tar.gz ]; then
    cp ../*.tar.gz "../$SOURCE.orig.tar.gz"
    tar -xzf ../*.orig.tar.gz --strip-components=1
else
    python3 -m zipfile -e ../*.whl .
fi
dpkg-buildpackage -us -uc -b
"""


@dataclass(frozen=True)
class _Backport:
    """One: the suites without it, and the file of the package index it is built from."""

    package: str
    source: str  #: of Debian's package
    suites: Collection[str]
    released: str  #: name and version on the package index
    sha256: str
    kind: str  #: of that file: "source" if it has to be compiled, "wheel" if it has not

    def fetch(self, tree: Path, progress: Callable[[str], None]) -> list[Path]:
        """The package, made now if need be; raises PrivateSystemdError."""
        version = self.released.partition("==")[2]
        place = suites.cache_directory().with_name("backports")
        place.mkdir(parents=True, exist_ok=True)
        with suites.locked(place / ".lock"):
            if not (found := list(place.glob(f"{self.package}_{version}-*.deb"))):
                progress(f"{tree.name} has no {self.package}: building it (once)")
                with tempfile.TemporaryDirectory(dir=place) as work:
                    built = self._build(tree, self._download(Path(work)), Path(work))
                    found = [path.rename(place / path.name) for path in built]
            return found

    def _download(self, work: Path) -> Path:
        listed = work / "requirements.txt"
        listed.write_text(f"{self.released} --hash=sha256:{self.sha256}\n")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
        other = "--no-binary=:all:" if self.kind == "source" else "--only-binary=:all:"
        options = ["--no-deps", other, "--require-hashes", "-d", str(work)]
        done = subprocess.run(
            [*pip, *options, "-r", listed],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise TreeError(
                f"what {self.package} is made of could not be fetched",
                remedy="is there a network, or a package index (pip config list)?",
                detail=done.stderr,
            )
        (file,) = (path for path in work.iterdir() if path != listed)
        return file

    def _build(self, tree: Path, file: Path, to: Path) -> list[Path]:
        with PrivateSystemd.boot(tree) as machine:
            machine.copy_in(file, f"/build/{file.name}")
            directory = Path(__file__).parent / self.source.partition("_")[0]
            machine.copy_in(directory, "/build/unpacked/debian")
            machine.run(["sh", "-c", _BUILD], env={"SOURCE": self.source}, timeout=900)
            built = Path(f"/proc/{machine.pid}/root/build").glob(f"{self.package}_*.deb")
            return [Path(shutil.copy(path, to)) for path in built]


_ALL = (
    _Backport(
        "python3-msgspec",
        "python-msgspec_0.19.0",
        ("bookworm",),
        "msgspec==0.19.0",
        "604037e7cd475345848116e89c553aa9a233259733ab51986ac924ab1b976f8e",
        "source",
    ),
    _Backport(
        "python3-qemu-qmp",
        "python-qemu-qmp_0.0.6",
        ("bookworm", "trixie"),
        "qemu.qmp==0.0.6",
        "5d7c5af0e9de427696e3bf72e333965c3a697929f77f6b7ddc30c989fc7b539b",
        "wheel",
    ),
)


def fetch(suite: str, tree: Path, progress: Callable[[str], None]) -> list[Path]:
    """The packages that a suite does not have; raises PrivateSystemdError."""
    wanted = [each for each in _ALL if suite in each.suites]
    return [path for each in wanted for path in each.fetch(tree, progress)]
