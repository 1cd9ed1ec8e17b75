# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ansible connection: into the namespaces of a private systemd, as root; for tests."""

from __future__ import annotations

import os
import shutil
import subprocess

from ansible.plugins.connection import ConnectionBase

DOCUMENTATION = """
name: nsenter
short_description: enter the namespaces of a process
description: Runs commands in the namespaces of the init process of a private systemd.
author: the upgrader authors
options:
  pid:
    description: That process.
    type: int
    vars:
      - name: ansible_nsenter_pid
"""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Connection(ConnectionBase):  # type: ignore[misc]
    """One machine."""

    transport = "nsenter"
    has_pipelining = True

    def _connect(self) -> Connection:
        self._connected = True
        return self

    def exec_command(
        self, cmd: str, in_data: bytes | None = None, sudoable: bool = True
    ) -> tuple[int, bytes, bytes]:
        """Run a command inside; returns its exit code and what it printed."""
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        namespaces = ["-m", "-p", "-i", "-u", "-C", "-n"]
        enter = ["nsenter", "-t", str(self.get_option("pid")), *namespaces, "--"]
        enter += ["setpriv", "--pdeathsig", "KILL", "--", "/bin/sh", "-c", cmd]
        environment = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8"}
        done = subprocess.run(
            enter, input=in_data or b"", capture_output=True, env=environment, check=False
        )
        return done.returncode, done.stdout, done.stderr

    def put_file(self, in_path: str, out_path: str) -> None:
        """Copy a file into the machine."""
        shutil.copyfile(in_path, self._inside(out_path))

    def fetch_file(self, in_path: str, out_path: str) -> None:
        """Copy a file out of the machine."""
        shutil.copyfile(self._inside(in_path), out_path)

    def close(self) -> None:
        """Forget it."""
        self._connected = False

    def _inside(self, path: str) -> str:
        return f"/proc/{self.get_option('pid')}/root{os.path.abspath(path)}"
