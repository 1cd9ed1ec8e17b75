# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all tests share: machines to run in, and fixtures that fail a test which leaves something behind."""

import contextlib
import ctypes
import gc
import os
import signal
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.isolation import OWN
from tests.support import cannot_run, descendants, eventually, is_abandoned
from upgrader.lab.private_systemd import PrivateSystemd, PrivateSystemdError, TreeError

_PR_SET_CHILD_SUBREAPER = 36


# Sessions


def pytest_configure(config: pytest.Config) -> None:
    """Become the one that orphans are given to, so that a doubly forked process is seen too, in a
    mount namespace and a cgroup of its own: each worker is, so they see nothing of each other.

    Signals that whoever runs the tests has ignored (a shell in the background, nohup) are not
    ignored by what the tests start.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)  # execve(2) makes it the default
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise pytest.UsageError("prctl(PR_SET_CHILD_SUBREAPER) failed")
    OWN.begin()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Leave nothing behind but what a test has."""
    OWN.end()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whatever lies in tests/system is a system test; long matrices run only if they are asked for."""
    for item in items:
        if item.path.parent.name == "system":
            item.add_marker(pytest.mark.system)
    if "matrix" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("matrix")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """System tests need root."""
    if item.get_closest_marker("system") is not None and os.geteuid() != 0:
        cannot_run("needs root: it boots a private systemd")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """The summary is the last line: what a failed test still holds is no news after it."""
    warnings.simplefilter("ignore", pytest.PytestUnraisableExceptionWarning)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Attach the journal of every machine that a failed test used."""
    report = yield
    if report.failed and call.when in ("setup", "call"):
        used = getattr(item, "funcargs", {}).values()
        for machine in {id(value): value for value in used}.values():
            if isinstance(machine, PrivateSystemd):
                with contextlib.suppress(PrivateSystemdError):
                    report.sections.append(
                        (f"journal of {machine.tree.name}", machine.journal(lines=150))
                    )
    return report


# Machines

Boot = Callable[[str], PrivateSystemd]


@pytest.fixture(scope="session")
def boot_once() -> Iterator[Boot]:
    """Boots a machine of a tree, or gives the one booted before: they are shared by a whole run."""
    with contextlib.ExitStack() as machines:
        booted: dict[str, PrivateSystemd] = {}

        def boot(tree: str) -> PrivateSystemd:
            if tree not in booted:
                try:
                    booted[tree] = machines.enter_context(PrivateSystemd.boot(tree))
                except TreeError as error:
                    if tree == "sid":
                        # A moving target: its archive may be broken on any day.
                        pytest.skip(str(error))
                    cannot_run(str(error))
            return booted[tree]

        yield boot


@pytest.fixture(scope="session")
def host_machine(boot_once: Boot) -> PrivateSystemd:
    """A machine with the systemd of the machine itself."""
    return boot_once("host")


@pytest.fixture(scope="session")
def trixie_machine(boot_once: Boot) -> PrivateSystemd:
    """A machine with systemd 257."""
    return boot_once("trixie")


@pytest.fixture(scope="session")
def sid_machine(boot_once: Boot) -> PrivateSystemd:
    """A machine with the newest systemd; skipped where it cannot be had."""
    return boot_once("sid")


@pytest.fixture(scope="session", params=["host", "trixie"])
def any_machine(request: pytest.FixtureRequest, boot_once: Boot) -> PrivateSystemd:
    """The test runs on the systemd of the machine itself, and on 257."""
    return boot_once(request.param)


@pytest.fixture
def fresh_machine(any_machine: PrivateSystemd) -> Iterator[PrivateSystemd]:
    """Like `any_machine`, but nobody has used it, and it is thrown away after the test."""
    with PrivateSystemd.boot(any_machine.tree.name) as machine:
        yield machine


# Leaks: every fixture compares what there is after a test with what there was before


def _open_fds() -> Counter[tuple[int, int, str]]:
    """What is open, by identity: a number says nothing, it is given again at once."""
    found: Counter[tuple[int, int, str]] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            there = os.stat(f"/proc/self/fd/{name}")
            what = os.readlink(f"/proc/self/fd/{name}")
            # The inode of what is listed right now: the directory itself.
            if not (stat.S_ISDIR(there.st_mode) and what.startswith("/proc/")):
                found[(there.st_dev, there.st_ino, what)] += 1
    return found


@pytest.fixture(autouse=True)
def no_leaked_fds() -> Iterator[None]:
    """A test closes what it opens."""
    before, threads = _open_fds(), set(threading.enumerate())
    yield
    if _open_fds() - before:
        for thread in set(threading.enumerate()) - threads:
            thread.join(1)  # one that is about to end holds what it had
        gc.collect()
    leaked = _open_fds() - before

    assert not leaked, f"left open: {sorted(what for _, _, what in leaked.elements())}"


@pytest.fixture(autouse=True)
def no_leaked_processes() -> Iterator[None]:
    """A test ends what it starts."""
    before = descendants()
    yield
    left: dict[int, str] = {}

    def settled() -> bool:
        left.clear()
        left.update({pid: line for pid, line in descendants().items() if pid not in before})
        return not left

    # What is about to end gets the time to; nobody but its starter could wait for it.
    if not eventually(settled, 2.0):
        pytest.fail(f"left running: {left}", pytrace=False)


@pytest.fixture(autouse=True)
def no_leaked_mounts() -> Iterator[None]:
    """A test leaves no mount and no cgroup."""
    mounts, cgroups = OWN.mounts(), OWN.cgroups()
    yield
    mounted = [what for number, what in OWN.mounts().items() if number not in mounts]
    # A machine may live on: its keeper removes the cgroup.
    left = sorted(path.name for path in OWN.cgroups() - cgroups if is_abandoned(path))

    assert not mounted, f"left mounted: {mounted}"
    assert not left, f"left in the cgroup tree: {left}"
