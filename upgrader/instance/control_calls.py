# SPDX-License-Identifier: LGPL-2.1-or-later
"""The calls that an instance answers: check their parameters, and have each answered."""

import re
import socket
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec

from upgrader.codes import Code
from upgrader.instance.control_listener import Caller
from upgrader.instance.phases import News
from upgrader.protocol import varlink, varlink_interface
from upgrader.protocol.varlink import INTERFACE, SERVICE, VarlinkError
from upgrader.protocol.varlink_messages import Call

_ID = re.compile(r"[0-9a-f]{32}")
#: Calls that wait for the service, or for PID 1.
_WAITING = ["Reload", "Cancel", "Withdraw", "Settle", "Execute", "TryStates", "Register", "Revoke"]
SLOW = frozenset(f"{INTERFACE}.{name}" for name in _WAITING)
#: All that one may call who may only read.
_READ = frozenset(
    (f"{INTERFACE}.Describe", f"{SERVICE}.GetInfo", f"{SERVICE}.GetInterfaceDescription")
)


class Answers(Protocol):
    """What an instance answers; called from threads of the control socket. Raises VarlinkError."""

    def describe(self) -> dict[str, Any]:
        """Describe."""

    def describe_to_all(self) -> dict[str, Any]:
        """Describe, for those who may only read: what everybody may know."""

    def query(self) -> News:
        """QueryMigration."""

    def set_parameters(self, caller: Caller, parameters: dict[str, Any]) -> dict[str, Any]:
        """SetParameters."""

    def cancel(self, caller: Caller) -> dict[str, Any]:
        """Cancel."""

    def expect(self, caller: Caller, upgrade: str) -> None:
        """Expect; `upgrade` is the id of one, here and below, and may be empty."""

    def preflight(self, caller: Caller, upgrade: str) -> None:
        """Preflight."""

    def withdraw(self, caller: Caller, upgrade: str) -> dict[str, Any]:
        """Withdraw."""

    def reload(self, caller: Caller) -> None:
        """Reload."""

    def register(self, caller: Caller, pid: int, upgrade: str) -> None:
        """Register."""

    def revoke(self, caller: Caller, pid: int, why: str, code: Code) -> None:
        """Revoke."""

    def try_states(self, caller: Caller) -> dict[str, Any]:
        """TryStates."""

    def settle(self, caller: Caller) -> dict[str, Any]:
        """Settle."""

    def execute(self, caller: Caller, parameters: Mapping[str, Any], upgrade: str) -> None:
        """Execute: only its failure is answered."""

    def negotiate(self, caller: Caller, parameters: dict[str, Any]) -> dict[str, Any]:
        """Migrate: agree, or refuse."""

    def migrate(self, sock: socket.socket) -> None:
        """Take over the connection on which `negotiate` has been answered."""

    def lend(self, caller: Caller, parameters: dict[str, Any]) -> dict[str, Any]:
        """Lend: agree, or refuse."""

    def lending(self, sock: socket.socket) -> None:
        """Take over the connection on which `lend` has been answered."""


#: Calls after whose answer the connection is somebody else's.
GIVEN_AWAY: dict[str, Callable[[Answers], Callable[[socket.socket], None]]] = {
    f"{INTERFACE}.Migrate": lambda answers: answers.migrate,
    f"{INTERFACE}.Lend": lambda answers: answers.lending,
}


def answer(answers: Answers, library: str, caller: Caller, call: Call) -> dict[str, Any]:
    """The answer to one call, whose parameters are checked here; `library` is its version. Raises
    VarlinkError."""
    interface, _, method = call.method.rpartition(".")
    match interface, method:
        case varlink.SERVICE, "GetInfo":
            return {
                "vendor": "upgrader",
                "product": "upgrader",
                "version": library,
                "url": "",
                "interfaces": [INTERFACE, SERVICE],
            }
        case varlink.SERVICE, "GetInterfaceDescription":
            return {"description": _description(call.parameters.get("interface"))}
        case varlink.INTERFACE, "Describe":
            return answers.describe()
        case varlink.INTERFACE, "QueryMigration":
            return told(answers.query())
        case varlink.INTERFACE, "SetParameters":
            return answers.set_parameters(caller, call.parameters)
        case varlink.INTERFACE, "Cancel":
            return answers.cancel(caller)
        case varlink.INTERFACE, "TryStates":
            return answers.try_states(caller)
        case varlink.INTERFACE, "Settle":
            return answers.settle(caller)
        case varlink.INTERFACE, "Withdraw":
            return answers.withdraw(caller, _upgrade(call))
        case varlink.INTERFACE, "Execute":
            answers.execute(caller, call.parameters, _upgrade(call))
        case varlink.INTERFACE, "Expect":
            answers.expect(caller, _upgrade(call))
        case varlink.INTERFACE, "Preflight" | "Rehearse":
            answers.preflight(caller, _upgrade(call))
        case varlink.INTERFACE, "Reload":
            answers.reload(caller)
        case varlink.INTERFACE, "Register":
            answers.register(caller, _pid(call), _upgrade(call))
        case varlink.INTERFACE, "Revoke":
            why, code = (_text(call, name) for name in ("why", "code"))
            answers.revoke(caller, _pid(call), why, Code(code))
        case varlink.INTERFACE, "Migrate":
            if not call.upgrade or call.oneway:
                raise varlink.invalid("upgrade")
            return answers.negotiate(caller, call.parameters)
        case varlink.INTERFACE, "Lend":
            if not call.upgrade or call.oneway:
                raise varlink.invalid("upgrade")
            return answers.lend(caller, call.parameters)
        case varlink.INTERFACE | varlink.SERVICE, _:
            raise VarlinkError(f"{SERVICE}.MethodNotFound", {"method": call.method})
        case _:
            raise VarlinkError(f"{SERVICE}.InterfaceNotFound", {"interface": interface})
    return {}


def answer_reader(answers: Answers, library: str, caller: Caller, call: Call) -> dict[str, Any]:
    """The same for one who may only read: no call changes, waits for, or keeps anything."""
    if call.method not in _READ:
        raise varlink.denied()
    if call.method == f"{INTERFACE}.Describe":
        return answers.describe_to_all()
    return answer(answers, library, caller, call)


def told(news: News) -> dict[str, Any]:
    """The answer to QueryMigration."""
    return {"migration": msgspec.to_builtins(news.migration)}


def _pid(call: Call) -> int:
    pid = call.parameters.get("pid")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid < 1:
        raise varlink.invalid("pid")
    return pid


def _text(call: Call, name: str) -> str:
    text = call.parameters.get(name) or ""
    if not isinstance(text, str):
        raise varlink.invalid(name)
    return text


def _upgrade(call: Call) -> str:
    """The id of an upgrade, empty if none is named; each method says whether it needs one."""
    text = _text(call, "upgrade")
    if text and not _ID.fullmatch(text):
        raise varlink.invalid("upgrade")
    return text


def _description(interface: object) -> str:
    if not isinstance(interface, str):
        raise varlink.invalid("interface")
    known = {
        INTERFACE: varlink_interface.DESCRIPTION,
        SERVICE: varlink_interface.SERVICE_DESCRIPTION,
    }
    if interface not in known:
        raise VarlinkError(f"{SERVICE}.InterfaceNotFound", {"interface": interface})
    return known[interface]
