# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private systemd is a real machine of its own, and nothing of it is left behind."""

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.isolation import OWN
from tests.support import SETTLE
from upgrader.lab.private_systemd import (
    BootError,
    CommandError,
    PrivateSystemd,
    PrivateSystemdError,
    TreeError,
)

# Host-wide settings that a systemd writes when it takes itself for the machine's own.
HOST_SETTINGS = (
    "fs/nr_open",
    "fs/file-max",
    "kernel/core_pattern",
    "kernel/pid_max",
    "kernel/printk",
    "net/unix/max_dgram_qlen",
)


def _settings() -> dict[str, str]:
    return {name: Path("/proc/sys", name).read_text() for name in HOST_SETTINGS}


# A machine of its own


def test_the_boot_is_complete(fresh_machine: PrivateSystemd) -> None:
    """When boot returns, no job is left, no unit has failed, and only journal and bus are running."""
    state = fresh_machine.run(["systemctl", "is-system-running"]).stdout.strip()
    first = fresh_machine.run(["cat", "/proc/1/comm"]).stdout.strip()
    jobs = fresh_machine.run(["systemctl", "list-jobs", "--no-legend"]).stdout.strip()
    running = fresh_machine.run(
        ["systemctl", "show", "-p", "Id", "--value", "--state=running", "*.service"]
    ).stdout.split()

    assert ("running", "systemd", "") == (state, first, jobs)
    assert {"dbus.service", "systemd-journald.service"} == set(running)


def test_the_version_is_that_of_the_tree(trixie_machine: PrivateSystemd) -> None:
    """A trixie tree boots trixie's systemd, whatever the machine itself has."""
    assert 257 == trixie_machine.systemd_version


def test_the_newest_systemd_boots(sid_machine: PrivateSystemd) -> None:
    """The systemd of Debian's next release boots as well."""
    assert sid_machine.systemd_version >= 257


def test_identity_is_its_own(any_machine: PrivateSystemd) -> None:
    """Machine ID and host name differ from the machine's own."""
    machine_id = any_machine.run(["cat", "/etc/machine-id"]).stdout.strip()

    assert re.fullmatch("[0-9a-f]{32}", machine_id)
    assert (
        not Path("/etc/machine-id").exists()
        or machine_id not in Path("/etc/machine-id").read_text()
    )
    assert "private\n" == any_machine.run(["uname", "-n"]).stdout


def test_the_network_is_a_loopback(any_machine: PrivateSystemd) -> None:
    """The only interface is the loopback, and it is up."""
    listed = any_machine.run(["sh", "-c", "cd /sys/class/net; echo *; cat lo/flags"]).stdout.split()

    assert "lo" == listed[0]
    assert 2 == len(listed)
    assert int(listed[1], 16) & 1


def test_the_settings_of_the_kernel_stay(any_machine: PrivateSystemd) -> None:
    """Inside, the kernel's settings are read-only, except those of its own network."""
    refused = any_machine.run(["sh", "-c", "echo 1 >/proc/sys/kernel/printk"], check=False)
    before = _settings()
    any_machine.run(["sh", "-c", "echo 77 >/proc/sys/net/unix/max_dgram_qlen"])

    assert 0 != refused.returncode
    assert before == _settings()


def test_two_machines_know_nothing_of_each_other() -> None:
    """Machines that run at the same time share no process, no file and no address."""
    before = _settings()
    with PrivateSystemd.boot("host") as one, PrivateSystemd.boot("host") as other:
        one.write("/etc/only-here", "")
        one.run(["systemd-run", "-q", "--unit=only-here", "sleep", "infinity"])

        assert 0 != other.run(["test", "-e", "/etc/only-here"], check=False).returncode
        assert 0 != other.run(["systemctl", "is-active", "only-here"], check=False).returncode
    assert not Path("/etc/only-here").exists()
    assert before == _settings()


NESTED = """
from upgrader.lab.private_systemd import PrivateSystemd
with PrivateSystemd.boot("host") as machine:
    print(machine.run(["systemctl", "is-system-running"]).stdout)
"""


def test_a_machine_boots_inside_another(host_machine: PrivateSystemd) -> None:
    """It boots where only cgroup2 is mounted and the root is an overlay: in a container, that is."""
    said = host_machine.run([*host_machine.python, "-c", NESTED]).stdout

    assert "running" == said.strip()


# Services without privileges


