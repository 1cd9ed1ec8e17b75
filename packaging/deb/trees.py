# SPDX-License-Identifier: LGPL-2.1-or-later
"""Root trees that packages are built and tried in: one a suite, kept in the cache; builds nothing."""

from collections.abc import Callable
from pathlib import Path

from upgrader.lab.private_systemd import suites

#: Debian 12 and 13, by the end of the version that a package built there gets.
SUITES = {"bookworm": "~deb12u1", "trixie": ""}

_BUILD = (
    *("systemd", "systemd-sysv", "dbus", "python3", "python3-click", "python3-pystemd"),
    *("build-essential", "debhelper", "dh-python", "lintian", "man-db"),
    *("pybuild-plugin-pyproject", "python3-all", "python3-hatchling"),
)
_ONLY = {
    # What the backport of python3-msgspec is built with, and who restarts services.
    "bookworm": ("python3-all-dev", "python3-setuptools", "needrestart"),
    # What the packages are tried with: other ways to upgrade than apt, and who restarts services.
    "trixie": (
        *("python3-msgspec", "apt-utils", "needrestart", "polkitd", "unattended-upgrades"),
        *("rpm", "pacman-package-manager", "makepkg"),
    ),
}


def fetch(suite: str, progress: Callable[[str], None]) -> Path:
    """The tree of a suite, made now if need be; raises TreeError."""
    return suites.fetch(suite, progress, (*_BUILD, *_ONLY[suite]))
