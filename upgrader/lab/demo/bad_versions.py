# SPDX-License-Identifier: LGPL-2.1-or-later
"""Make bad versions of the example service: each is version 1 with one mistake."""

from enum import StrEnum


class Bad(StrEnum):
    """The mistake of a version; the value is the name under which it is installed."""

    EXITS = "exits"
    HANGS = "hangs"
    UNREADABLE = "unreadable"
    CLAIMS_LESS = "claims-less"
    REFUSES = "refuses"
    FEW_FDS = "few-fds"
    CRASHES = "crashes"
    #: Nothing is, but between loading and taking over it takes its time.
    SLOW = "slow"


#: Seconds that SLOW takes: long enough to be interfered with, shorter than `downtime-limit`.
SLOWNESS = 0.15
#: A file in its RuntimeDirectory= with which SLOW says that it has loaded everything.
LOADED = "has-loaded"
#: Seconds after which CRASHES crashes.
LIFE = 0.3

_BIND = "BIND = "
_SERVE = "        await instance.serve("
_CHANGES = {
    Bad.EXITS: (_BIND, "raise SystemExit('this version has no licence')\nBIND = "),
    Bad.HANGS: (_BIND, "__import__('time').sleep(3600)\nBIND = "),
    Bad.UNREADABLE: (
        'knows."""\n\n    requests: int = 0',
        'knows."""\n\n    requests: list[str] = upgrader.since(1, default_factory=list)',
    ),
    Bad.CLAIMS_LESS: ('instance.listener("http"', 'instance.listener("web"'),
    Bad.REFUSES: (
        _SERVE,
        """\
        @instance.verify
        def check(counters: Counters) -> None:
            raise ValueError("this version does not like what it got")

        await instance.serve(""",
    ),
    Bad.FEW_FDS: (
        _BIND,
        "__import__('resource').setrlimit(__import__('resource').RLIMIT_NOFILE, (20, 20))\nBIND = ",
    ),
    Bad.CRASHES: (
        f"{_SERVE})",
        f"""\
        async def crash(counters: Counters) -> None:
            await asyncio.sleep({LIFE})
            if not os.path.exists(MARK):  # once
                open(MARK, "w").close()
                os._exit(1)

        MARK = os.environ["RUNTIME_DIRECTORY"] + "/has-crashed"
        await instance.serve([crash])""",
    ),
    Bad.SLOW: (
        _SERVE,
        f"""\
        @instance.verify
        async def check(counters: Counters) -> None:
            with open(os.environ["RUNTIME_DIRECTORY"] + "/{LOADED}", "w"):
                await asyncio.sleep({SLOWNESS})

        await instance.serve(""",
    ),
}


def make(bad: Bad, good: str) -> str:
    """Return the text of that version, made from `text`; raises ValueError if that is not version 1."""
    old, new = _CHANGES[bad]
    if good.count(old) != 1:
        raise ValueError(f"the example service has not exactly one {old!r}")
    return good.replace(old, new)
