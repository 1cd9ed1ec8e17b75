# SPDX-License-Identifier: LGPL-2.1-or-later
"""Imports go one way between the rooms, and what lives in every service stays small."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import upgrader

ROOT = Path(upgrader.__file__).parent

#: What each room may import besides itself. A module at the top is a room of its own.
BASE = {"_version", "codes", "errors"}
SHARED = BASE | {"protocol", "systemd"}
SERVICE = SHARED | {"backends", "instance"}
ROOMS = {
    "_version": set(),
    "codes": set(),
    "errors": {"codes"},
    "protocol": BASE,
    "backends": BASE | {"protocol"},
    "systemd": BASE | {"protocol"},
    "instance": SHARED | {"backends"},
    "blocking": SERVICE,
    "tls": BASE | {"protocol"},
    "aio": SERVICE | {"tls"},
    "attach": SERVICE | {"blocking", "aio"},
    "integrations": SERVICE | {"aio"},
    "asgi": SERVICE | {"attach", "aio", "integrations"},
    "runner": SERVICE | {"attach", "aio"},
    "run": {"runner"},
    "programs": SERVICE | {"runner"},
    "testing": SHARED,
    "takeover": SHARED,
    "tool": SHARED,
    "hooks": SHARED | {"tool"},
    "cli": SHARED | {"tool"},
    "__main__": {"cli"},
}
#: Rooms that are loaded in a service: they need msgspec, and nothing else from outside.
CORE = {*SERVICE, "blocking", "aio", "attach", "runner", "run", "programs", "testing", "takeover"}
#: What an extra of the package installs, by the only room that may import it.
EXTRA = {"programs.qemu": "qemu"}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


MODULES = {name: path for path in sorted(ROOT.rglob("*.py")) if (name := module_of(path))}


def room(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif (
            isinstance(node, ast.ImportFrom) and not node.level
        ):  # a relative one stays in the room
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix("upgrader.") in MODULES else str(node.module)


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) != "lab"])
def test_imports_go_one_way(module: str) -> None:
    """The side of the instance and that of the operator never see each other; nobody sees the lab."""
    for imported in imports(MODULES[module]):
        if imported.startswith("upgrader."):
            other = room(imported.removeprefix("upgrader."))

            assert other == room(module) or other in ROOMS[room(module)], imported


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in CORE])
def test_the_core_needs_msgspec_only(module: str) -> None:
    """Not even in a function does it import another package."""
    for imported in imports(MODULES[module]):
        package = imported.split(".")[0]
        extra = EXTRA.get(".".join(module.split(".")[:2]))

        assert package in ("upgrader", "msgspec", extra) or package in sys.stdlib_module_names


@pytest.mark.parametrize("module", ["records", "record_order", "switchover", "interpreter"])
def test_the_rules_of_the_protocol_do_no_io(module: str) -> None:
    """They are decided by values alone."""
    assert not {"os", "socket", "select", "time"} & set(imports(MODULES[f"protocol.{module}"]))


@pytest.mark.parametrize("module", MODULES)
def test_modules_begin_alike(module: str) -> None:
    """The licence in the first line, then a docstring that says what it is for."""
    text = MODULES[module].read_text()

    assert text.startswith("# SPDX-License-Identifier: LGPL-2.1-or-later\n")
    assert ast.get_docstring(ast.parse(text))
