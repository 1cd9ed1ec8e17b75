# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which machine an alias such as `q35` stands for, as a QEMU binary says: a machine that runs keeps its
type, whatever the alias means to the next QEMU."""

import re
import subprocess

from upgrader.errors import VerifyError

_PATIENCE = 30.0  # seconds
_ALIAS = re.compile(r"^(\S+)\s.*\(alias of ([^)]+)\)", re.MULTILINE)
_DEFAULT = re.compile(r"^(\S+)\s.*\(default\)", re.MULTILINE)


def versioned(binary: str, kind: str) -> str:
    """The versioned type for one that an admin has written, empty for QEMU's default.

    Raises VerifyError if the binary cannot be asked, or knows no such type.
    """
    try:
        told = subprocess.run(
            [binary, "-machine", "help"],
            capture_output=True, text=True, timeout=_PATIENCE, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise VerifyError(f"{binary} cannot be asked for its machine types: {error}") from error
    if not kind:
        found = _DEFAULT.search(told)
        if not found:
            raise VerifyError(f"{binary} has no default machine", remedy="write -machine TYPE")
        kind = found[1]
    kind = dict(_ALIAS.findall(told)).get(kind, kind)
    if not re.search(rf"^{re.escape(kind)}\s", told, re.MULTILINE):
        raise VerifyError(f"{binary} has no machine {kind}")
    return kind
