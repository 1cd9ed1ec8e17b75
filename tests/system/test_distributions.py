# SPDX-License-Identifier: LGPL-2.1-or-later
"""Upgrades by rpm and by pacman, both real, in a booted Debian that has their programs."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import cannot_run
from tests.system import packages
from tests.system.clients import Clients, lost
from tests.system.packages import ROOT, UNIT
from upgrader.lab.private_systemd import CommandError, PrivateSystemd, TreeError

#: What Fedora's packages define, and Debian's rpm does not have.
_MACROS = """\
%__python3 /usr/bin/python3
%pyproject_wheel python3 -m hatchling build -t wheel
%pyproject_install DEB_PYTHON_INSTALL_LAYOUT=deb_system python3 -m installer --destdir=%{buildroot} dist/*.whl
%pyproject_files %{_builddir}/files
%pyproject_save_files() (cd %{buildroot}; find usr -path '*-packages/%{1}*' ! -type d | sed s,^,/,) >%{pyproject_files}
%python3_sitelib /usr/lib/python3/dist-packages
%systemd_post() %{nil}
%systemd_preun() [ $1 -ge 1 ] || systemctl disable --now %1
%systemd_postun() %{nil}
%_topdir /build/rpm
%_dbpath /var/lib/rpm
"""
_SPEC = """\
Name: web
Version: {version}
Release: 1
Summary: example
License: none
BuildArch: noarch
%description
An example.
%install
mkdir -p %{{buildroot}}/usr/lib/systemd/system
cp -r /build/web{version} %{{buildroot}}/usr/lib/web
mv %{{buildroot}}/usr/lib/web/web.service %{{buildroot}}/usr/lib/systemd/system/
{scriptlets}
%files
/usr/lib/web
/usr/lib/systemd/system/web.service
"""
_RPM = ["rpm", "--nodeps"]
_PACMAN = ["pacman", "--noconfirm", "--config", "/etc/pacman.conf", "-dd"]


@pytest.fixture(scope="module")
def machine() -> Iterator[PrivateSystemd]:
    """A machine where `upgrader` is installed from the RPMs of the spec, and only from them."""
    try:
        tree = packages.packaging("trees").fetch("trixie", lambda text: None)
    except TreeError as error:
        cannot_run(str(error))
    with PrivateSystemd.boot(tree) as machine:
        machine.run(["rm", "-r", "/usr/lib/python3/dist-packages/upgrader", "/usr/bin/upgrader"])
        machine.run(["systemd-sysusers", "--inline", "u web -"])
        machine.write("/root/.rpmmacros", _MACROS)
        packages.copy_source(machine, "/build/upgrader-0.1.0")
        machine.run(["mkdir", "-p", "/build/rpm/SOURCES"])
        archive = "/build/rpm/SOURCES/upgrader-0.1.0.tar.gz"
        machine.run(["tar", "-C", "/build", "-czf", archive, "upgrader-0.1.0"])
        _rpmbuild(machine, "/build/upgrader-0.1.0/packaging/rpm/upgrader.spec")
        built = machine.run(["sh", "-c", "ls /build/rpm/RPMS/noarch/*.rpm"]).stdout.split()
        assert 4 == len(built)
        machine.run([*_RPM, "-i", *(path for path in built if "upgrader-lab-" not in path)])
        for version in "1234":
            for name, text in packages.files(version).items():
                machine.write(f"/build/web{version}/{name}", text)
        yield machine


def _rpmbuild(machine: PrivateSystemd, spec: str) -> None:
    machine.run(["rpmbuild", "-bb", "--nodeps", spec], timeout=120)


def _rpm(machine: PrivateSystemd, version: str) -> str:
    """Install a version by rpm; what it said."""
    done = machine.run(
        [*_RPM, "-U", "--oldpackage", f"/build/rpm/RPMS/noarch/web-{version}-1.noarch.rpm"]
    )
    return done.stdout + done.stderr


def test_upgrades_by_rpm(machine: PrivateSystemd) -> None:
    """With the scriptlets of the documentation: a new version, a broken one, and its repair;
    without our trigger, systemd's own marker has the unit reloaded."""
    (scriptlets,) = packages.documented("spec")
    for version in "1234":
        spec = _SPEC.format(version=version, scriptlets=scriptlets)
        machine.write(f"/build/web{version}.spec", spec)
        _rpmbuild(machine, f"/build/web{version}.spec")
    assert "" == _rpm(machine, "1")
    machine.run(["systemctl", "enable", "--quiet", "--now", UNIT])
    with Clients(machine) as clients:
        window, said = clients.watch(lambda: _rpm(machine, "2"))
        assert ({}, "2") == (lost(window), window.version), said
        assert f"upgrader: {UNIT}: upgraded" in said
        window, said = clients.watch(lambda: _rpm(machine, "3"), upgraded=False)
        assert ({}, "2") == (lost(window), window.version), said
        assert f"warning: {UNIT}: not upgraded, it serves as before" in said
        assert "version 3 is broken" in said
        machine.run(["mv", "/usr/lib/upgrader/request", "/usr/lib/upgrader/elsewhere"])
        window, said = clients.watch(lambda: _marked(machine))
        machine.run(["mv", "/usr/lib/upgrader/elsewhere", "/usr/lib/upgrader/request"])
        assert ({}, "4") == (lost(window), window.version), said
        result = clients.end()

    assert {} == lost(result)
    machine.run([*_RPM, "-e", "web"])
    assert (
        "inactive" == machine.run(["systemctl", "show", "-P", "ActiveState", UNIT]).stdout.strip()
    )


def _marked(machine: PrivateSystemd) -> str:
    said = _rpm(machine, "4")
    show = ["systemctl", "show", "-P", "Markers", UNIT]
    assert "needs-reload" == machine.run(show).stdout.strip(), said
    # As the file trigger of systemd's own RPM does at the end of a transaction.
    machine.run(["systemctl", "daemon-reload"])
    return machine.run(["systemctl", "reload-or-restart", "--marked"]).stderr


def test_the_lab_is_an_rpm_of_its_own(machine: PrivateSystemd) -> None:
    """It has exactly the modules that the library's does not have."""
    listed = {
        name: machine.run(
            ["rpm", "-qlp", f"/build/rpm/RPMS/noarch/{name}-0.1.0-1.noarch.rpm"]
        ).stdout
        for name in ("python3-upgrader", "upgrader-lab")
    }
    assert "/upgrader/takeover/__main__.py" in listed["python3-upgrader"]
    modules = {name: packages.folders(text) for name, text in listed.items()}
    assert packages.LAB == modules["upgrader-lab"]
    assert not packages.LAB & modules["python3-upgrader"]


def test_the_macro_wants_a_unit(machine: PrivateSystemd) -> None:
    """Without the name of one, the build fails and says why."""
    machine.write(
        "/build/none.spec", _SPEC.format(version="1", scriptlets="%post\n%upgrader_post\n")
    )
    with pytest.raises(CommandError, match="needs the names of units"):
        _rpmbuild(machine, "/build/none.spec")


def test_upgrades_by_pacman(machine: PrivateSystemd, tmp_path: Path) -> None:
    """The hook upgrades what runs in upgraded packages; PKGBUILD is one that makepkg reads."""
    machine.copy_in(
        ROOT / "packaging/arch/upgrader.hook",
        "/usr/share/libalpm/hooks/35-upgrader.hook",
    )
    machine.write("/etc/pacman.conf", "[options]\nArchitecture = auto\nSigLevel = Never\n")
    machine.run(["mkdir", "-p", "/var/lib/pacman"])
    for version in "12":
        package = tmp_path / f"web-{version}-1-any.pkg.tar"
        with tarfile.open(package, "w") as archive:
            info = tmp_path / ".PKGINFO"
            info.write_text(f"pkgname = web\npkgver = {version}-1\narch = any\nsize = 1\n")
            archive.add(info, ".PKGINFO", filter=_of_root)
            for name, text in packages.files(version).items():
                file = tmp_path / "file"
                file.write_text(text)
                place = "usr/lib/systemd/system" if name == UNIT else "usr/lib/web"
                archive.add(file, f"{place}/{name}", filter=_of_root)
        machine.copy_in(package, f"/build/{package.name}")
    said = machine.run([*_PACMAN, "-U", "/build/web-1-1-any.pkg.tar"]).stderr
    assert "upgrader:" not in said
    machine.run(["systemctl", "daemon-reload"])
    machine.run(["systemctl", "start", UNIT])
    with Clients(machine) as clients:

        def upgrade() -> str:
            done = machine.run([*_PACMAN, "-U", "/build/web-2-1-any.pkg.tar"])
            return done.stdout + done.stderr

        window, said = clients.watch(upgrade)
        assert ({}, "2") == (lost(window), window.version), said
        assert f"upgrader: {UNIT}: upgraded" in said

    machine.run(["chmod", "-R", "a+rX", "/build/upgrader-0.1.0"])
    machine.run(["cp", "-r", "/build/upgrader-0.1.0/packaging/arch", "/tmp/arch"])
    machine.run(["chown", "-R", "nobody", "/tmp/arch"])
    read = "cd /tmp/arch && exec setpriv --reuid nobody --clear-groups makepkg --printsrcinfo"
    source = machine.run(["sh", "-c", read]).stdout
    assert ["upgrader", "upgrader-lab"] == re.findall(r"^pkgname = (.*)$", source, re.MULTILINE)


def _of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member
