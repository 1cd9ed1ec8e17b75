# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hook of package managers under a real systemd: what it upgrades, what it leaves alone, and that it never fails."""

import concurrent.futures
import json
from collections.abc import Iterator

import pytest

from tests.support import eventually
from tests.system.serving import Install, hook
from upgrader.hooks.package_hook import WINDOW
from upgrader.lab.private_systemd import PrivateSystemd

_POLICY = "/etc/upgrader/policy.d/test.conf"
_POLICY_RC_D = "/usr/sbin/policy-rc.d"
_CHROOT = """\
mount -t tmpfs x /mnt
cp -a /bin /sbin /lib* /mnt/
for d in usr run proc; do mkdir -p /mnt/$d; mount --rbind /$d /mnt/$d; done
exec chroot /mnt "$@"
"""


@pytest.fixture
def clean(trixie_machine: PrivateSystemd) -> Iterator[PrivateSystemd]:
    """A machine whose admin has not said anything."""
    yield trixie_machine
    places = [_POLICY, _POLICY_RC_D, "/var/lib/upgrader/hold", "/run/upgrader/hook"]
    trixie_machine.run(["rm", "-rf", *places])


def test_ten_at_a_time_become_one(any_machine: PrivateSystemd, install: Install) -> None:
    """Ten requests, one upgrade, and all ten are told; more within the minute become one timer."""
    # The machine may be made of a container, whose own answer is no.
    any_machine.run(["rm", "-f", _POLICY_RC_D])
    service = install(any_machine, "wanted", "holder")
    with service.connect() as client:
        client.add()
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            said = list(pool.map(lambda _: hook(any_machine, service.unit), range(10)))

        assert 1 == sum(f"{service.unit}: upgraded in" in text for text in said), said
        assert (2, 2, 2) == client.add()
        assert all(f"{service.unit}: " in text for text in said), said
        for _ in range(5):
            assert f"{service.unit}: upgraded less than" in hook(any_machine, service.unit)
        timers = any_machine.run(["systemctl", "list-timers", "--all", "-q", "upgrader-hook*"])
        assert 1 == len(timers.stdout.splitlines())

        # The minute passes.
        last = service.inside(f"/run/upgrader/hook/last/{service.unit}")
        record = json.loads(last.read_text())
        last.write_text(json.dumps({**record, "ended": record["ended"] - WINDOW}))
        any_machine.run(["systemctl", "start", "--wait", "upgrader-hook.service"])

        assert (3, 3, 3) == client.add()
    any_machine.run(["systemctl", "stop", "upgrader-hook.timer"])


def test_who_may_say_no(clean: PrivateSystemd, install: Install) -> None:
    """The policy, a hold and policy-rc.d are obeyed, by name; a new version goes past a hold."""
    service = install(clean, "refused", "holder")
    name, pid = service.unit, service.pid

    def left_alone(*arguments: str) -> str:
        said = hook(clean, *arguments, name)
        assert pid == service.pid, said
        return said

    clean.write(_POLICY, "ref*.service = never\n")
    assert f"{name}: left alone by the policy" in left_alone("--installed")
    clean.write(_POLICY, "ref*.service = sometimes\n")
    assert f"{_POLICY}:1: 'sometimes' is none of" in left_alone("--installed")
    clean.write(_POLICY, "")
    clean.write(_POLICY_RC_D, "#!/bin/sh\nexit 101\n", mode=0o755)
    assert "policy-rc.d forbids" in left_alone("--installed")
    clean.run(["rm", _POLICY_RC_D])
    service.hold("it was bad")
    assert "left alone, held since" in (said := left_alone())
    assert "it was bad" in said

    assert f"{name}: upgraded in" in hook(clean, "--installed", name)
    assert pid != service.pid


def test_where_there_is_nothing_to_upgrade(clean: PrivateSystemd, install: Install) -> None:
    """Stopped and missing units stay as they are, and the hook says what it found."""
    service = install(clean, "absent", "holder")
    service.stop()
    said = hook(clean, "--installed", service.unit, "nosuch.service", "a b", "x.socket")

    assert f"{service.unit}: nothing to upgrade, it is inactive" in said
    assert "nosuch.service: nothing to upgrade, there is no such unit" in said
    assert "warning: a b: not upgraded" in said
    assert "only services are upgraded" in said
    assert "inactive" == service.show("ActiveState")[0]


@pytest.mark.parametrize(
    ("enter", "said"),
    [
        (["env", "DPKG_ROOT=/mnt"], "another root"),
        (["unshare", "-m", "sh", "-c", 'mount -t tmpfs x /run; exec "$@"', "sh"], "does not run"),
        (["unshare", "-m", "sh", "-c", _CHROOT, "sh"], "chroot"),
    ],
    ids=["another root", "no systemd", "chroot"],
)
def test_without_a_systemd(
    clean: PrivateSystemd, install: Install, enter: list[str], said: str
) -> None:
    """In a chroot, in a container without systemd, and for another root: nothing is touched."""
    service = install(clean, "outside", "holder")
    pid = service.pid
    command = [
        *enter,
        *clean.python,
        "-m",
        "upgrader.hooks.package_hook",
        "--installed",
        service.unit,
    ]

    assert said in clean.run(command).stderr
    assert pid == service.pid


