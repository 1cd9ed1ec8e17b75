# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an object has can be read in one place: no attribute appears for the first time later."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import upgrader

ROOT = Path(upgrader.__file__).parent
#: What lives in a service.
PLACES = ("aio", "blocking", "instance", "integrations", "protocol", "systemd", "testing")
MODULES = [
    *(ROOT / name for name in ("asgi.py", "attach.py")),
    *(path for place in PLACES for path in sorted((ROOT / place).rglob("*.py"))),
]


def given(node: ast.AST) -> Iterator[str]:
    """The attributes of `self` that some code gives a value."""
    for each in ast.walk(node):
        match each:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


def declared(cls: ast.ClassDef) -> Iterator[str]:
    """The names in the body of a class, and what `__init__` sets."""
    for node in cls.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Assign(targets=targets):
                yield from (target.id for target in targets if isinstance(target, ast.Name))
            case ast.FunctionDef(name="__init__"):
                yield from given(node)
            case ast.FunctionDef(name=name):
                yield name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_attributes_are_made_in_init(path: Path) -> None:
    """Or declared in the class."""
    for cls in ast.walk(ast.parse(path.read_text())):
        if isinstance(cls, ast.ClassDef):
            assert set(given(cls)) - set(declared(cls)) == set(), cls.name
