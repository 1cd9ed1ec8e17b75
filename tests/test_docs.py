# SPDX-License-Identifier: LGPL-2.1-or-later
"""The documentation does what it says: its programs run, its units load, its commands exist."""

import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
import tty
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, blocks
from upgrader.protocol import varlink, varlink_interface
from upgrader.testing import Service

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    return sorted({line.split("#")[0].strip() for line in lines} - {""})


def package(argument: str) -> str:
    """The package that apt-get is asked for, by its name or by the pattern of a file in dist/."""
    return argument.removeprefix("./dist/").removesuffix("_*.deb").removesuffix("*.deb")


def known_packages() -> set[str]:
    """Our own packages, those they depend on, and those that packaging/bootstrap installs."""
    control = (ROOT / "packaging" / "deb" / "debian" / "control").read_text()
    bootstrap = (ROOT / "packaging" / "bootstrap").read_text()
    ours = set(re.findall(r"^Package: (\S+)$", control, re.MULTILINE))
    installed = set(re.findall(r"\bwant (\S+)", bootstrap))
    return {"python3-", *ours, *installed, *re.findall(r"^ +(python3-\w+)", control, re.MULTILINE)}


SERIAL = """
import os, sys, upgrader
from acme.serial import Serial
with upgrader.attach("modem") as instance:
    line = instance.backend("line", Serial(sys.argv[1]))
    for _ in instance.serve(line):
        os.write(line.fileno(), os.read(line.fileno(), 100).upper())
"""


def test_the_kind_of_a_third_party_moves(tmp_path: Path) -> None:
    """The ten lines of docs/backends.md, in a package of their own: the same line in every mode."""
    (tmp_path / "acme").mkdir()
    (_, _, kind, _) = blocks(ROOT / "docs" / "backends.md", "python")
    (tmp_path / "acme" / "serial.py").write_text(kind)
    (tmp_path / "modem.py").write_text(SERIAL)
    near, far = os.openpty()
    tty.setraw(far)
    command = [sys.executable, str(tmp_path / "modem.py"), os.ttyname(far)]
    with Service() as service, os.fdopen(near, "r+b", buffering=0) as modem:
        os.close(far)
        service.start(command)
        for upgrade in (service.live, service.execute, service.upgrade):
            modem.write(b"ring")
            assert b"RING" == modem.read(4)
            upgrade(command)
            (told,) = service.describe()["backends"]
            assert ("acme.serial", ["device", "settings"]) == (told["kind"], told["verified"])
        service.kill()
        service.start(command)
        modem.write(b"hello")
        assert b"HELLO" == modem.read(5)


def test_the_example_of_the_readme_survives_an_upgrade(tmp_path: Path) -> None:
    """The 20 lines that a newcomer copies keep a connection, half a line and a counter."""
    program = tmp_path / "chat.py"
    text = blocks(ROOT / "README.md", "python")[0]
    # The port may be in use on the machine of whoever runs the tests.
    place = tmp_path / "socket"
    program.write_text(text.replace("127.0.0.1:7000", f"unix:{place}"))
    command = [sys.executable, str(program)]

    with Service() as service:
        service.start(command)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(place))
            answers = client.makefile("rb")
            with answers:
                client.sendall(b"one\ntw")
                assert answers.readline() == b"1 one\n"
                service.upgrade(command)
                client.sendall(b"o\n")
                assert answers.readline() == b"2 two\n"

    assert "127.0.0.1:7000" in text
    assert len(text.splitlines()) <= 25


@pytest.mark.parametrize("unit", sorted((ROOT / "units").iterdir()), ids=lambda path: path.name)
def test_a_sample_unit_is_valid(unit: Path) -> None:
    """`systemd-analyze verify` accepts every sample (ExecStart= is not installed here)."""
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [
        line
        for line in verified.stderr.splitlines()
        # 252 does not know the setting, which the sample itself says.
        if unit.name in line and "FileDescriptorStorePreserve" not in line
    ]
    assert complaints == []


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_documentation_exists(command: str) -> None:
    """Every command shown is one that the Makefile, systemd or the tool has."""
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "systemctl":
        assert words[1] in (
            "status", "edit", "enable", "restart", "start", "stop", "soft-reboot", "daemon-reload",
        )  # fmt: skip
    elif words[0] == "cp":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "varlinkctl":
        interface, _, method = words[3].rpartition(".")
        assert varlink.INTERFACE == interface
        assert f"method {method}(" in varlink_interface.DESCRIPTION
    elif words[0] == "apt-get":
        assert words[1] == "install"
        assert set(map(package, words[2:])) <= known_packages()
    elif words[:3] == ["python3", "-m", "venv"]:
        assert words[3:] == ["--system-site-packages", "/opt/chat"]
    elif Path(words[0]).name == "pip":
        extra = re.fullmatch(r"upgrader(?:\[(\w+)\])?", words[2])
        assert words[1] == "install"
        assert extra is not None
        assert extra[1] in (None, *PROJECT["optional-dependencies"])
    else:
        assert words[0] in ("upgrader", ".venv/bin/upgrader")
        shown = subprocess.run(
            [sys.executable, "-m", "upgrader", words[1], "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        for option in (word for word in words[2:] if word.startswith("--")):
            assert option in shown.stdout
