# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fetch root trees of Debian suites by mmdebstrap, once, and cache them."""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from upgrader.lab.private_systemd.errors import TreeError

#: Debian suites that are new enough (systemd 257, python3-msgspec).
SUITES = ("trixie", "forky", "sid")

#: What upgrader needs, and some programs for a person who looks around.
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "python3",
    "python3-msgspec",
    "python3-click",
    "python3-pystemd",
    "curl",
    "iproute2",
    "procps",
)
_OPTIONS = (
    "--mode=root",
    "--variant=apt",
    # A quarter of the size, and nobody reads them there.
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    # A mirror's copy of sid may be older than the week its index claims to be good for.
    '--aptopt=Acquire::Check-Valid-Until "false"',
)


def cache_directory() -> Path:
    """Return where trees are kept: `upgrader/trees` below $XDG_CACHE_HOME, or below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "upgrader" / "trees"


def cached_path(suite: str, packages: Sequence[str] = PACKAGES) -> Path:
    """Return the place of the tree of `suite`, even if it does not exist yet; each recipe has its own."""
    recipe = hashlib.sha256("\n".join((suite, *_recipe(packages))).encode()).hexdigest()
    return cache_directory() / f"{suite}-{recipe[:12]}"


def _recipe(packages: Sequence[str]) -> tuple[str, ...]:
    return (*_OPTIONS, f"--include={','.join(packages)}")


def fetch(suite: str, progress: Callable[[str], None], packages: Sequence[str] = PACKAGES) -> Path:
    """Return the root tree of `suite` with these packages; make it if it is not in the cache.

    If several processes ask at the same time, one fetches and the others wait. Raises TreeError.
    """
    place = cached_path(suite, packages)
    if place.exists():
        return place
    if shutil.which("mmdebstrap") is None:
        raise TreeError(
            f"the root tree of {suite} is made by mmdebstrap, which is missing here",
            remedy="on Debian: apt-get install mmdebstrap; else give the path of a root tree",
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.with_name(f"{place.name}.lock")):
            if not place.exists():
                progress(
                    f"fetching a root tree of Debian {suite} into {place} (some hundred MB, once)"
                )
                _make(suite, place, packages)
    except OSError as error:
        raise TreeError(
            f"the root tree of {suite} cannot be kept in {place.parent}: {error}",
            remedy="set XDG_CACHE_HOME to a directory with 300 MB free",
        ) from error
    return place


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, for which every other process of this machine waits; raises OSError."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(suite: str, place: Path, packages: Sequence[str]) -> None:
    """Make the tree beside `place`, and move it there once it is complete. The caller holds the lock."""
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as configuration:
        configuration.write(_machine_configuration())
        configuration.flush()
        made = subprocess.run(
            [
                # It ends with this process: an orphan would go on writing into the cache. In its own
                # mount namespace, because then no mount of its tree stays, whatever ends it.
                *("setpriv", "--pdeathsig", "TERM", "--"),
                *("unshare", "--mount", "--propagation", "private", "--"),
                *("mmdebstrap", *_recipe(packages), f"--aptopt={configuration.name}"),
                *(suite, str(partial), *_mirror()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    if made.returncode != 0:
        shutil.rmtree(partial, ignore_errors=True)
        raise TreeError(
            f"mmdebstrap could not make a root tree of {suite}",
            remedy="it needs a Debian mirror that has the suite, and its archive keys",
            detail=made.stdout,
        )
    partial.rename(place)


def _ask(*command: str) -> str:
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return ""


def _machine_configuration() -> str:
    """Return how this machine's apt reaches its mirrors (proxies, retries), because mmdebstrap ignores it."""
    wanted = re.compile(r"Acquire::(http|https|Retries|Check-Valid-Until|Check-Date)\b", re.I)
    lines = [line for line in _ask("apt-config", "dump").splitlines() if wanted.match(line)]
    # A line with an empty value is the section itself, and would undo the lines in it.
    return "".join(f"{line}\n" for line in lines if not line.endswith('"";'))


def _mirror() -> tuple[str, ...]:
    """Return the mirror that this machine's apt uses for Debian, as an argument; nothing if it uses none."""
    listed = _ask("apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)")
    for line in listed.splitlines():
        origin, _, rest = line.partition(" ")
        label, _, address = rest.partition(" ")
        if origin == label == "Debian" and "://" in address:
            return (address,)
    return ()