REACH = """
import os, signal, socket, subprocess, sys
import msgspec, upgrader
# dbus-daemon turns dynamic users away, on any machine: systemd hides their names from it.
if sys.argv[1] != "DynamicUser=yes":
    ping = ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.DBus.Peer", "Ping"]
    subprocess.run(["busctl", "call", *ping], check=True)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
    notify.connect(os.environ["NOTIFY_SOCKET"].replace("@", chr(0)))
    notify.send(b"READY=1")
signal.pause()
"""


@pytest.mark.parametrize("user", ["User=daemon", "DynamicUser=yes"])
def test_a_service_without_privileges_reaches_all_it_needs(
    any_machine: PrivateSystemd, user: str
) -> None:
    """It gets to its Python with upgrader, to the notification socket and to the bus."""
    any_machine.write("/usr/local/share/reach.py", REACH)
    # A private /tmp would hide a checkout that lies in /tmp.
    checkout = f"BindReadOnlyPaths=-{Path(__file__).parents[2]}"
    service = ["-q", "--unit=reach", "--collect", "-p", "Type=notify", "-p", user, "-p", checkout]
    program = [*any_machine.python, "/usr/local/share/reach.py", user]
    any_machine.run(["systemd-run", *service, *program])
    uid = any_machine.run(["sh", "-c", "stat -c %u /proc/$(systemctl show -P MainPID reach)"])
    any_machine.run(["systemctl", "stop", "reach"])

    assert "0" != uid.stdout.strip()


def test_upgrader_is_on_the_path(any_machine: PrivateSystemd) -> None:
    """Services and people inside find the command."""
    found = any_machine.run(
        ["systemd-run", "-q", "--pipe", "--wait", "sh", "-c", "command -v upgrader"]
    ).stdout.strip()

    assert found.endswith("/upgrader")


# Commands and files


def test_a_failing_command_says_why(host_machine: PrivateSystemd) -> None:
    """The error has the status and what the command wrote."""
    with pytest.raises(CommandError, match="no such thing") as failed:
        host_machine.run(["sh", "-c", "echo no such thing >&2; exit 7"])

    assert 7 == failed.value.status


def test_a_slow_command_is_killed_with_all_it_started(host_machine: PrivateSystemd) -> None:
    """After its time a command is gone, and so is what it left in the background."""
    with pytest.raises(CommandError, match="too long"):
        host_machine.run(["sh", "-c", "setsid sleep 12345 & sleep 12345"], timeout=0.5)

    everything = host_machine.run(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]).stdout

    assert "sleep 12345" not in everything


def test_signals_reach_the_program(host_machine: PrivateSystemd) -> None:
    """A signal sent to a started command arrives at the program inside."""
    script = "trap 'echo got it; exit 3' TERM; echo up; while :; do sleep 0.05; done"
    with host_machine.popen(["sh", "-c", script], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert "up\n" == program.stdout.readline()
        program.terminate()

        assert "got it\n" == program.stdout.readline()
        assert 3 == program.wait(SETTLE)


def test_input_is_passed_on(host_machine: PrivateSystemd) -> None:
    """A command reads what it is given."""
    assert "abc" == host_machine.run(["cat"], input="abc").stdout


def test_a_client_outside_reaches_the_network_inside(any_machine: PrivateSystemd) -> None:
    """`network_only` runs a program of the machine itself against an address inside."""
    serve = [*any_machine.python, "-m", "http.server", "-b", "127.0.0.1", "8081", "-d", "/etc"]
    any_machine.run(["systemd-run", "-q", "--collect", "--unit=web", *serve])
    fetch = (
        "import time, urllib.request\n"
        "for left in range(400, 0, -1):\n"
        "    try:\n"
        "        print(urllib.request.urlopen('http://127.0.0.1:8081/hostname').read().decode())\n"
        "        break\n"
        "    except OSError:\n"
        "        time.sleep(0.05)\n"
    )
    answer = any_machine.run([sys.executable, "-c", fetch], network_only=True).stdout
    any_machine.run(["systemctl", "stop", "web"])

    assert "private" == answer.strip()


def test_files_go_in(any_machine: PrivateSystemd, tmp_path: Path) -> None:
    """Texts, files and whole directories arrive with their modes, owned by root."""
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "file").write_text("deep")
    (tmp_path / "tree" / "run").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "tree" / "run").chmod(0o755)
    any_machine.write("/opt/new/text", "text", mode=0o600)
    any_machine.copy_in(tmp_path / "tree", "/opt/new/tree")
    stat = ["stat", "-c", "%a %U", "/opt/new/text"]

    assert "600 root\n" == any_machine.run(stat).stdout
    assert "deep" == any_machine.run(["cat", "/opt/new/tree/deep/file"]).stdout
    assert "ran\n" == any_machine.run(["/opt/new/tree/run"]).stdout
    assert not Path("/opt/new").exists()


