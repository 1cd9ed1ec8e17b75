# SPDX-License-Identifier: LGPL-2.1-or-later
"""`/usr/lib/upgrader/hook`, for package managers and needrestart: upgrades units, and never fails.

The installation of a package does not fail because of a service: whatever happens is reported, the
exit code is 0, and the running instance goes on. Who may be upgraded, and how, say the admin's
policy, a hold, `policy-rc.d`, and the unit itself. `upgrade` does it.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from upgrader.errors import UpgradeError
from upgrader.hooks import policy
from upgrader.hooks.policy import Policy, Rule
from upgrader.hooks.queue import AskedBy, QueueTurn, Requests, TurnTaken
from upgrader.protocol.parameters import Mode
from upgrader.systemd.unit import Unit
from upgrader.tool import hold, overview
from upgrader.tool.deleted_program import show_deleted
from upgrader.tool.hold import Hold, HoldKind
from upgrader.tool.outcome import Outcome, Result
from upgrader.tool.plain_text import plain
from upgrader.tool.presence import NOTIFY, Presence, look, look_at_all
from upgrader.tool.start_failed import has_failed, start_again
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.unit_errors import NoSuchUnit, unit_name
from upgrader.tool.upgrade import Wish, settle, upgrade

#: Seconds in which a unit is upgraded once, and after them once more, however many ask for it. A
#: new version on disk does not wait: package managers ask once for a whole transaction.
WINDOW = 60.0
#: Seconds after which a package manager is kept waiting no longer; systemd goes on with the job.
TIMEOUT = 300.0

#: How the paths begin of what instances have loaded and packages of others replace: libraries,
#: whichever version of Python they are for, and programs below a runner whose packages restart nothing.
_LOADED = ("/usr/lib/python3", "/usr/lib64/python3", "/usr/bin/qemu-system-")
_LATER = "upgrader-hook"
_STATE = ("systemctl", "show", "-P", "SubState")
_POLICY_RC_D = "/usr/sbin/policy-rc.d"
_FORBIDDEN = 101  # policy-rc.d(8)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Told:
    """What became of one unit: whether it was upgraded, whether it went wrong, and the line said."""

    done: bool
    bad: bool
    line: str


@dataclass(frozen=True, slots=True)
class Desk:
    """Where one run of the hook works: its voice, the requests, and the admin's rules."""

    say: Say
    requests: Requests
    rules: Sequence[Rule]

    def expand(self, systemd: Systemd, name: str) -> list[str]:
        """The units that a request for `name` is about, each with a request of its own; raises
        TurnTaken."""
        units = list(_named(systemd, [name], self.say))
        if units != [name]:
            with self.requests.turn(name) as turn:
                origins = turn.origins
                turn.claim()
                for unit in units:
                    for origin in origins:
                        self.requests.file(unit, origin)
                turn.drop()
        return units

    def serve(self, unit: str) -> bool:
        """Deal with all that is asked for `unit`, or find that somebody else has.

        False if it went wrong: the same would happen to its sisters. Raises TurnTaken.
        """
        with self.requests.turn(unit) as turn:
            origins = turn.origins
            if not origins:
                said = turn.last.line if turn.last else unit
                self.say(f"already dealt with on another request: {said}")
                return True
            if (wait := _too_soon(turn)) and AskedBy.INSTALLED not in origins:
                self.later(unit, wait, f"upgraded less than {WINDOW:g}s ago")
                return True
            turn.claim()
            told = self._upgrade(unit, installed=AskedBy.INSTALLED in origins)
            turn.served(told.done, told.line)
            return not told.bad

    def pass_over(self, unit: str, failed: str) -> None:
        """Leave a unit alone because an instance of the same template has failed."""
        with self.requests.turn(unit) as turn:
            turn.claim()
            turn.served(False, self._tell(f"{unit}: left alone, because {failed} failed").line)

    @contextlib.contextmanager
    def failure_of(self, unit: str) -> Iterator[None]:
        """Whatever goes wrong with one unit is said, and keeps nobody from the others."""
        try:
            yield
        except TurnTaken as error:
            self.later(unit, WINDOW, f"not upgraded now: {error}")
        except UpgradeError as error:
            self.say(f"warning: {unit}: not upgraded: {error}")
        except Exception as error:
            self.say(f"warning: {unit}: unexpected {type(error).__name__}: {error}")

    def _tell(self, line: str, *more: str, done: bool = False, bad: bool = False) -> Told:
        self.say(f"warning: {line}" if bad else line)
        for each in more:
            self.say(f"  {each}")
        return Told(done, bad, line)

    def _upgrade(self, name: str, installed: bool) -> Told:
        rule = policy.decide(name, self.rules)
        if rule.complaint:
            why = f"{name}: left alone, for its policy is not understood"
            return self._tell(why, rule.complaint, bad=True)
        if rule.policy is Policy.NEVER:
            return self._tell(f"{name}: left alone by the policy of this machine")
        with Systemd() as systemd:
            unit = systemd.unit(name)
            if held := _held(systemd, unit, installed):
                whose = "" if held.unit == unit.id else f"because {held.unit} is "
                remedy = _REMEDIES[held.kind].format(unit=held.unit)
                return self._tell(f"{name}: left alone, {whose}{held}", remedy)
            if _forbidden(name):
                return self._tell(f"{name}: left alone, {_POLICY_RC_D} forbids a restart")
            if unit.need_daemon_reload:
                systemd.daemon_reload(unit.id)
                unit = systemd.unit(name)
            if installed and has_failed(unit):
                # What PID 1 holds is for the next good version, which may be this.
                outcome = start_again(systemd, unit, TIMEOUT, lambda text: None)
                return self._report(settle(systemd, outcome))
            if unit.load_state == "masked" or not unit.serves:
                # Not running, it starts with the new version; nobody wants it started from here.
                return self._tell(f"{name}: nothing to upgrade, it is {_word(unit)}")
            if reason := _is_plain(unit, look(systemd, unit)):
                return self._try_restart(systemd, unit, rule.policy, reason)
        return self._run(name, rule.policy)

    def _try_restart(self, systemd: Systemd, unit: Unit, chosen: Policy, reason: str) -> Told:
        """For the first upgrade to a version that uses the library, and for the way back."""
        if chosen is Policy.LIVE:
            return self._tell(f"{unit.id}: left alone, for its policy is live, and {reason}")
        word = systemd.wait_job(unit, systemd.try_restart(unit), TIMEOUT)
        now = systemd.unit(unit.id)
        if word == "done" and now.serves:
            hold.lift(unit.id)
            line = f"{unit.id}: restarted without keeping anything: {reason}"
            return self._tell(line, done=True)
        return self._not_serving(now, f"after a plain restart ({word})")

    def _not_serving(self, unit: Unit, why: str) -> Told:
        line = f"{unit.id}: NOT SERVING, {why}, it is {_word(unit)}"
        return self._tell(line, f"see: systemctl status {unit.id}", bad=True)

    def _run(self, name: str, chosen: Policy) -> Told:
        wish = Wish(_MODES[chosen], timeout=TIMEOUT)
        outcome = upgrade(name, wish)
        if outcome.result is Result.BUSY:
            # What is under way may have begun before these files were there.
            upgrade(name, replace(wish, wait=True))
            outcome = upgrade(name, wish)
        return self._report(outcome)

    def _report(self, outcome: Outcome) -> Told:
        done = outcome.result is Result.DONE
        for line in outcome.warnings:
            self.say(f"warning: {outcome.unit}: {line}")
        remedy = [] if done else [*outcome.remedy.splitlines(), *_goes_on(outcome)]
        return self._tell(outcome.line, *remedy, done=done, bad=not done)

    def later(self, unit: str, wait: float, why: str) -> None:
        """Have it done in `wait` seconds; who asks until then is served by the same timer."""
        run = ["systemd-run", "--quiet", "--collect", f"--on-active={wait:.3f}"]
        run += ["--timer-property=AccuracySec=100ms"]
        hook = [sys.executable, "-P", "-m", "upgrader.hooks.package_hook", "--pending"]
        done = _ask(*run, f"--unit={_LATER}", *hook)
        if done.returncode and _ask(*_STATE, f"{_LATER}.timer").stdout.strip() != "waiting":
            # It goes off right now, and may have looked at the requests before this one was there.
            done = _ask(*run, *hook)
            if done.returncode:
                self.say(f"warning: {unit}: not upgraded: no timer for it: {done.stderr.strip()}")
                return
        self.say(f"{unit}: {why}; once more in {wait:.0f}s, for all")