def test_a_unit_that_does_not_use_the_library(clean: PrivateSystemd, install: Install) -> None:
    """It is restarted, as any package would have it, and the hook says so; if it fails as well."""
    plain = "Type=exec", "ExecStart=", "ExecStart=/bin/sleep infinity"
    service = install(clean, "plain", "holder", *plain)
    pid = service.pid

    said = hook(clean, "--installed", service.unit)
    assert f"{service.unit}: restarted without keeping anything" in said
    assert pid != service.pid
    service.configure("Type=exec", "Restart=no", "ExecStart=", "ExecStart=/bin/nosuch")
    said = hook(clean, "--installed", service.unit)
    assert f"warning: {service.unit}: NOT SERVING, after a plain restart" in said


def test_the_first_version_with_the_library_and_the_way_back(
    clean: PrivateSystemd, install: Install
) -> None:
    """Both are plain restarts, each for its own reason."""
    plain = "Type=exec", "ExecStart=", "ExecStart=/bin/sleep infinity"
    service = install(clean, "converted", "holder", *plain)
    service.configure()

    assert "its running instance does not use upgrader" in hook(clean, "--installed", service.unit)
    assert 1 == service.status.generation
    service.configure(*plain)
    said = hook(clean, "--installed", service.unit)
    assert "its unit file says Type=exec now" in said
    assert "active" == service.show("ActiveState")[0]


def test_a_template_stands_for_its_instances(clean: PrivateSystemd, install: Install) -> None:
    """A request for web@.service, as a package files it, upgrades what runs of it, one after the
    other; when the first one fails, the others are left alone."""
    first, second = (install(clean, f"many@{number}", "holder") for number in (1, 2))

    def requested() -> str:
        first.inside("/run/upgrader/hook/filed").mkdir(parents=True, exist_ok=True)
        first.inside("/run/upgrader/hook/filed/many@.service").write_text("installed\n")
        return hook(clean, "--pending")

    said = requested()
    assert "many@1.service: upgraded in" in said
    assert "many@2.service: upgraded in" in said
    assert "" == hook(clean, "--pending")

    pid = second.pid
    first.environment(MODE="exit")
    said = requested()
    assert "warning: many@1.service: not upgraded" in said
    assert "many@2.service: left alone, because many@1.service failed" in said
    assert "" == hook(clean, "--pending")
    assert pid == second.pid
    first.environment()


def test_a2_nobody_holds_up_a_transaction(clean: PrivateSystemd, install: Install) -> None:
    """No other user can open a lock of the hook, and so hold dpkg's trigger for ever."""
    service = install(clean, "unlocked", "holder")
    clean.run(["mkdir", "-p", "-m", "755", "/run/upgrader/hook/lock"])
    hook(clean, service.unit)
    lock = f"/run/upgrader/hook/lock/{service.unit}"
    nobody = ["setpriv", "--reuid=65534", "--clear-groups"]
    tried = clean.run([*nobody, "flock", "--nonblock", lock, "true"], check=False)

    assert (tried.returncode != 0, True) == (True, "Permission denied" in tried.stderr)
    assert clean.run(["flock", "--nonblock", lock, "true"]).returncode == 0


def test_one_unit_does_not_keep_the_hook_from_the_others(
    clean: PrivateSystemd, install: Install
) -> None:
    """A5: what nobody expected of one unit is said, with its name, and the next one is upgraded."""
    first, second = (install(clean, name, "holder") for name in ("first", "second"))
    # A directory where a file should be: no error of ours.
    clean.run(["mkdir", "-p", f"/run/upgrader/hook/lock/{first.unit}"])
    said = hook(clean, "--installed", first.unit, second.unit)

    assert f"warning: {first.unit}: unexpected IsADirectoryError" in said
    assert f"{second.unit}: upgraded in" in said


def test_files_of_packages(clean: PrivateSystemd, install: Install) -> None:
    """As pacman lists them: what uses the library is upgraded, all else is not even mentioned."""
    service = install(clean, "listed", "holder")
    paths = f"usr/lib/systemd/system/{service.unit}\nusr/lib/systemd/system/dbus.service\nusr/a\n"
    command = [*clean.python, "-m", "upgrader.hooks.package_hook", "--files"]
    said = clean.run(command, input=paths).stderr

    assert f"upgrader: {service.unit}: upgraded in" in said
    assert all(service.unit in line for line in said.splitlines())


def test_a_bad_version_and_its_repair(clean: PrivateSystemd, install: Install) -> None:
    """The bad one is reported with its cause; the next new version starts with what was parked."""
    service = install(clean, "repaired", "holder", "StartLimitIntervalSec=60", "StartLimitBurst=2")
    with service.connect() as client:
        client.add()
        service.environment(MODE="exit")
        said = hook(clean, "--installed", service.unit)
        assert f"warning: {service.unit}: not upgraded" in said
        service.environment()
        said = hook(clean, "--installed", service.unit)

        assert eventually(lambda: service.show("ActiveState") == ["active"])
        assert (2, 2) == client.add()[:2]
