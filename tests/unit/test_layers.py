# SPDX-License-Identifier: LGPL-2.1-or-later
"""The reading order is the import order, and what lives in every service stays small."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import upgrader

ROOT = Path(upgrader.__file__).parent

CORE = [
    "_version",
    "process_start",
    "values",
    "codes",
    "errors",
    "shape",
    "trial",
    "state",
    "backends.connection",
    "fd",
    "backends.fd",
    "backends.listener",
    "backends",
    "image",
    "wire",
    "migration",
    "channel",
    "rendezvous",
    "systemd",
    "systemd.syntax",
    "systemd.notify",
    "systemd.fdstore",
    "systemd.dbus",
    "systemd.bus",
    "systemd.cgroup",
    "systemd.stop",
    "systemd.status",
    "systemd.journal",
    "systemd.unit",
    "systemd.activation",
    "systemd.live_limits",
    "systemd.settings",
    "parameters",
    "inbox",
    "turns",
    "description",
    "declarations",
    "switchover",
    "progress",
    "started",
    "self_report",
    "varlink",
    "varlink_messages",
    "control",
    "calling",
    "precedence",
    "line",
    "fence",
    "interpreter",
    "live_source",
    "live_destination",
    "spread",
    "stream",
    "command_line",
    "outgoing",
    "execution",
    "describing",
    "negotiation",
    "arrival",
    "parked",
    "incoming",
    "process",
    "answering",
    "destination_side",
    "source_side",
    "instance_parts",
    "instance",
    "blocking_runtime",
    "blocking",
    "aio.waiting",
    "aio.acceptor",
    "aio.safe_points",
    "aio.handled_connection",
    "aio.peer",
    "aio.handled_listener",
    "aio.adapter",
    "aio.hosted",
    "aio.hosting",
    "aio.runtime",
    "aio.instance",
    "aio.streams",
    "aio",
    "attach",
    "testing",
    "running_instance",
    "launch",
    "takeover",
]
#: For those who use the library that each is named after.
INTEGRATIONS = [
    "integrations",
    "integrations.uvicorn",
    "integrations.aiohttp",
    "asgi",
]
#: The side of the operator: asks for upgrades, and never touches an FD of a service.
OPERATOR = [
    "hold",
    "outcome",
    "systemd.cause",
    "history",
    "plot",
    "systemd.listening",
    "systemd.held",
    "systemd.units",
    "instances",
    "presence",
    "overview",
    "metrics",
    "steer",
    "obstacles",
    "changed",
    "startable",
    "attempt",
    "verdict",
    "restarting",
    "starting",
    "executing",
    "reloading",
    "preflight",
    "upgrade",
    "holding",
    "discard",
    "check",
    "dump",
    "policy",
    "requests",
    "hook",
    "private_systemd",
    "demo",
    "cli",
    "__main__",
]
ORDER = [*CORE, *INTEGRATIONS, *OPERATOR]
#: Read on their own; their modules may import each other.
SHELVES = ("private_systemd", "demo", "cli")


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


MODULES = {name: path for path in sorted(ROOT.rglob("*.py")) if (name := module_of(path))}


def layer(module: str) -> str:
    """Its place in the order: the module itself, or the shelf it stands on."""
    shelf = module.split(".")[0]
    return shelf if shelf in SHELVES else module


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # only within a shelf
                assert layer(module_of(path)) in SHELVES, f"{path}: relative import"
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = full.removeprefix("upgrader.") in MODULES
                yield full if is_module else str(node.module)


def test_every_module_has_its_place() -> None:
    """A new module must say where it is read."""
    assert {layer(name) for name in MODULES} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__main__"])
def test_modules_import_only_what_is_read_before(module: str) -> None:
    """From top to bottom, nothing needs what comes later."""
    place = ORDER.index(layer(module))
    for imported in imports(MODULES[module]):
        if not imported.startswith("upgrader."):
            continue
        other = layer(imported.removeprefix("upgrader."))
        same_shelf = other == layer(module) and other in SHELVES

        assert same_shelf or ORDER.index(other) < place, f"{module} imports {imported}"


@pytest.mark.parametrize("module", CORE)
def test_the_core_needs_msgspec_only(module: str) -> None:
    """Not even in a function does it import another package."""
    for imported in imports(MODULES[module]):
        package = imported.split(".")[0]

        assert package in ("upgrader", "msgspec") or package in sys.stdlib_module_names


@pytest.mark.parametrize("module", ["wire", "migration"])
def test_the_protocol_does_no_io(module: str) -> None:
    """It is decided by values alone."""
    assert not {"os", "socket", "select", "time"} & set(imports(MODULES[module]))


@pytest.mark.parametrize("module", MODULES)
def test_modules_begin_alike(module: str) -> None:
    """The licence in the first line, then a docstring that says what it is for."""
    text = MODULES[module].read_text()

    assert text.startswith("# SPDX-License-Identifier: LGPL-2.1-or-later\n")
    assert ast.get_docstring(ast.parse(text))