def _held(systemd: Systemd, unit: Unit, installed: bool) -> Hold | None:
    """The hold that keeps a unit from being upgraded: its own, or of another instance of its template,
    which is of the same version on disk. One that a failure has left is no match for a new version."""
    if installed:
        return hold.by_admin(unit.id)
    names = [unit.id]
    template, at, _ = unit.id.partition("@")
    if at:
        sisters = (*hold.on_file(), *systemd.running(f"{template}@*.service", failed=True))
        names += sorted({name for name in sisters if name.startswith(f"{template}@")} - {unit.id})
    units = []
    for name in names:
        with contextlib.suppress(NoSuchUnit):
            units.append(unit if name == unit.id else systemd.unit(name))
    for each, (found, _) in zip(units, look_at_all(systemd, units), strict=True):
        held = hold.standing(each, found.said)
        if held and (each is unit or held.kind is HoldKind.FAILED):
            return held
    return None


_REMEDIES = {
    HoldKind.FAILED: "once a good version is in place: upgrader upgrade {unit}",
    HoldKind.ADMIN: "when that is over: upgrader unhold {unit}",
}


def _goes_on(outcome: Outcome) -> Iterator[str]:
    """In what the program of a unit goes on whose upgrade has failed, if that is gone."""
    with contextlib.suppress(UpgradeError), Systemd() as systemd:
        said = look(systemd, systemd.unit(outcome.unit)).said
        if said and (line := show_deleted(outcome.unit, said, HoldKind.FAILED)):
            yield line


