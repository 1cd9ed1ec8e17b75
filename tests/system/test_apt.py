# SPDX-License-Identifier: LGPL-2.1-or-later
"""The whole story under apt, in a booted Debian 13: packages of a service, installed one over the other under load."""

import concurrent.futures
import json
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest

from tests.system import packages
from tests.system.clients import Clients, lost
from tests.system.packages import UNIT
from tests.system.serving import PROGRAMS
from upgrader.lab.private_systemd import PrivateSystemd
from upgrader.systemd.journal import MESSAGE_ID


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSystemd]:
    """Debian 13 with all versions of the service at hand."""
    with packages.booted("trixie", tmp_path_factory.getbasetemp()) as machine:
        for version in "01234":
            packages.service_package(machine, version)
        yield machine


@pytest.fixture
def web(machine: PrivateSystemd) -> Iterator["Web"]:
    """The package of the service; purged after the test."""
    web = Web(machine)
    yield web
    machine.run(["dpkg", "--purge", "web"])


class Web:
    """The package `web` in a machine."""

    def __init__(self, machine: PrivateSystemd) -> None:
        self.machine = machine

    def apt(self, *arguments: str) -> str:
        """Run apt-get; what it said. An exit code other than 0 is an error."""
        done = self.machine.run([*packages.APT, *arguments], env=packages.QUIET, timeout=120)
        return done.stdout + done.stderr

    def install(self, version: str) -> str:
        return self.apt("install", f"/debs/web_{version}_all.deb")

    def killed_at(self, version: str, step: int) -> str:
        """Install with dpkg, kill it with all it has started at a step, and repair that."""
        deb = f"/debs/web_{version}_all.deb"
        command = ["dpkg", "--force-downgrade", "--status-fd", "1", "-i", deb]
        seen = ["killed"]
        with self.machine.popen(command, stdout=PIPE, stderr=STDOUT) as dpkg:
            assert dpkg.stdout is not None
            reported = 0
            for line in dpkg.stdout:
                seen.append(line)
                if line.startswith(("status:", "processing:")):
                    if reported == step:
                        dpkg.kill()
                    reported += 1
            dpkg.wait()
        if reported <= step:
            seen[0] = "done"
        repaired = self.machine.run(["dpkg", "--configure", "-a"], check=False)
        seen += [repaired.stdout, repaired.stderr]
        asked = ["dpkg-query", "-f", "${Version} ${db:Status-Abbrev}", "-W", "web"]
        if self.machine.run(asked).stdout.strip() != f"{version} ii":
            # Killed while it was unpacked, which dpkg repairs by unpacking it again.
            again = self.machine.run(["dpkg", "--force-downgrade", "-i", deb])
            seen += [again.stdout, again.stderr]
        return "\n".join(seen)

    def own_packages(self, revision: str) -> list[str]:
        """The command and the library as packages of another revision; returns their paths."""
        made = []
        for name in ("python3-upgrader", "upgrader"):
            (deb,) = self.machine.run(["sh", "-c", f"ls /debs/{name}_*.deb"]).stdout.split()
            made.append(f"/debs/new_{name}.deb")
            self.machine.run(["sh", "-c", _NEWER, "sh", deb, made[-1], revision])
        return made

    def stale_library(self) -> str:
        """Replace a library that the service has loaded, and run needrestart; what it said."""
        return self.machine.run(["sh", "-c", _STALE], timeout=120).stdout

    def show(self, name: str) -> str:
        return self.machine.run(["systemctl", "show", "-P", name, UNIT]).stdout.strip()

    @property
    def held(self) -> bool:
        """Whether a failed upgrade has left a hold."""
        return Path(f"/proc/{self.machine.pid}/root/var/lib/upgrader/hold/{UNIT}").exists()

    @property
    def environment(self) -> str:
        """Of the main process."""
        pid = self.show("MainPID")
        return Path(f"/proc/{self.machine.pid}/root/proc/{pid}/environ").read_text()