def test_a_link_inside_never_leads_outside(host_machine: PrivateSystemd, tmp_path: Path) -> None:
    """An absolute link in the root is followed inside, not on the machine itself."""
    host_machine.run(["mkdir", "-p", str(tmp_path)])
    host_machine.run(["ln", "-s", str(tmp_path), "/opt/link"])
    host_machine.write("/opt/link/file", "inside")

    assert "inside" == host_machine.run(["cat", f"{tmp_path}/file"]).stdout
    assert not (tmp_path / "file").exists()


def test_a_relative_destination_is_refused(host_machine: PrivateSystemd) -> None:
    """A path that is not absolute is named in the error."""
    with pytest.raises(PrivateSystemdError, match="'etc/x' is not an absolute path"):
        host_machine.write("etc/x", "")


def test_the_journal_of_a_unit(any_machine: PrivateSystemd) -> None:
    """`journal` shows what a service said."""
    any_machine.run(["systemd-run", "-q", "--wait", "--unit=talker", "echo", "said this"])
    any_machine.run(["journalctl", "--sync"])

    assert "said this" in any_machine.journal(unit="talker")


# Reboot


def test_soft_reboot() -> None:
    """A soft-reboot brings all services anew; files and mounts stay."""
    with PrivateSystemd.boot("trixie") as machine:
        machine.write("/etc/kept", "kept")
        before = set(machine.run(["findmnt", "-rno", "TARGET"]).stdout.split())
        machine.run(["systemd-run", "-q", "--unit=short", "sleep", "infinity"])
        machine.soft_reboot()
        count = machine.run(["systemctl", "show", "-P", "SoftRebootsCount"]).stdout
        after = set(machine.run(["findmnt", "-rno", "TARGET"]).stdout.split())

        assert "1\n" == count
        assert "running\n" == machine.run(["systemctl", "is-system-running"]).stdout
        assert 0 != machine.run(["systemctl", "is-active", "short"], check=False).returncode
        assert "kept" == machine.run(["cat", "/etc/kept"]).stdout
        assert not {path for path in before - after if not path.startswith("/run/")}


def test_no_soft_reboot_before_254(host_machine: PrivateSystemd) -> None:
    """An old systemd cannot; the error names its version."""
    if host_machine.systemd_version >= 254:
        pytest.skip("this machine's systemd can")
    with pytest.raises(PrivateSystemdError, match=f"systemd {host_machine.systemd_version} has no"):
        host_machine.soft_reboot()


# Nothing is left behind