_MODES = {Policy.AUTO: None, Policy.LIVE: Mode.LIVE, Policy.RESTART: Mode.RESTART}


def _is_plain(unit: Unit, found: Presence) -> str:
    """Why nothing can be kept over an upgrade: the old version or the new one knows nothing of it."""
    if not found.ours:
        return "its running instance does not use upgrader"
    if unit.type not in NOTIFY:
        return f"its unit file says Type={unit.type} now"
    if not unit.fd_store_max:
        return "its unit file has no FileDescriptorStoreMax= now"
    return ""


def _too_soon(turn: QueueTurn) -> float:
    """Seconds until the window is over; 0 if there is none, or the last attempt failed."""
    last = turn.last
    if last is None or not last.done:
        return 0.0
    return max(0.0, last.ended + WINDOW - time.monotonic())


def _ask(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def _word(unit: Unit) -> str:
    return unit.load_state if unit.load_state != "loaded" else unit.active_state


def _forbidden(unit: str) -> bool:
    """What Debian's policy-rc.d says to a restart of this unit; only 101 means no."""
    with contextlib.suppress(OSError):
        asked = subprocess.run(
            [_POLICY_RC_D, unit, "restart"], stdin=subprocess.DEVNULL, check=False
        )
        return asked.returncode == _FORBIDDEN
    return False


def no_systemd() -> str:
    """Why there is no systemd here whose units could be upgraded; "" if there is one."""
    if os.environ.get("DPKG_ROOT"):
        return "the packages are installed into another root"
    if not os.path.isdir("/run/systemd/system"):
        return "systemd does not run here"
    with contextlib.suppress(OSError):
        if not os.path.samefile("/proc/1/root", "/"):
            return "this is a chroot"
    return ""


def _named(systemd: Systemd, names: Iterable[str], say: Say) -> Iterator[str]:
    """Full names of units; a template stands for its instances, one after the other."""
    for name in names:
        try:
            full = unit_name(name)
            if full.partition("@")[2].startswith("."):
                yield from systemd.running(full.replace("@.", "@*."), failed=True)
            else:
                yield systemd.unit(full).id
        except NoSuchUnit:
            say(f"{name}: nothing to upgrade, there is no such unit")
        except UpgradeError as error:
            say(f"warning: {name}: not upgraded: {error}")


def _services(paths: Iterable[str]) -> list[str]:
    """The service units among the files of packages, one path a line, as pacman lists them."""
    found = (PurePath(path.strip()) for path in paths)
    return sorted({path.name for path in found if path.suffix == ".service"})


def _uses_library(systemd: Systemd, name: str) -> bool:
    unit = systemd.unit(name)
    return unit.serves and look(systemd, unit).ours


def _use_replaced(systemd: Systemd, say: Say) -> Iterator[str]:
    """The running units that have loaded a library or a program which is another one on disk now."""
    for each in overview.read_all(systemd):
        changed = each.instance.changed if each.instance else []
        if replaced := [path for path in changed if path.startswith(_LOADED)]:
            more = f" and {len(replaced) - 1} more" if replaced[1:] else ""
            say(f"{each.unit}: has loaded what was replaced: {replaced[0]}{more}")
            yield each.unit


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="upgrader-hook", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--pending", action="store_true", help="upgrade all units that were filed until now"
    )
    which.add_argument(
        "--files",
        action="store_true",
        help="standard input lists files of packages: upgrade the units among them that use upgrader",
    )
    which.add_argument(
        "--installed", action="store_true", help="a new version of these units is on disk"
    )
    parser.add_argument(
        "--libraries",
        action="store_true",
        help="libraries were replaced: upgrade the running units that have loaded them as well",
    )
    parser.add_argument("units", nargs="*", metavar="UNIT")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace, say: Say) -> None:
    """Upgrade what the arguments name."""
    if reason := no_systemd():
        say(f"nothing to upgrade: {reason}")
        return
    desk = Desk(say, Requests(patience=TIMEOUT), policy.read())
    names = list(arguments.units)
    with Systemd() as systemd:
        if arguments.files:
            listed = [*_named(systemd, _services(sys.stdin), lambda text: None)]
            names += [name for name in listed if _uses_library(systemd, name)]
        origin = AskedBy.INSTALLED if arguments.installed or arguments.files else AskedBy.STALE
        units = dict.fromkeys(_named(systemd, names, say))
        for unit in units:
            desk.requests.file(unit, origin)
        if arguments.pending:
            for name in desk.requests.units():
                with desk.failure_of(name):
                    units |= dict.fromkeys(desk.expand(systemd, name))
        if arguments.libraries:
            for unit in _use_replaced(systemd, say):
                desk.requests.file(unit, AskedBy.STALE)
                units[unit] = None
    failed: dict[str, str] = {}
    for unit in units:
        template, _, instance = unit.partition("@")
        with desk.failure_of(unit):
            if template in failed:
                desk.pass_over(unit, failed[template])
            elif not desk.serve(unit) and instance:
                failed[template] = unit


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, whatever became of the services; 2 for wrong usage."""

    def say(text: str) -> None:
        with contextlib.suppress(OSError):
            print(plain(f"upgrader: {text}"), file=sys.stderr, flush=True)

    parsed = _arguments(arguments)
    try:
        run(parsed, say)
    except (UpgradeError, OSError) as error:
        say(f"warning: nothing was upgraded: {error}")
    except Exception as error:
        say(f"warning: unexpected {type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