def test_upgrades_by_apt_lose_nothing(web: Web) -> None:
    """A new version with a changed unit, a broken one, its repair, and a downgrade: apt succeeds,
    the warning names the cause, and no client notices."""
    web.install("1")
    with Clients(web.machine) as clients:
        for version, serves in (("2", "2"), ("3", "2"), ("4", "4"), ("1", "1")):
            window, said = clients.watch(
                lambda version=version: web.install(version), upgraded=version == serves
            )
            assert {} == lost(window), (said, clients.end().losses)
            assert window.stall_ms < 1000, said
            assert serves == window.version, said
            assert f"PACKAGED={serves}" in web.environment
            assert ("active", "") == (web.show("ActiveState"), web.show("Job").strip("0"))
            if version == serves:
                assert f"upgrader: {UNIT}: upgraded" in said
                assert not web.held
            else:
                assert f"warning: {UNIT}: not upgraded, it serves as before" in said
                assert "version 3 is broken" in said
                assert web.held
        result = clients.end()

    assert {} == lost(result)


def test_dpkg_killed_anywhere(web: Web) -> None:
    """With dpkg killed at each step that it reports, `dpkg --configure -a` (and a reinstallation,
    where dpkg itself asks for one) leads to one version that serves, and nothing is lost."""
    web.install("1")
    points = 0
    with Clients(web.machine) as clients:
        for step in range(_STEPS):
            new = "12"[(step + 1) % 2]
            window, said = clients.watch(lambda new=new, step=step: web.killed_at(new, step))
            assert {} == lost(window), said
            assert new == window.version, said
            assert f"PACKAGED={new}" in web.environment, said
            points += said.startswith("killed")
        result = clients.end()

    assert {} == lost(result)
    assert points >= 10
    assert "ii " == web.machine.run(["dpkg-query", "-f", "${db:Status-Abbrev}", "-W", "web"]).stdout


def test_from_a_version_without_the_library_and_back(web: Web) -> None:
    """Both ways are plain restarts; the way there is one of ours, and apt says so."""
    web.install("0")
    said = web.install("1")
    assert f"{UNIT}: restarted without keeping anything: its running instance does not" in said
    assert "generation 1, cold start" == web.show("StatusText")
    web.install("0")  # restarts it, as packages do that know nothing of all this
    assert "http.server" in web.show("ExecStart")
    assert "active" == web.show("ActiveState")


def test_removal_and_purge(web: Web) -> None:
    """A removal stops the service, for good; a purge leaves no file of it, nor a hold."""
    web.install("1")
    web.machine.write(f"/var/lib/upgrader/hold/{UNIT}", "{}")
    said = web.apt("remove", "web")
    assert "upgrader:" not in said
    assert "inactive" == web.show("ActiveState")
    assert "0" == web.show("NFileDescriptorStore")
    web.apt("purge", "web")

    left = "ls -d /usr/lib/web /etc/*/*/web.service /var/lib/upgrader/hold/web.service"
    assert "" == web.machine.run(["sh", "-c", left], check=False).stdout


def test_n6_a_purge_leaves_no_instance_and_no_hold(web: Web) -> None:
    """Of a template, one instance that serves and one that has failed, with all it had parked: after
    a removal nothing of them serves or is held by systemd, after a purge no hold is left."""
    more = {
        "debian/web.install": "web usr/lib/web\nroom.py usr/lib/web\nroom@.service usr/lib/systemd/system\n",
        "room.py": (PROGRAMS / "holder.py").read_text(),
        "room@.service": _ROOM,
    }
    packages.service_package(web.machine, "8", more=more)
    web.install("8")
    rooms = ["room@1.service", "room@2.service"]
    shown = ["systemctl", "show", "-P", "ActiveState", "-P", "NFileDescriptorStore", *rooms]
    web.machine.run(["systemctl", "start", *rooms])
    web.machine.write("/run/room2.env", "MODE=exit\n")
    web.machine.run(["upgrader", "upgrade", "--mode", "restart", rooms[1]], check=False)
    assert ["1", "active", "2", "failed"] == web.machine.run(shown).stdout.split()
    web.machine.write(f"/var/lib/upgrader/hold/{rooms[0]}", "{}")
    web.apt("remove", "web")

    assert ["0", "inactive"] * 2 == web.machine.run(shown).stdout.split()
    web.apt("purge", "web")
    assert "" == web.machine.run(["ls", "/var/lib/upgrader/hold"]).stdout
    assert "" == web.machine.run(["upgrader", "list", "--names"]).stdout


