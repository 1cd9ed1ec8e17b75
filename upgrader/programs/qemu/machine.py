# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine as an admin describes it in a QEMU command line, and the command line that QEMU gets: with
its memory and network devices in FDs, so that another QEMU can go on with it.

Everything is decided here, before anything is started: what cannot move is refused by its word.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from upgrader.errors import DeclarationError
from upgrader.programs.qemu import options
from upgrader.programs.qemu.options import Option

#: qemu(1): without -m.
_MEMORY = "128M"
_RAM = "upgrader-ram"
_MONITOR = "upgrader-monitor-"
#: Options by which something is lost, or shared where it cannot be.
_REFUSED = {
    "daemonize": "systemd supervises it: leave it out",
    "incoming": "upgrader sets it",
    "loadvm": "a start from a snapshot is no start of this machine: leave it out",
    "snapshot": "what was written would be lost with the process",
    "mem-path": "upgrader makes the memory",
    "numa": "memory in several parts does not move yet",
    "net": "write -netdev and -device",
    "nic": "write -netdev and -device",
    "vnc": "two QEMUs cannot listen on it: use -display none",
    "spice": "two QEMUs cannot listen on it: use -display none",
    "gdb": "two QEMUs cannot listen on it",
    "s": "two QEMUs cannot listen on it",
    "pidfile": "systemd knows the process: leave it out",
    "preconfig": "nobody would end it: leave it out",
    "S": "upgrader starts the machine: leave it out",
}
#: Options that say where QEMU talks to somebody.
_CHANNELS = ("mon", "qmp", "monitor", "chardev", "serial")
_REFUSED_DEVICES = ("vfio-", "ivshmem-", "vhost-vsock", "vhost-scsi", "pc-dimm", "nvdimm")
#: What may differ between the QEMU that runs and the next one: no guest sees it.
_UNSEEN = frozenset(
    [
        "name",
        "accel",
        "enable-kvm",
        "display",
        "nographic",
        "monitor",
        "qmp",
        "mon",
        "serial",
        "chardev",
        "D",
        "d",
        "trace",
        "msg",
        "L",
        "run-with",
        "sandbox",
        "runas",
        "user",
        "chroot",
        "nodefaults",
        "no-user-config",
        "incoming",
        "S",
    ]
)


@dataclass(frozen=True, slots=True)
class NetworkDevice:
    """A network device of the host: the id of the netdev, and the name of the interface."""

    id: str
    interface: str


@dataclass(frozen=True, slots=True)
class Placing:
    """Where a QEMU finds what it is given: the numbers of its FDs.

    `token`: by which its command line says where it can be asked, at most 14 characters; `private`: what it writes to the
    memory is its own; `incoming`: it waits for a state.
    """

    token: str
    memory: int
    monitor: int
    taps: Mapping[str, int]
    incoming: bool = False
    private: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """What runs: `type` as the admin wrote it, possibly an alias; `memory` in bytes; `changed` says for
    people what is not as they wrote it."""

    binary: str
    type: str
    memory: int
    taps: Sequence[NetworkDevice]
    changed: Sequence[str]
    _options: Sequence[Option]
    _properties: Mapping[str, str]

    @classmethod
    def read(cls, words: Sequence[str]) -> "Machine":
        """Read a command line; raises DeclarationError for what cannot move."""
        try:
            given = options.read(words[1:])
        except ValueError as error:
            raise DeclarationError(words[0], str(error)) from error
        for each in given:
            _check(each)
        properties: dict[str, str] = {}
        for each in given:
            if each.name == "machine":
                properties |= each.properties()
        for name in ("memory-backend", "aux-ram-share"):
            if name in properties:
                raise DeclarationError(
                    f"-machine {name}", "upgrader makes the memory: leave it out"
                )
        memory, changed = _memory(given), []
        taps = tuple(_tap(each) for each in given if _is_tap(each))
        changed.append(f"memory: {memory >> 20} MiB in a memfd that PID 1 keeps")
        changed += [f"-netdev {t.id}: upgrader opens {t.interface} and keeps it" for t in taps]
        rest = tuple(each for each in given if each.name != "machine" and not _is_tap(each))
        kind = properties.pop("type", "")
        return cls(words[0], kind, memory, taps, tuple(changed), rest, properties)

    def command(self, kind: str, placing: Placing) -> list[str]:
        """The command line of a QEMU of this machine, of a versioned type."""
        machine = {"type": kind, **self._properties, "memory-backend": _RAM}
        memory = {
            "qom-type": "memory-backend-file",
            "id": _RAM,
            "size": str(self.memory),
            "mem-path": f"/proc/self/fd/{placing.memory}",
            "share": "off" if placing.private else "on",
        }
        chardev = {
            "backend": "socket",
            "id": _MONITOR + placing.token,
            "fd": str(placing.monitor),
            "server": "on",
            "wait": "off",
        }
        added = [
            Option("machine", options.text(machine, "type")),
            Option("object", options.text(memory, "qom-type")),
            Option("chardev", options.text(chardev, "backend")),
            Option("qmp", f"chardev:{_MONITOR}{placing.token}"),
        ]
        for tap in self.taps:
            netdev = {"type": "tap", "id": tap.id, "fd": str(placing.taps[tap.interface])}
            added.append(Option("netdev", options.text({**netdev, "vhost": "off"}, "type")))
        if placing.incoming:
            added += [Option("incoming", "defer"), Option("S")]
        # Netdevs and the memory come before the devices that name them, as they are created anyway.
        return [self.binary, *(word for each in (*added, *self._options) for word in each.words())]


