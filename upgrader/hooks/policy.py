# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read the admin's word on what package hooks may do to which unit.

Files `*.conf` in `/etc/upgrader/policy.d`, and of packages in `/usr/lib/upgrader/policy.d`, where a
file of the same name in `/etc` replaces one of a package. A line is `PATTERN = WORD`, as in
`web@*.service = live`; of several that match, the last one counts, in the order of file names.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path

DIRECTORIES = (Path("/usr/lib/upgrader/policy.d"), Path("/etc/upgrader/policy.d"))


class Policy(StrEnum):
    """What a hook may do to a unit."""

    AUTO = "auto"  #: live where the unit can, else by a restart; where nothing is said
    LIVE = "live"  #: live, or not at all
    RESTART = "restart"  #: by a restart, even where it could be done live
    NEVER = "never"  #: nothing; an admin does it by hand


@dataclass(frozen=True, slots=True)
class Rule:
    """One line: `policy` for the units that match `pattern`; `complaint` says what is wrong with it."""

    pattern: str
    policy: Policy
    complaint: str = ""


def read(directories: Sequence[Path] = DIRECTORIES) -> tuple[Rule, ...]:
    """All rules there are, the one that counts most last.

    What cannot be understood was meant to say something special: the units it may be about are
    left alone, and the rule says why.
    """
    files: dict[str, Path] = {}
    for directory in directories:
        try:
            files |= {path.name: path for path in directory.glob("*.conf")}
        except OSError as error:
            return (Rule("*", Policy.NEVER, f"{directory} cannot be read: {error}"),)
    return tuple(rule for name in sorted(files) for rule in _rules(files[name]))


def decide(unit: str, rules: Iterable[Rule]) -> Rule:
    """The rule for one unit; AUTO where none matches."""
    found = Rule("*", Policy.AUTO)
    for rule in rules:
        if fnmatchcase(unit, rule.pattern):
            found = rule
    return found


def _rules(path: Path) -> Iterable[Rule]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        yield Rule("*", Policy.NEVER, f"{path} cannot be read: {error}")
        return
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text[0] in "#;":
            continue
        left, _, word = (part.strip() for part in text.partition("="))
        pattern = left.split()[0] if left else "*"
        if left == pattern and word in list(Policy):
            yield Rule(pattern, Policy(word))
            continue
        unknown = word and word not in list(Policy)
        said = f"{word!r} is none of {', '.join(Policy)}" if unknown else "not PATTERN = WORD"
        yield Rule(pattern, Policy.NEVER, f"{path}:{number}: {said}")
