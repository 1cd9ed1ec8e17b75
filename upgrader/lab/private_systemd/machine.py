# SPDX-License-Identifier: LGPL-2.1-or-later
"""Boot a private systemd, run commands in it, and remove it."""

import contextlib
import io
import itertools
import os
import re
import select
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self, TypeVar

from upgrader.lab.private_systemd import linux, trees
from upgrader.lab.private_systemd.command import InsideCommand, Stream
from upgrader.lab.private_systemd.errors import BootError, CommandError, PrivateSystemdError
from upgrader.lab.private_systemd.keeper_process import KeeperProcess
from upgrader.lab.private_systemd.plan import (
    Failed,
    MachineReady,
    MachineStarted,
    Stopping,
)

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAMESPACES = ("-m", "-p", "-i", "-u", "-C", "-n")
#: A boot takes about a second; a machine that swaps may need many.
BOOT_TIMEOUT = 60.0
_CLOSE_TIMEOUT = 30.0

_E = TypeVar("_E", MachineStarted, MachineReady, Stopping)


class PrivateSystemd:
    """A real systemd that runs as PID 1 of its own namespaces; writes go to memory, not to its root.

    `boot` makes one; it needs root privileges. `close`, the end of the `with` block, and the end of
    the calling process, however it ends, leave no process, mount, cgroup or network interface behind.
    """

    def __init__(self, tree: trees.Tree, keeper: KeeperProcess) -> None:
        self.tree = tree
        #: Command prefix of a Python inside that can `import upgrader`.
        self.python = list(tree.python)
        self._keeper = keeper
        self._pid = 0
        self._pidfd = -1
        self._cgroup = Path()
        self._commands: list[tuple[InsideCommand, Path]] = []
        # Commands may be started from several threads.
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._version = 0

    @classmethod
    def boot(
        cls,
        tree: str | Path = "host",
        *,
        timeout: float = BOOT_TIMEOUT,
        progress: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Boot the systemd of `tree` and wait until its boot is complete.

        `tree` is "host" (the machine's own), the name of a Debian suite ("trixie", "sid": fetched
        once and cached; `progress` gets a line about it), or the path of a root tree. `timeout` is in
        seconds, without the time that fetching takes. Raises TreeError, BootError.
        """
        if os.geteuid() != 0:
            raise PrivateSystemdError(
                "a private systemd needs root", remedy="run the command as root or under sudo"
            )
        if (
            shutil.which("nsenter", path=_PATH) is None
            or shutil.which("setpriv", path=_PATH) is None
        ):
            raise PrivateSystemdError(
                "nsenter and setpriv are missing", remedy="install the package util-linux"
            )
        resolved = trees.resolve(tree, progress)
        machine = cls(resolved, KeeperProcess(resolved.plan(os.getpid())))
        try:
            machine._await_boot(time.monotonic() + timeout, timeout)
        except BaseException:
            machine._discard()
            raise
        return machine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._keeper.closed else "running"
        return f"<PrivateSystemd {self.tree.name} {state}, PID 1 is {self._pid} outside>"

    @property
    def pid(self) -> int:
        """Return the PID of the PID 1 inside, as seen from outside."""
        return self._pid

    @property
    def keeper_pid(self) -> int:
        """Return the PID of the process that cleans up after this machine."""
        return self._keeper.pid

    # Commands inside

    @property
    def systemd_version(self) -> int:
        """Return the major version of the systemd inside."""
        if not self._version:
            answer = self.run(["systemctl", "--version"]).stdout
            found = re.match(r"systemd (\d+)", answer)
            if found is None:
                raise PrivateSystemdError(
                    f"no version in what systemctl says: {answer[:80]!r}",
                    remedy="look at the tree's systemd package",
                )
            self._version = int(found[1])
        return self._version

    def popen(
        self,
        command: Sequence[str | Path],
        *,
        network_only: bool = False,
        env: Mapping[str, str] | None = None,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
    ) -> InsideCommand:
        """Start `command` inside, as root, with a clean environment to which `env` is added.

        With `network_only` the program runs outside, with the caller's environment and files, and
        sees only the network inside: for a load client, for example.
        """
        self._check_running()
        enter = ["nsenter", f"--net=/proc/{self._pid}/ns/net", "--"]
        environment = dict(os.environ)
        if not network_only:
            # setpriv: whoever ends this entering process ends the program too.
            enter = ["nsenter", "-t", str(self._pid), *_NAMESPACES, "--"]
            enter += ["setpriv", "--pdeathsig", "KILL", "--"]
            environment = {
                "PATH": _PATH,
                "HOME": "/root",
                "USER": "root",
                "LANG": "C.UTF-8",
                "TERM": os.environ.get("TERM", "dumb"),
            }
        with self._lock:
            self._forget_finished()
        cgroup = self._cgroup / "commands" / str(next(self._numbers))
        try:
            cgroup.mkdir()
        except OSError as error:
            # Most likely the keeper is clearing away what has just ended.
            self._raise_over(because=str(error))
        started = InsideCommand(
            [*enter, *map(str, command)],
            cgroup,
            environment={**environment, **(env or {})},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )
        with self._lock:
            self._commands.append((started, cgroup))
        return started

    def run(
        self,
        command: Sequence[str | Path],
        *,
        timeout: float = 60.0,
        check: bool = True,
        input: str | None = None,  # noqa: A002 (the name that subprocess.run uses)
        network_only: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run `command` inside and return what it wrote; see `popen` for the rest.

        After `timeout` seconds it is killed with everything that it started. Raises CommandError
        then, and with `check` also if its exit status is not 0; BootError if the machine has ended.
        """
        started = self.popen(
            command,
            network_only=network_only,
            env=env,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        words = [str(word) for word in command]
        with started:
            try:
                stdout, stderr = started.communicate(input, timeout)
            except subprocess.TimeoutExpired:
                started.kill()
                stdout, stderr = started.communicate()
                raise CommandError(words, None, stdout, stderr) from None
            except BaseException:
                started.kill()
                raise
        if check and started.returncode != 0:
            if self._has_ended():
                self._raise_over()
            raise CommandError(words, started.returncode, stdout, stderr)
        return subprocess.CompletedProcess(words, started.returncode, stdout, stderr)

    def call(self, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> int:
        """Run `command` inside on the caller's own terminal; return its exit status."""
        with self.popen(command, env=env) as started:
            try:
                return started.wait()
            except BaseException:
                started.kill()
                raise

    def journal(self, *, unit: str | None = None, lines: int = 100) -> str:
        """Return the last `lines` lines of the journal inside, of one unit or of all."""
        only = ["-u", unit] if unit else []
        return self.run(
            ["journalctl", "--no-pager", "-q", "-o", "short-precise", "-n", str(lines), *only]
        ).stdout

    # Files inside

    def write(self, path: str | Path, text: str, *, mode: int = 0o644) -> None:
        """Write `text` to the absolute `path` inside; make the directories that lead to it."""
        data = text.encode()
        member = tarfile.TarInfo(str(path).lstrip("/"))
        member.size, member.mode = len(data), mode
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as out:
            out.addfile(member, io.BytesIO(data))
        self._unpack(archive.getvalue(), str(path))

    def copy_in(self, source: str | Path, destination: str | Path) -> None:
        """Copy the file or directory `source` to the absolute path `destination` inside."""

        def of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.uid = member.gid = 0
            member.uname = member.gname = "root"
            return member

        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as out:
            out.add(source, str(destination).lstrip("/"), filter=of_root)
        self._unpack(archive.getvalue(), str(destination))

    def _unpack(self, archive: bytes, destination: str) -> None:
        if not destination.startswith("/"):
            raise PrivateSystemdError(
                f"{destination!r} is not an absolute path", remedy="name the full path inside"
            )
        # Unpacked by a program inside: a symbolic link inside must never lead to the machine's own files.
        with os.fdopen(os.memfd_create("copy-in"), "w+b") as content:
            content.write(archive)
            content.seek(0)
            command = ["tar", "-x", "-C", "/", "-f", "-"]
            with self.popen(
                command, stdin=content, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as started:
                stdout, stderr = started.communicate()
        if started.returncode != 0:
            raise CommandError(command, started.returncode, stdout, stderr)

    # Life of the machine

    def soft_reboot(self, *, timeout: float = BOOT_TIMEOUT) -> None:
        """Run `systemctl soft-reboot` (systemd 254 and later), and wait for the boot after it."""
        if self.systemd_version < 254:
            raise PrivateSystemdError(
                f"systemd {self.systemd_version} has no soft-reboot",
                remedy="it came with systemd 254",
            )
        self._keeper.drop_events()
        deadline = time.monotonic() + timeout
        with self.popen(["systemctl", "--no-block", "soft-reboot"]) as asked:
            try:
                self._await(Stopping, deadline, timeout)
                self._await_up(deadline, timeout)
            finally:
                # PID 1 stops all processes before it kills them, and whoever entered for one
                # stops with it.
                for command, _ in self._commands:
                    command.resume()
                asked.kill()

    def close(self) -> None:
        """Kill everything inside and wait until nothing is left; raises PrivateSystemdError if something is."""
        if self._keeper.closed:
            return
        try:
            self._keeper.end(_CLOSE_TIMEOUT)
        finally:
            if self._pidfd >= 0:
                os.close(self._pidfd)
        for command, _ in self._commands:
            command.wait()
        gone = self._keeper.gone
        if gone is not None and gone.leftover:
            raise PrivateSystemdError(
                f"left behind: {gone.leftover}", remedy="remove it by hand and report this"
            )

    def _discard(self) -> None:
        """Close because of an error; what closing itself raises is dropped."""
        with contextlib.suppress(PrivateSystemdError):
            self.close()

    def _check_running(self) -> None:
        if self._keeper.closed:
            raise PrivateSystemdError("this private systemd is closed", remedy="boot another")
        if self._has_ended():
            self._raise_over()

    def _has_ended(self) -> bool:
        """Return whether PID 1 is gone or about to be; asks the kernel, which knows before the keeper does."""
        if self._keeper.has_ended():
            return True
        if self._pidfd < 0:
            return False
        # Its namespace dies first: commands are killed, or cannot enter, while it is still there.
        exiting = linux.is_exiting(self._pid)
        return exiting or bool(select.select([self._pidfd], [], [], 0)[0])

    def _forget_finished(self) -> None:
        still: list[tuple[InsideCommand, Path]] = []
        for command, cgroup in self._commands:
            if command.poll() is not None:
                # Fails as long as something that the command started is alive.
                with contextlib.suppress(OSError):
                    cgroup.rmdir()
                    continue
            still.append((command, cgroup))
        self._commands = still

    def _await_boot(self, deadline: float, timeout: float) -> None:
        started = self._await(MachineStarted, deadline, timeout)
        self._pid = started.pid
        try:
            self._pidfd = os.pidfd_open(started.pid)
        except ProcessLookupError:
            self._raise_over()
        self._cgroup = Path(f"/proc/{self._keeper.pid}/root{started.cgroup}")
        self._await_up(deadline, timeout)

    def _await_up(self, deadline: float, timeout: float) -> None:
        self._await(MachineReady, deadline, timeout)
        # READY=1 may come before the last unit is up; starting the target again waits for it.
        try:
            self.run(["systemctl", "start", "default.target"], timeout=timeout)
        except CommandError as error:
            raise BootError(
                "the systemd inside is up, but without its D-Bus or journal",
                remedy=f"the tree {self.tree.root} needs the packages systemd and dbus",
                detail=error.stderr,
            ) from error

    def _await(self, wanted: type[_E], deadline: float, timeout: float) -> _E:
        """Wait until the keeper reports a `wanted`; raises BootError if it reports an end instead."""
        while (event := self._keeper.next_event(deadline)) is not None:
            if isinstance(event, wanted):
                return event
            if isinstance(event, Failed):
                raise BootError(
                    f"the private systemd cannot be set up: {event.message}",
                    remedy="it needs root with CAP_SYS_ADMIN, overlayfs, and namespaces",
                )
        if self._keeper.gone is not None or self._keeper.has_ended():
            self._raise_over()
        self._discard()
        raise BootError(
            f"the systemd of {self.tree.name} did not finish its boot within {timeout:g} s",
            remedy="a slow machine needs a longer timeout; else the console below says what it waits for",
            detail=self._keeper.gone.console if self._keeper.gone else "",
        )

    def _raise_over(self, because: str = "") -> NoReturn:
        self._keeper.drop_events(_CLOSE_TIMEOUT / 3)
        if because and self._keeper.gone is None and not self._has_ended():
            raise PrivateSystemdError(
                f"the private systemd of {self.tree.name} cannot be entered: {because}",
                remedy="it is still there; look at its journal, or boot another",
            )
        raise BootError(
            f"the private systemd of {self.tree.name} has ended",
            remedy="what it said last is below",
            detail=self._keeper.last_words,
        )