def test_who_does_not_want_it(web: Web) -> None:
    """A masked unit and a stopped one stay what they are, a policy is obeyed, and apt succeeds."""
    web.install("1")
    pid = web.show("MainPID")
    web.machine.run(["systemctl", "mask", UNIT])
    assert f"{UNIT}: nothing to upgrade, it is masked" in web.install("2")
    web.machine.run(["systemctl", "unmask", UNIT])
    web.machine.write("/etc/upgrader/policy.d/web.conf", f"{UNIT} = never\n")
    assert f"{UNIT}: left alone by the policy" in web.install("1")
    assert pid == web.show("MainPID")
    web.machine.write("/etc/upgrader/policy.d/web.conf", f"{UNIT} = restart\n")
    assert "loaded by restart" in web.install("2")
    web.machine.write("/etc/upgrader/policy.d/web.conf", f"{UNIT} = live\n")
    assert "loaded by live" in web.install("1")
    web.machine.run(["rm", "/etc/upgrader/policy.d/web.conf"])
    web.machine.run(["systemctl", "disable", "--now", UNIT])
    assert f"{UNIT}: nothing to upgrade, it is inactive" in web.install("2")
    assert "inactive" == web.show("ActiveState")


def test_with_our_own_package_in_the_same_transaction(web: Web) -> None:
    """The command, the library and the service get new versions at once: one upgrade, at the end."""
    web.install("1")
    debs = web.own_packages("2")
    with Clients(web.machine) as clients:
        window, said = clients.watch(lambda: web.apt("install", *debs, "/debs/web_2_all.deb"))

        assert {} == lost(window), said
        assert "2" == window.version, said
        assert 1 == said.count(f"upgrader: {UNIT}: upgraded"), said


def test_n6_a_library_that_is_in_use_is_replaced(web: Web) -> None:
    """Ours, by a package of its own: who has imported it is upgraded, once, if the policy says so."""
    web.install("1")
    with Clients(web.machine) as clients:
        window, said = clients.watch(lambda: web.apt("install", *web.own_packages("3")))

        assert {} == lost(window), said
        assert 1 == said.count(f"upgrader: {UNIT}: upgraded"), said
        assert f"{UNIT}: has loaded what was replaced: /usr/lib/python3/" in said
        assert 2 == window.generation
    again = web.machine.run(["/usr/lib/upgrader/hook", "--pending", "--libraries"])
    assert "" == again.stderr
    web.machine.run(["rm", "-r", "/run/upgrader/hook"])
    web.machine.write("/etc/upgrader/policy.d/web.conf", f"{UNIT} = never\n")
    assert f"{UNIT}: left alone by the policy" in web.apt("install", *web.own_packages("4"))
    web.machine.run(["rm", "/etc/upgrader/policy.d/web.conf"])


def test_unattended_upgrades(web: Web) -> None:
    """From a repository, in the night: nothing is lost, and the log has the line."""
    web.install("1")
    web.machine.run(["sh", "-c", _REPOSITORY])
    with Clients(web.machine) as clients:
        window, said = clients.watch(
            lambda: web.machine.run(["unattended-upgrade"], timeout=120).stderr
        )
        assert {} == lost(window), said
        assert "2" == window.version, said
    log = "/var/log/unattended-upgrades/unattended-upgrades-dpkg.log"
    assert f"upgrader: {UNIT}: upgraded" in web.machine.run(["cat", log]).stdout


