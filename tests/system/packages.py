# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packages for tests: the project's own, and versions of the example service; asserts nothing."""

import contextlib
import hashlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from types import ModuleType

from tests.support import cannot_run
from upgrader.lab.private_systemd import PrivateSystemd, TreeError

APT = ("apt-get", "-y", "--allow-downgrades", "-o", "Dpkg::Use-Pty=0")
QUIET = {"DEBIAN_FRONTEND": "noninteractive"}
ROOT = Path(__file__).resolve().parents[2]
UNIT = "web.service"
#: The folders that only the package upgrader-lab has.
LAB = {"lab"}
_EXAMPLE = resources.files("upgrader.lab.demo.example")
_BUILD = """
set -eu
cd /build/web
dpkg-buildpackage -us -uc -b >../web.log 2>&1 || { cat ../web.log; exit 1; }
mkdir -p /debs
mv ../web_*.deb /debs/
rm -r /build/web
"""
_CONTROL = """\
Source: web
Section: net
Priority: optional
Maintainer: Web Maintainers <web@packages.example>
{build_depends}
Standards-Version: 4.7.2

Package: web
Architecture: all
{depends}
Description: example
 An example.
"""
_LIVE = """\
ExecReload=/usr/bin/python3 -m upgrader.takeover
RuntimeDirectory=web
RuntimeDirectoryPreserve=restart
"""
#: As from before the package used the library: it answers, and keeps nothing.
_PLAIN = """\
[Unit]
Description=Example web service
[Service]
Type=exec
DynamicUser=yes
ExecStart=/usr/bin/python3 -m http.server 8080 --bind 127.0.0.1
[Install]
WantedBy=default.target
"""


def packaging(name: str) -> ModuleType:
    """A module of packaging/deb, which is no package."""
    place = str(ROOT / "packaging" / "deb")
    if place not in sys.path:
        sys.path.append(place)
    spec = importlib.util.find_spec(name)
    assert spec is not None
    return importlib.import_module(name)


def program(version: str) -> str:
    """The example service; 3 does not start, 4 is the code of 1 again."""
    if version == "3":
        return 'raise RuntimeError("version 3 is broken")\n'
    text = (_EXAMPLE / f"web{'2' if version == '2' else '1'}.py").read_text()
    return text.replace('version="1"', f'version="{version}"')


def files(version: str) -> dict[str, str]:
    """All files of a version, as below /usr/lib/web; and its unit."""
    return {
        "web/__init__.py": "",
        "web/http11.py": (_EXAMPLE / "http11.py").read_text(),
        "web/session.py": (_EXAMPLE / "session.py").read_text(),
        "web/__main__.py": program(version),
        UNIT: unit_file(version),
    }


def documented(language: str) -> list[str]:
    """The blocks of docs/packagers.md in that language."""
    page = (ROOT / "docs" / "packagers.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def folders(listed: str) -> set[str]:
    """The folders of modules directly below `upgrader/` in a package's list of files."""
    return set(re.findall(r"-packages/upgrader/(\w+)/", listed)) - {"__pycache__"}


def copy_source(machine: PrivateSystemd, place: str) -> None:
    """Copy what is in a source package into a machine."""
    packaging("build").copy_source(machine, place)


def unit_file(version: str) -> str:
    """The unit in the package of a version; it changes with every one of them."""
    if version == "0":
        return _PLAIN
    text = (_EXAMPLE / "web.service").read_text().replace("@PYTHON@", "/usr/bin/python3")
    more = f"[Service]\nUser=web\nEnvironment=PACKAGED={version}\n{_LIVE}"
    return text.replace("[Service]\n", more)


def service_package(
    machine: PrivateSystemd,
    version: str,
    rules: str = "",
    check: bool = True,
    more: Mapping[str, str] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Build one version of the package `web` inside, into /debs; what the build said."""
    (control,) = documented("control")
    build_depends, depends = control.splitlines()
    if version == "0":
        build_depends = build_depends.replace("dh-sequence-upgrader, ", "")
    program_files = files(version)
    tree = {
        "debian/control": _CONTROL.format(build_depends=build_depends, depends=depends),
        "debian/rules": f"#!/usr/bin/make -f\n%:\n\tdh $@\n{rules}",
        "debian/changelog": f"web ({version}) unstable; urgency=medium\n\n  * Version {version}.\n\n"
        " -- Web Maintainers <web@packages.example>  Mon, 23 Nov 2026 12:00:00 +0000\n",
        "debian/source/format": "3.0 (native)\n",
        "debian/web.service": program_files.pop(UNIT),
        "debian/web.install": "web usr/lib/web\n",
        "debian/web.sysusers": 'u web - "Example web service"\n',
        **program_files,
        **(more or {}),
    }
    for name, text in tree.items():
        mode = 0o755 if name == "debian/rules" else 0o644
        machine.write(f"/build/web/{name}", text, mode=mode)
    return machine.run(["sh", "-c", _BUILD], check=check, timeout=120)


def own_packages(suite: str, cache: Path) -> Path:
    """A directory with this checkout's packages for a suite; built if its sources have changed."""
    digest = hashlib.sha256()
    for top in ("upgrader", "packaging", "units", "docs", "pyproject.toml", "README.md"):
        for path in sorted([ROOT / top, *(ROOT / top).rglob("*")]):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_mode}\0".encode())
                digest.update(path.read_bytes())
    place = cache / f"{suite}-{digest.hexdigest()[:16]}"
    if not place.is_dir():
        beside = place.with_name(f"{place.name}.partial")
        packaging("build").build(suite, beside)
        beside.rename(place)
    return place


@contextlib.contextmanager
def booted(suite: str, cache: Path) -> Iterator[PrivateSystemd]:
    """A machine with our own packages installed and nothing else of the project."""
    try:
        tree = packaging("trees").fetch(suite, lambda text: None)
        debs = own_packages(suite, cache)
    except TreeError as error:
        cannot_run(str(error))
    with PrivateSystemd.boot(tree) as machine:
        machine.run(["rm", "-r", "/usr/lib/python3/dist-packages/upgrader", "/usr/bin/upgrader"])
        apart = ("upgrader-lab_", "upgrader-qemu_", "python3-qemu-qmp_")
        own = [f"/debs/{d.name}" for d in debs.glob("*.deb") if not d.name.startswith(apart)]
        for deb in debs.glob("*.deb"):
            machine.copy_in(deb, f"/debs/{deb.name}")
        machine.run([*APT, "install", *own], env=QUIET, timeout=120)
        yield machine
