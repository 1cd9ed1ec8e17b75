# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian 13's own units, unchanged, adopted under load: by what a person types, with Debian's hooks."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import cannot_run, eventually
from tests.system.packages import APT, QUIET
from tests.system.program_clients import get, load
from tests.tables import publish
from upgrader.lab.private_systemd import PrivateSystemd, TreeError, suites

ROOT = Path(__file__).resolve().parents[2]
#: Besides what upgrader needs; dpkg-repack makes packages of what is installed.
PACKAGES = (
    *suites.PACKAGES,
    "nginx",
    "logrotate",
    "haproxy",
    "redis-server",
    "gunicorn",
    "dpkg-repack",
)
#: A location that tells who answers, and one that takes a while.
_SITE = """\
server {
  listen 80 default_server;
  listen [::]:80 default_server;
  location = / { return 200 "$pid\\n"; }
  location = /stream { limit_rate 40000; alias /srv/stream; }
}
"""
_STREAM = 120_000
_DROP_IN = "/etc/systemd/system/{}.d/60-upgrader-run.conf"


@pytest.fixture(scope="module")
def debian() -> Iterator[PrivateSystemd]:
    """Debian 13 with programs that know nothing of upgrader."""
    try:
        tree = suites.fetch("trixie", lambda text: None, PACKAGES)
    except TreeError as error:
        cannot_run(str(error))
    with PrivateSystemd.boot(tree) as machine:
        yield machine


@dataclass
class Nginx:
    """nginx as `apt install nginx` leaves it, with a site of ours."""

    machine: PrivateSystemd
    port: int = 80

    @property
    def pid(self) -> int:
        """Of the nginx that answers, as Debian's own hooks find it."""
        return int(self.machine.run(["cat", "/run/nginx.pid"]).stdout)

    @property
    def worker(self) -> int:
        """Of the process that answers."""
        return int(get(self))

    def settings(self) -> str:
        """What PID 1 knows of the unit, of what an adoption changes."""
        names = ["Type", "ExecStart", "ExecStop", "ExecReload", "PIDFile", "KillMode", "Restart"]
        names += ["TimeoutStopUSec", "FileDescriptorStoreMax", "RuntimeDirectory", "OOMPolicy"]
        names += ["StartLimitIntervalUSec", "NotifyAccess", "ExecStopPost", "DropInPaths"]
        shown = self.machine.run(["systemctl", "show", f"-p{','.join(names)}", "nginx"]).stdout
        # Of what was run last it tells when.
        return "".join(line.partition(" ; start_time")[0] for line in shown.splitlines(True))

    def command_lines(self) -> str:
        """Of all processes of the unit."""
        return self.machine.run(
            [
                "sh",
                "-c",
                "ps -o args= $(cat /sys/fs/cgroup/system.slice/nginx.service/cgroup.procs)",
            ]
        ).stdout


@pytest.fixture
def nginx(debian: PrivateSystemd) -> Iterator[Nginx]:
    debian.write("/etc/nginx/sites-enabled/default", _SITE)
    debian.write("/srv/stream", "x" * _STREAM)
    debian.run(["systemctl", "start", "nginx"])
    yield Nginx(debian)
    debian.run(["systemctl", "stop", "nginx"])
    debian.run(["rm", "-rf", "/etc/systemd/system/nginx.service.d"])
    debian.run(["systemctl", "daemon-reload"])


def documented() -> list[str]:
    """The commands of docs/programs.md, as written."""
    page = (ROOT / "docs" / "programs.md").read_text()
    return (
        page.partition("## nginx on Debian")[2]
        .partition("```sh\n")[2]
        .partition("```")[0]
        .splitlines()
    )


def test_nginx_of_debian(nginx: Nginx) -> None:
    """As docs/programs.md has it: adopted, restarted once, upgraded live under load with streams, and
    put back. The trial disturbs nobody; both commands may be repeated."""
    run, before, pid = nginx.machine.run, nginx.settings(), nginx.pid
    adopt, restart, upgrade = documented()
    with load(nginx) as seen:
        assert "60-upgrader-run.conf would be:" in run(["upgrader", "adopt", "nginx"]).stdout
        assert before == nginx.settings()
        assert "tried behind a runner" in run(["sh", "-c", adopt]).stdout
    assert [] == seen.failures
    assert pid == nginx.pid
    run(["sh", "-c", restart])
    assert "nothing to adopt" in run(["upgrader", "adopt", "--write", "nginx"]).stdout
    with load(nginx, streams=2) as seen:
        first = nginx.pid
        assert "loaded by live" in run(["sh", "-c", upgrade]).stdout
        assert eventually(lambda: nginx.pid != first)
        shown = json.loads(run(["upgrader", "status", "--json", "nginx"]).stdout)["instance"]
    assert [] == seen.failures
    assert [_STREAM, _STREAM] == seen.streams
    assert re.fullmatch(r"1\.\d+\.\d+", shown["version"])
    assert [False, True] == [each["replaced"] for each in shown["programs"]]
    assert nginx.pid == shown["programs"][0]["pid"]
    assert shown["connections"] >= 2
    checked = json.loads(run(["upgrader", "check", "--json", "nginx"]).stdout)
    assert ["ExecStartPre="] == [each["what"].partition(" ")[0] for each in checked["findings"]]

    run(["upgrader", "adopt", "--undo", "nginx"])
    assert "nothing to undo" in run(["upgrader", "adopt", "--undo", "nginx"]).stdout
    run(["systemctl", "restart", "nginx"])
    assert before == nginx.settings()
    assert "upgrader" not in nginx.command_lines()
    assert nginx.worker


