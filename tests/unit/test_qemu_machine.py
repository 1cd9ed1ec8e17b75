# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine is read from a QEMU command line, and written as one whose memory and network move."""

import pytest

from upgrader.errors import DeclarationError
from upgrader.programs.qemu.machine import Machine, NetworkDevice, Placing, difference, token
from upgrader.programs.qemu.options import Option, bytes_of, read, text

TAP = "tap,id=n0,ifname=vm0,script=no,downscript=no"
WORDS = [
    *("qemu-system-x86_64", "-M", "q35,usb=off", "-m", "1G", "-smp", "2", "-nodefaults"),
    *("-netdev", TAP, "-device", "virtio-net-pci,netdev=n0", "-append", "a b"),
]
FIRST = Placing("abc", 3, 4, {"vm0": 5})
NEXT = Placing("def", 7, 8, {"vm0": 9}, incoming=True)


def test_what_is_read() -> None:
    machine = Machine.read(WORDS)

    assert ("qemu-system-x86_64", "q35", 1 << 30) == (machine.binary, machine.type, machine.memory)
    assert [NetworkDevice("n0", "vm0")] == [*machine.taps]
    assert ["memory: 1024 MiB in a memfd that PID 1 keeps"] == [*machine.changed][:1]
    assert any("vm0" in line for line in machine.changed)


def test_what_is_written() -> None:
    """Memory and network come from FDs; all else is as it was."""
    command = Machine.read(WORDS).command("pc-q35-7.2", FIRST)

    options = {option.name: option.properties() for option in read(command[1:]) if option.value}
    assert {"type": "pc-q35-7.2", "usb": "off", "memory-backend": "upgrader-ram"} == options[
        "machine"
    ]
    assert ("/proc/self/fd/3", "on", str(1 << 30)) == tuple(
        options["object"][name] for name in ("mem-path", "share", "size")
    )
    assert {"type": "tap", "id": "n0", "fd": "5", "vhost": "off"} == options["netdev"]
    assert "abc" == token(command)
    assert ["-append", "a b"] == command[-2:]
    assert not {"-incoming", "-S"} & set(command)


def test_the_next_one_waits() -> None:
    command = Machine.read(WORDS).command("pc-q35-7.2", NEXT)

    assert "-S" in command
    assert "defer" == command[command.index("-incoming") + 1]


def test_one_that_is_tried_writes_to_memory_of_its_own() -> None:
    placing = Placing("x", 3, 4, {"vm0": 5}, incoming=True, private=True)

    assert any("share=off" in word for word in Machine.read(WORDS).command("q", placing))


def test_a_guest_sees_no_difference() -> None:
    """Numbers of FDs, names and where it talks to people are the host's."""
    before = Machine.read([*WORDS, "-name", "a", "-serial", "stdio"])
    after = Machine.read([*WORDS, "-serial", "null"])

    assert "" == difference(before.command("q", FIRST), after.command("q", NEXT))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["-m", "512"], ["no more -m of 1073741824 bytes", "now -m of 536870912 bytes"]),
        (["-device", "virtio-rng-pci"], ["now -device virtio-rng-pci"]),
        (["-smp", "4"], ["now -smp 4"]),
        (["-cpu", "max"], ["now -cpu max"]),
        (["-machine", "hpet=off"], ["hpet=off"]),
        (["-netdev", "tap,id=n1,ifname=vm1,script=no,downscript=no"], ["now -netdev tap,id=n1"]),
    ],
)
def test_a_guest_sees_a_difference(change: list[str], said: list[str]) -> None:
    """QEMU itself takes some of it without a word."""
    after = Machine.read([*WORDS, *change])
    placing = Placing("def", 7, 8, {"vm0": 9, "vm1": 10}, incoming=True)
    found = difference(Machine.read(WORDS).command("q", FIRST), after.command("q", placing))

    assert all(each in found for each in said), found


@pytest.mark.parametrize(
    "words",
    [
        ["-daemonize"],
        ["-incoming", "defer"],
        ["-S"],
        ["-snapshot"],
        ["-vnc", ":1"],
        ["-display", "gtk"],
        ["-nic", "user"],
        ["-netdev", "user,id=u"],
        ["-netdev", "tap,id=n1,ifname=vm1"],
        ["-netdev", "tap,id=n1,ifname=vm1,script=no,downscript=no,vhost=on"],
        ["-netdev", "tap,id=n1,script=no,downscript=no"],
        ["-netdev", '{"type":"user","id":"u"}'],
        ["-device", "vfio-pci,host=01:00.0"],
        ["-device", '{"driver":"vfio-pci","host":"01:00.0"}'],
        ["-machine", "memory-backend=mine"],
        ["-m", "512,slots=2,maxmem=4G"],
        ["-m", "much"],
        ["-serial", "unix:/run/x,server=on"],
        ["-m"],
    ],
)
def test_what_cannot_move_is_refused_by_its_word(words: list[str]) -> None:
    """Before anything is started."""
    with pytest.raises(DeclarationError) as refused:
        Machine.read([*WORDS, *words])

    assert words[0].lstrip("-") in str(refused.value)


def test_values() -> None:
    option = Option("device", "virtio-net-pci,netdev=n0,romfile=,name=a,,b,multifunction")

    assert {
        "driver": "virtio-net-pci",
        "netdev": "n0",
        "romfile": "",
        "name": "a,b",
        "multifunction": "on",
    } == option.properties()
    assert "tap,id=a,,b" == text({"id": "a,b", "type": "tap"}, "type")
    assert {"a.b": "1", "a.c": "on"} == Option("object", '{"a": {"b": 1, "c": true}}').properties()


@pytest.mark.parametrize(
    ("size", "count"), [("512", 512 << 20), ("2k", 2048), ("1G", 1 << 30), ("3b", 3)]
)
def test_sizes(size: str, count: int) -> None:
    assert count == bytes_of(size)


def test_words_of_a_command_line() -> None:
    """A word without a dash is a disk; `--x` is `-x`."""
    assert (
        Option("nodefaults"),
        Option("m", "1G"),
        Option("hda", "disk.img"),
    ) == read(["--nodefaults", "-m", "1G", "disk.img"])
