# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make what others have written safe to be shown to people.

Everything that this side prints goes through `plain`, whoever wrote it: a version, a status text, the
last line of a program may hold what controls a terminal, or what looks like a line of this tool.
"""

import json
import re

#: Characters of one line, and of one cell of a table.
LINE = 4000
CELL = 200

_UNSEEN = re.compile(r"[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str, longest: int = LINE) -> str:
    r"""One line of at most `longest` characters; what cannot be seen is written as in Python (`\x1b`).

    Backslashes stay as they are, as in the names of units (`dev-\x2d.service`).
    """
    cut = text if len(text) <= longest else text[: longest - 1] + "…"
    if cut.isprintable():
        return cut
    seen = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in cut
    )
    return seen if len(seen) <= longest else seen[: longest - 1] + "…"


def plain_json(text: str) -> str:
    """The same JSON, without characters that could control a terminal outside of ASCII."""
    return _UNSEEN.sub(lambda found: json.dumps(found[0])[1:-1], text)