def test_what_does_not_start_is_not_written(nginx: Nginx) -> None:
    """The trial shows it: here, a sandbox that python cannot run in. Nobody notices."""
    drop_in = "[Service]\nNoExecPaths=/\nExecPaths=/usr/sbin/nginx /usr/lib\n"
    nginx.machine.write("/etc/systemd/system/nginx.service.d/hard.conf", drop_in)
    nginx.machine.run(["systemctl", "daemon-reload"])
    nginx.machine.run(["systemctl", "restart", "nginx"])
    with load(nginx) as seen:
        done = nginx.machine.run(["upgrader", "adopt", "--write", "--json", "nginx"], check=False)
    assert 1 == done.returncode
    assert ["trial"] == [each["kind"] for each in json.loads(done.stdout)["refusals"]]
    assert [] == seen.failures
    assert unwritten(nginx)
    assert (
        ""
        == nginx.machine.run(["systemctl", "list-units", "-q", "--all", "upgrader-trial*"]).stdout
    )


def test_killed_in_the_trial(nginx: Nginx) -> None:
    """Of the tool: the one that serves has not noticed, nothing was written, and the next one begins anew;
    beside a living one there is none."""
    run, pid = nginx.machine.run, nginx.pid
    trial = "systemctl is-active upgrader-trial-nginx.service"
    command = ["upgrader", "adopt", "--write", "nginx", "--", "--check", "sleep 600"]
    checks = ["sh", "-c", "pgrep -f '^sleep 600'"]
    with load(nginx) as seen:
        for signal, left in ("TERM", "inactive"), ("KILL", "activating"):
            with nginx.machine.popen(command) as adopting:
                assert eventually(lambda: run(checks, check=False).returncode == 0)
                assert 75 == run(["upgrader", "adopt", "--write", "nginx"], check=False).returncode
                run(["sh", "-c", f"kill -{signal} $(pgrep -f 'upgrader adopt.*[s]leep')"])
            adopting.wait()
            assert left == run(["sh", "-c", trial], check=False).stdout.strip()
        assert unwritten(nginx)
        assert "tried behind a runner" in run(["upgrader", "adopt", "--write", "nginx"]).stdout
    assert [] == seen.failures
    assert pid == nginx.pid
    assert "inactive" == run(["sh", "-c", trial], check=False).stdout.strip()


def unwritten(nginx: Nginx) -> bool:
    """Whether no drop-in was written."""
    inside = Path(f"/proc/{nginx.machine.pid}/root")
    return not (inside / _DROP_IN.format("nginx.service").lstrip("/")).exists()


@pytest.mark.matrix
def test_nginx_with_debians_own_hooks(nginx: Nginx) -> None:
    """Each step under load with streams, the restart that adopts too; a reinstallation and logrotate are
    Debian's own, by the PID in the file of nginx. By the package's own file for runners."""
    run = nginx.machine.run
    text = (ROOT / "packaging" / "lib" / "run").read_text().replace("@PYTHON@", "/usr/bin/python3")
    nginx.machine.write("/usr/lib/upgrader/run", text, mode=0o755)
    run(["sh", "-c", "cd / && dpkg-repack nginx"])
    reinstall = f"{' '.join(APT)} install --reinstall /nginx_*.deb"
    rotate = "rm -f /var/log/nginx/access.log.1* && logrotate --force /etc/logrotate.d/nginx"
    steps = {
        "`upgrader adopt --write nginx`": "upgrader adopt --write nginx",
        "`systemctl restart nginx`, once": "systemctl restart nginx",
        "`apt install --reinstall nginx`": reinstall,
        "`logrotate --force /etc/logrotate.d/nginx`": rotate,
        "`upgrader upgrade --mode live nginx`": "upgrader upgrade --mode live nginx",
        "`systemctl restart nginx`": "systemctl restart nginx",
    }
    rows = []
    for number, (step, command) in enumerate(steps.items()):
        before = nginx.pid
        with load(nginx, streams=2) as seen:
            began = time.monotonic()
            said = run(["sh", "-c", command], env=QUIET, timeout=120).stdout
            took = time.monotonic() - began
            replaced = number not in (0, 3)
            assert not replaced or eventually(lambda before=before: nginx.pid != before)  # type: ignore[misc]
        cut = sum(1 for each in seen.streams if each != _STREAM) + 2 - len(seen.streams)
        rows.append(
            (step, f"{took:.1f} s", str(seen.answers), str(len(seen.failures)), f"{seen.longest * 1000:.0f} ms",
             str(cut))
        )  # fmt: skip
        if number == 0:
            assert "\n    ExecStart=/usr/lib/upgrader/run --listen http=:80" in said
        if number != 1:
            assert ([], 0) == (seen.failures, cut), step
    size = "stat -c %s /var/log/nginx/access.log"
    assert eventually(lambda: int(run(["sh", "-c", size]).stdout) > 0)
    assert "active" == run(["systemctl", "is-active", "nginx"]).stdout.strip()
    publish("adopt", ("step", "took", "answers", "failed", "longest wait", "streams cut"), rows)


