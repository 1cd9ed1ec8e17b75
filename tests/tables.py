# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write the table of a matrix into docs/matrices.md; measures nothing."""

import fcntl
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "matrices.md"


def publish(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Replace the table `name` of the page: what is between its `<!-- name -->` and the next `<!-- -->`,
    with the date and the commit that it is of.

    Raises ValueError if the page has no such place.
    """
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)
    described = ["git", "-C", str(PAGE.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.check_output(described, text=True).strip()
    table += f"\n\n{time.strftime('%Y-%m-%d')}, commit {commit}."
    with PAGE.open("r+") as page:
        fcntl.flock(page, fcntl.LOCK_EX)  # matrices run at the same time
        place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- -->)", re.DOTALL)
        text, found = place.subn(lambda match: f"{match[1]}{table}\n{match[2]}", page.read())
        if found != 1:
            raise ValueError(f"{PAGE.name} has no place for the table {name!r}")
        page.seek(0)
        page.truncate()
        page.write(text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
