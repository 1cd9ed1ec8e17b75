#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make deb`: builds the packages of Debian suites and check them with lintian; they are put into dist/.

Each suite's packages are built in its own root tree, which is booted for that and thrown away. For
Debian 12, which has no python3-msgspec, Debian 13's source of it is built as well, as a backport:
the package goes away by itself when the machine is upgraded to Debian 13.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import backport
import trees

from upgrader.lab.private_systemd import PrivateSystemd, PrivateSystemdError

ROOT = Path(__file__).resolve().parents[2]
_SOURCE = ("LICENSE", "README.md", "pyproject.toml", "docs", "packaging", "units", "upgrader")
_PLACE = "/build/upgrader"

# The root tree has the checkout's own modules, for other uses of it; a build must not see them.
_BUILD = f"""
set -eu
rm -r /usr/lib/python3/dist-packages/upgrader /usr/bin/upgrader
cd {_PLACE}
version=$(dpkg-parsechangelog -l packaging/deb/debian/changelog -S Version)
# The same file for every suite: their .dsc all name its checksum.
tar -C .. --sort=name --mtime=@0 -c upgrader | gzip -n >"../upgrader_${{version%-*}}.orig.tar.gz"
cp -a packaging/deb/debian debian
if [ -n "$END" ]; then
    sed -i "1s/)/$END)/" debian/changelog
fi
dpkg-buildpackage -us -uc
"""
_LINTIAN = """
set -eu
cd /build
lintian --allow-root --fail-on error,warning --info --display-info \
    --suppress-tags initial-upload-closes-no-bugs,newer-standards-version upgrader_*.changes
"""


def say(text: str) -> None:
    """Tell what goes on."""
    print(f"deb: {text}", file=sys.stderr, flush=True)


def build(suite: str, to: Path) -> list[Path]:
    """Build the packages of one suite, and put them into the directory `to`."""
    tree = trees.fetch(suite, say)
    extra = backport.fetch(suite, tree, say)
    say(f"{suite}: building")
    with PrivateSystemd.boot(tree) as machine:
        copy_source(machine, _PLACE)
        for package in extra:
            machine.copy_in(package, f"/build/extra/{package.name}")
            machine.run(["dpkg", "-i", f"/build/extra/{package.name}"])
        environment = {"END": trees.SUITES[suite]}
        machine.run(["sh", "-c", _BUILD], env=environment, timeout=900)
        say(f"{suite}: lintian")
        checked = machine.run(["sh", "-c", _LINTIAN], timeout=300, check=False)
        if checked.returncode != 0 or checked.stdout.strip():
            raise SystemExit(f"lintian on {suite}:\n{checked.stdout}{checked.stderr}")
        inside = Path(f"/proc/{machine.pid}/root/build")
        to.mkdir(parents=True, exist_ok=True)
        built = [path for kind in ("deb", "dsc", "tar.*z") for path in inside.glob(f"*.{kind}")]
        return [Path(shutil.copy(path, to / path.name)) for path in [*built, *extra]]


def copy_source(machine: PrivateSystemd, place: str) -> None:
    """Copy what belongs into a source package to a directory inside."""
    with tempfile.NamedTemporaryFile(suffix=".tar") as source:
        with tarfile.open(source.name, "w") as archive:
            for name in _SOURCE:
                archive.add(ROOT / name, name, filter=_clean)
        machine.copy_in(source.name, "/source.tar")
    machine.run(["mkdir", "-p", place])
    machine.run(["tar", "-C", place, "-xf", "/source.tar"])
    machine.run(["rm", "/source.tar"])


def _clean(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if Path(member.name).name == "__pycache__":
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member


def main() -> int:
    """Build for the suites named on the command line, or for all."""
    suites = sys.argv[1:] or list(trees.SUITES)
    try:
        for suite in suites:
            for path in build(suite, ROOT / "dist"):
                if path.suffix == ".deb":
                    print(path.relative_to(ROOT))
    except (PrivateSystemdError, subprocess.CalledProcessError) as error:
        print(f"deb: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