# Boots two commands inside, says who is who, and waits.
HOLDER = """
import sys
from upgrader.lab.private_systemd import PrivateSystemd
machine = PrivateSystemd.boot("host")
inside = machine.popen(["sleep", "infinity"])
outside = machine.popen(["sleep", "infinity"], network_only=True)
machine.run(["systemd-run", "-q", "setsid", "sleep", "infinity"])
print(machine.keeper_pid, machine.pid, inside.pid, outside.pid, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def _holder() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that holds a machine; yields it with keeper, PID 1 and two commands' PIDs."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as holder:
        assert holder.stdout is not None
        try:
            yield holder, [int(pid) for pid in holder.stdout.readline().split()]
        finally:
            holder.kill()


def _all_end(pids: list[int]) -> bool:
    """Whether all processes `pids` end in time."""
    poll = select.poll()
    with contextlib.ExitStack() as opened:
        waiting = set()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(pid)
                opened.callback(os.close, fd)
                poll.register(fd, select.POLLIN)
                waiting.add(fd)
        while waiting:
            ended = poll.poll(SETTLE * 1000)
            if not ended:
                return False
            for fd, _ in ended:
                poll.unregister(fd)
                waiting.discard(fd)
    return True


def _cgroups_of(keeper: int) -> set[Path]:
    return {path for path in OWN.cgroups() if path.name.startswith(f"upgrader-{keeper}-")}


def test_close_leaves_nothing() -> None:
    """After `close` there is no process, no cgroup and no keeper."""
    with PrivateSystemd.boot("host") as machine:
        pids = [machine.keeper_pid, machine.pid]
        machine.popen(["sleep", "infinity"])

        assert 1 == len(_cgroups_of(machine.keeper_pid))
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert not _cgroups_of(pids[0])
    with pytest.raises(PrivateSystemdError, match="closed"):
        machine.run(["true"])
    machine.close()


def test_a_killed_caller_leaves_nothing() -> None:
    """SIGKILL of the process that booted a machine ends it, and removes its cgroup."""
    with _holder() as (holder, pids):
        assert 1 == len(_cgroups_of(pids[0]))
        holder.kill()
        assert _all_end(pids)
    assert not _cgroups_of(pids[0])


def test_a_killed_keeper_takes_its_machine_along() -> None:
    """SIGKILL of the keeper ends PID 1; its empty cgroup goes with the next boot."""
    with _holder() as (_, pids):
        os.kill(pids[0], signal.SIGKILL)
        assert _all_end(pids[:3])
        os.kill(pids[3], signal.SIGKILL)
        assert _all_end(pids)
    with PrivateSystemd.boot("host"):
        assert not _cgroups_of(pids[0])


def test_a_machine_that_was_powered_off_says_so() -> None:
    """After `systemctl poweroff` inside, commands fail with an error that tells it."""
    with PrivateSystemd.boot("host") as machine:
        machine.popen(["systemctl", "poweroff", "--force", "--force"])
        assert _all_end([machine.pid])
        with pytest.raises(BootError, match="has ended"):
            machine.run(["true"])


def test_a_command_between_the_end_and_its_notice() -> None:
    """It is told that the machine has ended, even if its keeper has not noticed that yet."""
    with PrivateSystemd.boot("host") as machine:
        os.kill(machine.keeper_pid, signal.SIGSTOP)
        try:
            os.kill(machine.pid, signal.SIGKILL)
            assert _all_end([machine.pid])
            late = threading.Timer(0.2, os.kill, (machine.keeper_pid, signal.SIGCONT))
            late.start()
            with pytest.raises(BootError, match="has ended"):
                machine.run(["true"])
            late.join()
        finally:
            os.kill(machine.keeper_pid, signal.SIGCONT)


def test_a_command_during_which_the_machine_ends() -> None:
    """It fails with the same error, not with an exit status that says nothing."""
    with PrivateSystemd.boot("host") as machine, pytest.raises(BootError, match="has ended"):
        machine.run(["sh", "-c", "systemctl poweroff --force --force; exec sleep infinity"])


# What cannot be booted


def test_an_unknown_tree_is_named() -> None:
    """The error names what was asked for, and what there is."""
    with pytest.raises(TreeError, match=r"'trixy'.*trixie"):
        PrivateSystemd.boot("trixy")


def test_a_tree_without_a_systemd_is_refused(tmp_path: Path) -> None:
    """The error names the file that is missing."""
    with pytest.raises(TreeError, match="usr/lib/systemd/systemd"):
        PrivateSystemd.boot(tmp_path)


@pytest.fixture
def broken_tree(tmp_path: Path) -> Path:
    """A root tree whose PID 1 complains and exits."""
    for path in ("usr/lib/systemd/system", "etc", "bin"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "usr/lib/systemd/system/dbus.socket").touch()
    init = tmp_path / "usr/lib/systemd/systemd"
    init.write_text("#!/bin/sh\necho the last words\nexit 1\n")
    init.chmod(0o755)
    shell = Path("/bin/sh").resolve()
    shutil.copy2(shell, tmp_path / "bin/sh")
    for library in re.findall(r"/\S+", subprocess.check_output(["ldd", shell], text=True)):
        place = tmp_path / library.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, place)
    return tmp_path


def test_a_boot_that_fails_shows_the_console(broken_tree: Path) -> None:
    """The error has the last words of PID 1, and nothing is left behind."""
    with pytest.raises(BootError, match="the last words"):
        PrivateSystemd.boot(broken_tree)


def test_a_boot_that_hangs_is_given_up(broken_tree: Path) -> None:
    """After its time the machine is thrown away, and the error says how long it had."""
    init = broken_tree / "usr/lib/systemd/systemd"
    init.write_text("#!/bin/sh\necho waiting for something\nread nothing\n")
    with pytest.raises(BootError, match=r"within 1 s[\s\S]*waiting for something"):
        PrivateSystemd.boot(broken_tree, timeout=1.0)
