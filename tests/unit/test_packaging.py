# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab has a package of its own in every distribution, and everything else works without it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"
_ALL = """
import importlib, pkgutil, sys, upgrader
assert upgrader.__file__.startswith(sys.argv[1]), upgrader.__file__
for module in pkgutil.walk_packages(upgrader.__path__, "upgrader."):
    if module.name != "upgrader.__main__":
        importlib.import_module(module.name)
print(*(name for name in sys.modules if name.startswith("upgrader.")))
"""


def lab() -> list[str]:
    """The folders of the lab, as Debian's package has them."""
    listed = (PACKAGING / "deb/debian/upgrader-lab.install").read_text().split()
    return [path.partition("/dist-packages/upgrader/")[2] for path in listed]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the modules of the package python3-upgrader only."""
    place = tmp_path_factory.mktemp("without-lab")
    shutil.copytree(ROOT / "upgrader", place / "upgrader")
    for folder in lab():
        shutil.rmtree(place / "upgrader" / folder)
    return place


def run(place: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env={"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_every_recipe_names_the_same_folders() -> None:
    """Debian, RPM and Arch take the same folders out of one package and put them into the other."""
    spec = (PACKAGING / "rpm/upgrader.spec").read_text()
    rules = (PACKAGING / "deb/debian/rules").read_text()
    arch = re.search(r"^_lab=\((.*)\)$", (PACKAGING / "arch/PKGBUILD").read_text(), re.MULTILINE)

    assert arch is not None
    assert lab() == arch[1].split()
    assert lab() == re.findall(r"-X/upgrader/(\S+)/", rules)
    for before in ("%exclude ", ""):
        line = rf"^{before}%{{python3_sitelib}}/upgrader/(\S+)$"
        assert lab() == re.findall(line, spec, re.MULTILINE)


def test_everything_else_is_imported_without_the_lab(without: Path) -> None:
    """No other module needs it: each of them is imported where it is not installed."""
    done = run(without, "-c", _ALL, str(without))

    assert 0 == done.returncode, done.stderr
    assert "upgrader.cli.demo" in done.stdout.split()


def test_the_demo_names_the_package_it_lacks(without: Path) -> None:
    """Without the lab, `upgrader demo` is wrong usage and says what to install; its help is there."""
    done = run(without, "-m", "upgrader", "demo", "--upgrades", "1")

    assert (2, "") == (done.returncode, done.stdout)
    assert "upgrader-lab" in done.stderr
    assert "Traceback" not in done.stderr
    assert 0 == run(without, "-m", "upgrader", "demo", "--help").returncode