def test_needrestart_asks_us(web: Web) -> None:
    """A library that is in use was replaced: needrestart has the unit upgraded, and a hold obeyed;
    at the same moment as a package, nothing is lost, and both are told."""
    web.install("1")
    with Clients(web.machine) as clients:
        window, said = clients.watch(web.stale_library)
        assert {} == lost(window), said
        assert f"upgrader: {UNIT}: upgraded" in said
        assert window.generation == 2

        web.machine.run(["rm", "-r", "/run/upgrader/hook"])
        hold = json.dumps({"unit": UNIT, "since": time.time(), "cause": "bad"})
        web.machine.write(f"/var/lib/upgrader/hold/{UNIT}", hold)
        window, said = clients.watch(web.stale_library, upgraded=False)
        assert f"{UNIT}: left alone, held since" in said
        assert window.generation == 2

        # What comes second finds itself served, or, for files that came later, is one more.
        web.machine.run(["rm", "-rf", "/run/upgrader/hook", f"/var/lib/upgrader/hold/{UNIT}"])
        told: list[str] = []

        def both() -> str:
            work = (
                lambda: web.install("2"),
                lambda: web.machine.run([f"/run/upgrader/needrestart/{UNIT}"]).stderr,
            )
            with concurrent.futures.ThreadPoolExecutor() as pool:
                told[:] = pool.map(lambda each: each(), work)
            return "\n".join(told)

        window, said = clients.watch(both)
        assert ({}, "2") == (lost(window), window.version), said
        assert all(f"{UNIT}: " in each for each in told), told


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("override_dh_installsystemd:\n\tdh_installsystemd\n", "postinst would restart it"),
        (
            "override_dh_installsystemd:\n\tdh_installsystemd --no-restart-after-upgrade\n",
            "preinst would stop it",
        ),
        (
            "execute_after_dh_installsystemd:\n\tdh_installsystemd --no-start --no-enable -R\n",
            "postinst would try-restart it",
        ),
        ("override_dh_upgrader:\n\tdh_upgrader other.service\n", "does not have the service unit"),
    ],
)
def test_dh_upgrader_fails_a_build(machine: PrivateSystemd, rules: str, said: str) -> None:
    """Where the unit would be restarted as well, or is not there, the build says so and ends."""
    done = packages.service_package(machine, "2", rules, check=False)

    assert done.returncode != 0
    assert said in done.stdout


def test_a_changed_socket_unit_and_a_changed_conffile(web: Web) -> None:
    """The listener of a .socket unit stays open though the unit is another one, the admin's file
    stays the admin's, and the service is upgraded."""
    for version, backlog in (("6", 32), ("7", 64)):
        required = "[Unit]\nRequires=web.socket\n"
        more = {
            "debian/web.service": packages.unit_file(version).replace("[Unit]\n", required),
            "debian/web.socket": _SOCKET.format(backlog=backlog),
            "debian/web.install": "web usr/lib/web\nweb.conf etc\n",
            "web.conf": f"version {version}\n",
        }
        packages.service_package(web.machine, version, more=more)
    web.install("6")
    web.machine.write("/etc/web.conf", "mine\n")
    socket = ["systemctl", "show", "-P", "ActiveEnterTimestampMonotonic", "web.socket"]
    since = web.machine.run(socket).stdout
    with Clients(web.machine) as clients:
        window, said = clients.watch(
            lambda: web.apt("install", "-oDpkg::Options::=--force-confold", "/debs/web_7_all.deb")
        )
        assert ({}, "7") == (lost(window), window.version), said
        assert f"upgrader: {UNIT}: upgraded" in said
    assert since == web.machine.run(socket).stdout
    assert "mine\n" == web.machine.run(["cat", "/etc/web.conf"]).stdout


def test_units_with_and_without(machine: PrivateSystemd) -> None:
    """With the rules of the documentation, the one unit is upgraded and the other one restarted."""
    (rules,) = packages.documented("make")
    more = {
        "debian/web.install": "web usr/lib/web\nother.service usr/lib/systemd/system\n",
        "debian/web.upgrader": f"{UNIT}\n",
        "other.service": "[Service]\nExecStart=/bin/sleep infinity\n",
    }
    packages.service_package(machine, "5", rules, more=more)
    scripts = "dpkg-deb --ctrl-tarfile /debs/web_5_all.deb | tar -xO ./postinst"
    postinst = machine.run(["sh", "-c", scripts]).stdout

    assert f"/usr/lib/upgrader/request '{UNIT}'" in postinst
    assert f"deb-systemd-invoke start '{UNIT}'" in postinst
    assert "deb-systemd-invoke $_dh_action 'other.service'" in postinst