def token(words: Sequence[str]) -> str:
    """That of a command line that `Machine.command` has made; empty for another one."""
    for word in words:
        if word.startswith(f"chardev:{_MONITOR}"):
            return word.removeprefix(f"chardev:{_MONITOR}")
    return ""


def difference(running: Sequence[str], wanted: Sequence[str]) -> str:
    """What a guest would see of another command line, both made by `Machine.command`: empty if nothing.

    QEMU itself takes some of it without a word, such as a further device.
    """
    before, after = (Counter(_seen(words)) for words in (running, wanted))
    gone, new = before - after, after - before
    said = [f"no more {each}" for each in gone] + [f"now {each}" for each in new]
    return "; ".join(said)


def _seen(words: Sequence[str]) -> list[str]:
    """What a guest sees of a command line."""
    found = []
    for each in options.read(words[1:]):
        properties = each.properties() if each.value else {}
        if each.name in _UNSEEN:
            continue
        if each.name == "object" and properties.get("id") == _RAM:
            found.append(f"-m of {properties['size']} bytes")
        elif each.name == "netdev":
            found.append(f"-netdev {properties.get('type')},id={properties.get('id')}")
        elif each.name != "m":
            found.append(str(each))
    return found


def _check(option: Option) -> None:
    if why := _REFUSED.get(option.name):
        raise DeclarationError(f"-{option.name}", why)
    properties = option.properties()
    if option.name == "device" and properties.get("driver", "").startswith(_REFUSED_DEVICES):
        raise DeclarationError(str(option), "such a device does not move")
    if option.name == "m" and {"slots", "maxmem"} & properties.keys():
        raise DeclarationError(str(option), "memory that can be plugged does not move yet")
    if option.name == "netdev" and not _is_tap(option):
        raise DeclarationError(str(option), "of network devices, only tap moves")
    if option.name == "display" and option.value != "none":
        raise DeclarationError(str(option), "a window belongs to one process: use -display none")
    if option.name in _CHANNELS and properties.get("server", "off") != "off":
        raise DeclarationError(str(option), "two QEMUs cannot listen on it")


def _is_tap(option: Option) -> bool:
    return option.name == "netdev" and option.properties().get("type") == "tap"


def _tap(option: Option) -> NetworkDevice:
    properties = option.properties()
    for name in properties.keys() - {"type", "id", "ifname", "script", "downscript", "vhost"}:
        raise DeclarationError(str(option), f"{name} does not move yet: leave it out")
    if properties.get("vhost", "off") != "off":
        raise DeclarationError(str(option), "vhost=on does not move yet: leave it out")
    if not properties.get("ifname") or "id" not in properties:
        raise DeclarationError(str(option), "needs id=NAME and ifname=INTERFACE")
    for name in ("script", "downscript"):
        if properties.get(name) != "no":
            why = f"needs {name}=no: networkd or ExecStartPre= set the interface up, once"
            raise DeclarationError(str(option), why)
    return NetworkDevice(properties["id"], properties["ifname"])


def _memory(given: Sequence[Option]) -> int:
    """The size that the last -m says, in bytes."""
    sizes = [each.properties().get("size", "") for each in given if each.name == "m"]
    try:
        return options.bytes_of(sizes[-1] if sizes else _MEMORY)
    except ValueError as error:
        raise DeclarationError("-m", str(error)) from error
