# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a reload finds changed, and what not: the instance knows what it was started from."""

import ssl
import subprocess
from pathlib import Path

import pytest

from tests.support import SETTLE, eventually
from tests.system.reloading import installed, live, reload, socket_there
from tests.system.serving import PROGRAMS, Install, Service, network_of
from tests.system.tool import found, upgrade, upgrader
from upgrader.lab.private_systemd import PrivateSystemd

HOLDER = PROGRAMS / "holder.py"
PROGRAM = "/opt/upgrader-tests/holder.py"
#: A program that is a script, and overwrites what /proc shows of its command line and environment.
TITLED = """\
#!{python}
import ctypes, os, runpy, sys
with open("/proc/self/stat") as file:
    fields = file.read().rpartition(")")[2].split()
begin, end = int(fields[45]), int(fields[48])
title = b"chat: serves"
ctypes.memset(begin, 0, end - begin)
ctypes.memmove(begin, title, len(title))
assert b"PORT" not in open("/proc/self/environ", "rb").read()
runpy.run_path({program!r}, run_name="__main__")
"""


def reloads(service: Service) -> bool:
    """Whether a reload was the author's own: the same process has been asked to."""
    asked, pid = service.messages().count("asked to reload"), service.pid
    assert socket_there(service)
    assert reload(service), service.messages()
    if pid != service.pid:
        return False
    assert eventually(lambda: service.messages().count("asked to reload") == asked + 1)
    return True


def test_u9_nothing_has_changed(any_machine: PrivateSystemd, install: Install) -> None:
    """A script that PID 1 starts through a shell, that writes its own title, in a C locale: reloads
    are the author's, whatever the service manager's own variables are. A variable of the unit is a
    change, once."""
    script = "/opt/upgrader-tests/titled"
    text = TITLED.format(python=any_machine.python[-1], program=PROGRAM)
    any_machine.write(script, text, mode=0o755)
    start = f"ExecStart=/bin/sh -c 'exec {script} $$0' word${{WORD}}"
    lines = ("Environment=LANG=C", "Environment=WORD=x", "ExecStart=", start)
    try:
        service = installed(any_machine, install, "titled", *lines)
        with service.connect() as client:
            client.add()
            assert reloads(service)
            any_machine.run(["systemctl", "set-environment", "LOGIN=yes"])
            assert reloads(service)
            service.environment(WORD="y")
            assert not reloads(service)
            assert (2, 2, 2) == client.add()
            assert reloads(service)
            any_machine.run(["systemctl", "unset-environment", "LOGIN"])
            assert reloads(service)
            assert (3, 3, 2) == client.add()
    finally:
        any_machine.run(["systemctl", "unset-environment", "LOGIN"])


def test_u8_another_release(any_machine: PrivateSystemd, install: Install) -> None:
    """The working directory is a link, and names another one; no file of the old one has changed."""
    place = "/opt/upgrader-tests/releases"
    for number in "1", "2":
        any_machine.run(["mkdir", "-p", f"{place}/{number}"])
        any_machine.copy_in(HOLDER, f"{place}/{number}/app.py")
    any_machine.run(["ln", "-sfn", "releases/1", "/opt/upgrader-tests/web"])
    start = f"ExecStart={' '.join(any_machine.python)} app.py"
    where = "WorkingDirectory=/opt/upgrader-tests/web"
    service = installed(any_machine, install, "released", where, "ExecStart=", start)
    assert reloads(service)
    any_machine.run(["ln", "-sfn", "releases/2", "/opt/upgrader-tests/web"])

    assert not reloads(service)
    assert f"{place}/2" == str(service.inside(f"/proc/{service.pid}/cwd").readlink())
    assert reloads(service)