def test_what_belongs_to_the_command_is_in_its_place(machine: PrivateSystemd) -> None:
    """Completions, manual pages, the catalog of the journal, and the place of the policy."""
    complete = ". /usr/share/bash-completion/completions/upgrader; complete -p upgrader"
    assert "upgrader" in machine.run(["bash", "-c", complete]).stdout
    catalog = machine.run(["journalctl", "--dump-catalog", MESSAGE_ID]).stdout
    assert "Subject: In-place upgrade of" in catalog
    listed = machine.run(["dpkg", "-L", "upgrader", "dh-upgrader", "python3-upgrader"]).stdout
    for path in (
        "/etc/upgrader/policy.d",
        "/usr/lib/tmpfiles.d/upgrader.conf",
        "/usr/share/fish/vendor_completions.d/upgrader.fish",
        "/usr/share/man/man1/dh_upgrader.1.gz",
        "/usr/share/man/man1/upgrader.1.gz",
        "/usr/share/zsh/vendor-completions/_upgrader",
    ):
        assert path in listed.splitlines()
    assert machine.run(["stat", "-c", "%a", "/run/upgrader"]).stdout == "755\n"


def test_no_service_gets_the_lab(machine: PrivateSystemd) -> None:
    """It is no part of what a service depends on; the command names the package that has it, and
    with that one the demonstration runs."""
    assert not packages.LAB & packages.folders(
        machine.run(["dpkg", "-L", "python3-upgrader", "upgrader"]).stdout
    )
    done = machine.run(["upgrader", "demo"], check=False)
    assert (2, "") == (done.returncode, done.stdout)
    assert "apt-get install upgrader-lab" in done.stderr
    # The other two as well: another test may have put a newer version of them in.
    same = "ls /debs/upgrader-lab_*.deb /debs/upgrader_*.deb /debs/python3-upgrader_*.deb"
    debs = machine.run(["sh", "-c", same]).stdout.split()
    machine.run([*packages.APT, "install", *debs], env=packages.QUIET, timeout=120)
    try:
        assert packages.LAB == packages.folders(machine.run(["dpkg", "-L", "upgrader-lab"]).stdout)
        machine.copy_in(packages.ROOT / "packaging/deb/debian/tests/demo", "/build/demo")
        assert "Nothing was lost." in machine.run(["/build/demo"], timeout=300).stdout
    finally:
        machine.run(["dpkg", "--purge", "upgrader-lab"])


def test_n8_metrics_are_written_by_a_timer(web: Web) -> None:
    """Where node_exporter's directory is, by a service that may write nothing else; not by itself."""
    web.install("1")
    place = "/var/lib/prometheus/node-exporter"
    timer = ["systemctl", "is-enabled", "upgrader-metrics.timer"]
    assert "disabled\n" == web.machine.run(timer, check=False).stdout
    web.machine.run(["systemctl", "start", "upgrader-metrics.service"])
    assert web.machine.run(["ls", place], check=False).returncode != 0
    web.machine.run(["mkdir", "-p", place])
    web.machine.run(["systemctl", "start", "upgrader-metrics.service"])
    text = web.machine.run(["cat", f"{place}/upgrader.prom"]).stdout

    assert f'upgrader_serving{{unit="{UNIT}"}} 1\n' in text
    assert f'upgrader_generation{{unit="{UNIT}"}} 1\n' in text
    web.machine.run(["systemctl", "enable", "--now", "upgrader-metrics.timer"])
    web.machine.run(["systemctl", "disable", "--now", "upgrader-metrics.timer"])
    web.machine.run(["rm", "-r", place])