#: What is written where, of programs besides nginx; which units are started; where they answer.
_OTHERS = {
    "haproxy": (
        {"/etc/haproxy/haproxy.cfg": """\
global
  stats socket /run/haproxy/admin.sock mode 660 level admin
  user haproxy
  group haproxy
defaults
  mode http
  timeout connect 5s
  timeout client 5s
  timeout server 5s
frontend http
  bind 10.9.8.7:81
  bind [::1]:81 v6only
  http-request return status 200 content-type text/plain lf-string "%pid"
"""},
        ["haproxy"],
        ["http://10.9.8.7:81/", "http://[::1]:81/"],
    ),
    "gunicorn": (
        {
            "/srv/app/app.py": """\
import os
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"%d" % os.getppid()]
""",
            "/etc/systemd/system/gunicorn.socket": "[Socket]\nListenStream=/run/gunicorn.sock\n",
            "/etc/systemd/system/gunicorn.service": """\
[Unit]
Requires=gunicorn.socket
[Service]
Type=notify
NotifyAccess=main
User=app
StateDirectory=app
WorkingDirectory=/srv/app
ExecStart=/usr/bin/gunicorn --workers 2 app:app
ExecReload=/bin/kill -s HUP $MAINPID
KillMode=mixed
TimeoutStopSec=5
""",
        },
        ["gunicorn.socket", "gunicorn"],
        ["--unix-socket /run/gunicorn.sock http://localhost/"],
    ),
}  # fmt: skip


@pytest.mark.matrix
@pytest.mark.parametrize("unit", sorted(_OTHERS))
def test_other_programs(debian: PrivateSystemd, unit: str) -> None:
    """An address that only this machine has, sockets of its own, a .socket unit, a user of its own:
    adopted, restarted, upgraded live, put back."""
    files, units, urls = _OTHERS[unit]
    run = debian.run
    run(["sh", "-c", "ip address add 10.9.8.7/32 dev lo || :"])
    for path, text in files.items():
        debian.write(path, text)
    run(["sh", "-c", "getent passwd app || useradd -r app"])
    run(["systemctl", "daemon-reload"])
    try:
        run(["systemctl", "restart", *units])

        def answers() -> set[str]:
            fetched = [run(["sh", "-c", f"curl -sfg {url}"]).stdout for url in urls]
            return {*fetched}

        first = answers()
        run(["upgrader", "adopt", "--write", unit])
        assert first & answers()
        run(["systemctl", "restart", unit])
        second = answers()
        assert "loaded by live" in run(["upgrader", "upgrade", "--mode", "live", unit]).stdout
        assert eventually(lambda: not second & answers())
        run(["upgrader", "adopt", "--undo", unit])
        run(["systemctl", "restart", unit])
        assert answers()
    finally:
        run(["systemctl", "stop", *units])


@pytest.mark.matrix
def test_where_systemd_cannot_be_asked(debian: PrivateSystemd) -> None:
    """A dynamic user is turned away by dbus-daemon: told before anything is tried."""
    text = "[Service]\nDynamicUser=yes\nExecStart=/usr/bin/python3 -m http.server 8082\n"
    debian.write("/run/systemd/system/dynamic.service", text)
    debian.run(["systemctl", "daemon-reload"])
    debian.run(["systemctl", "start", "dynamic"])
    refused = debian.run(["upgrader", "adopt", "--write", "--json", "dynamic"], check=False)
    debian.run(["systemctl", "stop", "dynamic"])

    assert ["bus"] == [each["kind"] for each in json.loads(refused.stdout)["refusals"]]


@pytest.mark.matrix
def test_what_is_exclusive_is_refused(debian: PrivateSystemd) -> None:
    """By its word, and while it serves."""
    debian.run(["systemctl", "start", "redis-server"])
    refused = debian.run(["upgrader", "adopt", "--write", "--json", "redis-server"], check=False)
    debian.run(["systemctl", "stop", "redis-server"])

    assert 1 == refused.returncode
    assert ["exclusive"] == [each["kind"] for each in json.loads(refused.stdout)["refusals"]]