def test_u8_an_image_over_the_program(host_machine: PrivateSystemd, install: Install) -> None:
    """The file that lies there now is of another file system; all that `ls` shows is the same."""
    place, machine = "/opt/upgrader-tests/image", host_machine
    machine.run(["mkdir", "-p", place, f"{place}-new"])
    machine.copy_in(HOLDER, f"{place}/app.py")
    start = f"ExecStart={' '.join(machine.python)} {place}/app.py"
    service = installed(machine, install, "imaged", "ExecStart=", start)
    try:
        machine.run(["mount", "-t", "tmpfs", "tmpfs", f"{place}-new"])
        machine.run(["sh", "-c", f"sed s/goodbye/farewel/ {place}/app.py > {place}-new/app.py"])
        machine.run(["touch", "-r", f"{place}/app.py", f"{place}-new/app.py"])
        machine.run(["mount", "--bind", f"{place}-new", place])

        assert not reloads(service)
        assert reloads(service)
    finally:
        machine.run(["umount", place], check=False)
        machine.run(["umount", f"{place}-new"], check=False)


def certificate(service: Service) -> bytes:
    """What a new client is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with service.connect() as client, network_of(service.machine):
        client.sock.settimeout(SETTLE)
        with context.wrap_socket(client.sock) as wrapped:
            return wrapped.getpeercert(binary_form=True) or b""


def test_u8_a_renewed_certificate(
    host_machine: PrivateSystemd, install: Install, tmp_path: Path
) -> None:
    """It is served after a reload, by the same process. One that does not fit fails the reload, and
    the one before is served on."""
    files = {"certificate": "/run/tls/cert.pem", "key": "/run/tls/key.pem"}

    def issue(*names: str) -> None:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
             "-nodes", "-subj", "/CN=x", "-keyout", "key", "-out", "certificate"],
            cwd=tmp_path, check=True, capture_output=True,
        )  # fmt: skip
        for name in names:
            host_machine.copy_in(tmp_path / name, files[name])

    issue("certificate", "key")
    python = " ".join(host_machine.python)
    command = f"{python} -m upgrader.asgi webapp:app --app-dir /opt/upgrader-tests --port ${{PORT}}"
    tls = f"--ssl-certfile {files['certificate']} --ssl-keyfile {files['key']}"
    lines = [*live(host_machine, "secured"), "ExecStart=", f"ExecStart={command} {tls}"]
    service = install(host_machine, "secured", "webapp", *lines)
    assert socket_there(service)
    first, pid = certificate(service), service.pid
    issue("certificate", "key")
    assert reload(service)
    second = certificate(service)
    assert (pid, True) == (service.pid, first != second)
    issue("certificate")
    assert not reload(service)
    assert (pid, second) == (service.pid, certificate(service))
    issue("certificate", "key")
    assert reload(service)
    assert (pid, True) == (service.pid, certificate(service) not in (first, second))


def test_u8_a_renewed_credential(any_machine: PrivateSystemd, install: Install) -> None:
    """A live upgrade cannot follow: the outcome says so, and check does before; a restart does."""
    any_machine.write("/run/credential", "one\n")
    load = "LoadCredential=key:/run/credential"
    service = installed(any_machine, install, "trusted", load)
    credentials = service.ask("Describe")["credentials"]
    if not service.inside(f"/proc/{service.pid}/root{credentials}/key").exists():
        pytest.skip("systemd cannot mount credentials here")

    def told() -> list[str]:
        return [w["what"] for w in found(service)["findings"] if w["what"].startswith("credential")]

    assert [] == told()
    any_machine.write("/run/credential", "two\n")
    with service.connect() as client:
        client.add()
        said = upgrade(service)
        assert ("done", "live") == (said["result"], said["mode"])
        assert [True] == ["credential key: the file holds" in each for each in said["warnings"]]
        assert [True] == ["credential key" in each for each in told()]
        shown = upgrader(any_machine, "status", service.unit).stdout
        assert "stale: credential key" in shown
        assert "restart" == upgrade(service, "--mode", "restart")["mode"]
        assert [] == told()
        assert (2, 2, 3) == client.add()
