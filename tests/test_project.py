# SPDX-License-Identifier: LGPL-2.1-or-later
"""The project's own order: style, types and shell scripts; what the code does is tested elsewhere."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from tests.support import cannot_run

ROOT = Path(__file__).resolve().parent.parent


def _scripts() -> list[str]:
    """Every shell script of the project, by its first line."""
    places = (ROOT / name for name in (".ci", "packaging", "tests", "units", "upgrader"))
    return [
        str(path.relative_to(ROOT))
        for place in places
        for path in sorted(place.rglob("*"))
        if path.is_file()
        and path.read_bytes()[:32].split(b"\n")[0] in (b"#!/bin/sh", b"#!/bin/bash")
    ]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "check", "."], id="ruff check"),
        pytest.param(["ruff", "format", "--check", "."], id="ruff format"),
        pytest.param(["mypy"], id="mypy"),
        pytest.param(["shellcheck", *_scripts()], id="shellcheck"),
    ],
)
def test_linters_find_nothing(command: list[str]) -> None:
    """Style, types and shell scripts are clean."""
    beside = Path(sys.executable).with_name(command[0])
    program = str(beside) if beside.exists() else shutil.which(command[0])
    if program is None:
        cannot_run(f"{command[0]} is missing: packaging/bootstrap installs it")
    done = subprocess.run(
        [program, *command[1:]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )

    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}:\n{done.stdout}", pytrace=False)


def test_what_tests_share_has_a_place_of_its_own() -> None:
    """Nothing is imported from a test module or a conftest.py: each can be read, and run, alone."""
    wrong = [
        f"{path.relative_to(ROOT)}: {node.module}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and re.search(r"(^|\.)(test_\w+|conftest)$", node.module or "")
    ]

    assert [] == wrong


def test_unit_tests_wait_for_what_they_wait_for() -> None:
    """None of them sleeps and hopes: a sleep is there only between two looks at a condition."""
    wrong = []
    for path in sorted((ROOT / "tests" / "unit").glob("*.py")):
        tree = ast.parse(path.read_text())
        looks = [node for node in ast.walk(tree) if isinstance(node, ast.While)]
        polled = {id(inner) for loop in looks for inner in ast.walk(loop)}
        wrong += [
            f"{path.name}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and getattr(node.func, "attr", "") == "sleep"
            and ast.unparse(node.args[0]) != "0"
            and id(node) not in polled
        ]

    assert [] == wrong


def test_a_wheel_and_an_sdist(tmp_path: Path) -> None:
    """Both are built; the sdist has what the packages of distributions are made of, and all of them
    are of the same version."""
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stem = f"upgrader-{project['version']}"
    with tarfile.open(tmp_path / f"{stem}.tar.gz") as sdist:
        names = sdist.getnames()
    for path in ("packaging/install-system", "packaging/deb/debian/rules", "docs/packagers.md"):
        assert f"{stem}/{path}" in names
    assert (tmp_path / f"{stem}-py3-none-any.whl").exists()

    recipes = {
        "deb/debian/changelog": rf"^upgrader \({project['version']}-",
        "rpm/upgrader.spec": rf"^Version: +{project['version']}$",
        "arch/PKGBUILD": rf"^pkgver={project['version']}$",
    }
    for name, version in recipes.items():
        text = (ROOT / "packaging" / name).read_text()
        assert re.search(version, text, re.MULTILINE), name