def test_n8_a_deploy_user_by_polkits_leave(web: Web) -> None:
    """With the example of the package: a member of the group upgrades the unit, restarts it, and holds a
    reference to it; it does nothing else, and nobody else does any of it."""
    web.install("1")
    web.machine.run(["systemd-sysusers", "--inline", "u deploy -", "u other -"])
    rules = "/etc/polkit-1/rules.d/50-upgrader.rules"
    web.machine.run(["cp", "/usr/share/upgrader/polkit/50-upgrader.rules", rules])
    web.machine.run(["systemctl", "restart", "polkit.service"])

    def may(user: str, *command: str) -> bool:
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        return web.machine.run([*become, *command], check=False).returncode == 0

    manager = "org.freedesktop.systemd1"
    ref = ["busctl", "call", manager, "/org/freedesktop/systemd1", f"{manager}.Manager", "RefUnit"]
    web.install("2")
    pid = web.show("MainPID")
    web.machine.run(["touch", "/usr/lib/web/web/__main__.py"])
    assert may("deploy", "systemctl", "reload", UNIT)
    assert pid != web.show("MainPID")
    assert "loaded by live" in web.show("StatusText")
    assert may("deploy", *ref, "s", UNIT)
    assert may("deploy", "systemctl", "restart", UNIT)
    assert may("deploy", "systemctl", "reset-failed", UNIT)
    pid = web.show("MainPID")
    assert not may("deploy", "systemctl", "stop", UNIT)
    assert not may("deploy", "systemctl", "restart", "dbus.service")
    assert not may("other", "systemctl", "reload", UNIT)
    assert may("deploy", "upgrader", "upgrade", UNIT)  # nothing has changed
    assert pid == web.show("MainPID")
    web.machine.run(["touch", "/usr/lib/web/web/__main__.py"])
    assert not may("other", "upgrader", "upgrade", UNIT)
    assert pid == web.show("MainPID")
    assert may("deploy", "upgrader", "upgrade", UNIT)
    assert pid != web.show("MainPID")
    assert "loaded by live" in web.show("StatusText")
    web.machine.run(["rm", rules])


def test_the_test_of_the_package(machine: PrivateSystemd) -> None:
    """What autopkgtest runs on the installed package: the sample unit, live and by the hook."""
    script = packages.ROOT / "packaging/deb/debian/tests/upgrade"
    # The tree has no documentation, which apt leaves out there.
    for name in ("README.md", "units/chat.service"):
        package = "upgrader" if name == "README.md" else "python3-upgrader/examples"
        place = f"/usr/share/doc/{package}/{Path(name).name}"
        machine.copy_in(packages.ROOT / name, place)
    machine.copy_in(script, "/build/upgrade")
    machine.run(["/build/upgrade"])


def test_debian_12(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its packages, with the backport of msgspec: the same upgrade under load, live, on 252."""
    with packages.booted("bookworm", tmp_path_factory.getbasetemp()) as machine:
        asked = ["dpkg-query", "-f", "${Version}", "-W", "python3-msgspec"]
        version = machine.run(asked).stdout
        machine.run(["dpkg", "--compare-versions", version, "lt", "0.19.0-2"])
        for each in "12":
            packages.service_package(machine, each)
        web = Web(machine)
        web.install("1")
        with Clients(machine) as clients:
            window, said = clients.watch(lambda: web.install("2"))
            assert ({}, "2") == (lost(window), window.version), said
            assert "loaded by live" in said


_SOCKET = """\
[Socket]
ListenStream=127.0.0.1:8080
FileDescriptorName=http
Backlog={backlog}
[Install]
WantedBy=sockets.target
"""
#: More than dpkg reports; the last rounds are not interrupted.
_STEPS = 14
_ROOM = """\
[Service]
Type=notify
NotifyAccess=exec
FileDescriptorStoreMax=16
FileDescriptorStorePreserve=yes
RuntimeDirectory=room%i
Environment=PORT=710%i
EnvironmentFile=-/run/room%i.env
ExecStart=/usr/bin/python3 /usr/lib/web/room.py
"""
_NEWER = """
set -eu
dpkg-deb -R "$1" /build/repacked
sed -i "s/0\\.1\\.0-1/0.1.0-$3/" /build/repacked/DEBIAN/control
dpkg-deb -b /build/repacked "$2" >/dev/null
rm -r /build/repacked
"""
_REPOSITORY = """
set -eu
mkdir -p /repository
cp /debs/web_2_all.deb /repository
cd /repository
apt-ftparchive packages . >Packages
apt-ftparchive -o APT::FTPArchive::Release::Origin=Web release . >Release
rm -f /etc/apt/sources.list.d/*
echo 'deb [trusted=yes] file:/repository ./' >/etc/apt/sources.list
echo 'Unattended-Upgrade::Origins-Pattern { "origin=Web"; };' >/etc/apt/apt.conf.d/60web
apt-get -qq update
"""
_STALE = """
set -eu
library=$(echo /usr/lib/python3/dist-packages/msgspec/_core.*.so)
cp -a "$library" "$library.new"
mv "$library.new" "$library"
exec needrestart -r a 2>&1
"""
