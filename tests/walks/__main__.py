# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m tests.walks` (root): what one open connection, and `upgrader upgrade chat.service`, go through.

Prints, for each process, the functions in the order in which they were first called, and how often each
room was entered.
"""

from collections import Counter
from itertools import groupby
from pathlib import Path

from tests.support import eventually
from tests.system.serving import Service
from tests.system.tool import described
from upgrader.lab.private_systemd import PrivateSystemd

_RECORDER = Path(__file__).with_name("sitecustomize.py")
_WALK = "/run/walk"


def shown(calls: list[str]) -> str:
    """By module, each function once; then the rooms that were entered more than twice, and the functions
    that were called more than once."""
    lines, seen = [], set()
    for module, group in groupby(calls, lambda call: call.partition(":")[0]):
        names = dict.fromkeys(call.partition(":")[2] for call in group)
        new = [name for name in names if f"{module}:{name}" not in seen]
        seen |= {f"{module}:{name}" for name in names}
        if new:
            lines.append(f"- {module}: {', '.join(new)}")
    rooms = Counter(
        room for room, _ in groupby(calls, lambda call: call.split("/")[0].split(":")[0])
    )
    entered = ", ".join(f"{room} {count}" for room, count in rooms.most_common() if count > 2)
    again = Counter(calls)
    often = ", ".join(f"{call} {count}" for call, count in again.items() if count > 1)
    return "\n".join(
        [*lines, "", f"Entered more than twice: {entered}", "", f"Called again: {often}"]
    )


def main() -> None:
    """Upgrade once, with one client connected."""
    with PrivateSystemd.boot() as machine:
        machine.run(["mkdir", "-pm", "1777", _WALK])
        machine.copy_in(_RECORDER, "/opt/walk/sitecustomize.py")
        recorded = {"PYTHONPATH": "/opt/walk", "WALK": _WALK}
        service = Service(
            machine,
            "chat",
            "chat",
            [
                f"ExecReload={' '.join(machine.python)} -m upgrader.takeover",
                "RuntimeDirectory=chat",
                "Environment=" + " ".join(f"{name}={value}" for name, value in recorded.items()),
                "Environment=UPGRADER_DOWNTIME_LIMIT=20s UPGRADER_MIGRATION_TIMEOUT=90s",
                "TimeoutStartSec=120",
            ],
        )
        service.start()
        place = service.inside(_WALK)
        source = service.pid
        with service.connect() as client:
            client.ask("room")
            assert eventually(lambda: described(service).get("held"))
            fd = described(service)["held"][0]["fd"]
            number = service.inside(f"/proc/{source}/fd/{fd}").stat().st_ino
            (place / "inode").write_text(str(number))
            before = (place / str(source)).stat().st_size
            done = machine.run(
                ["upgrader", "upgrade", "--mode", "live", "chat.service"], env=recorded, check=False
            )
            print(done.stdout, done.stderr)
            client.ask("room")
            walks = {
                "source": (place / str(source)).read_bytes()[before:].decode().splitlines(),
                "takeover, then destination": (place / str(service.pid)).read_text().splitlines(),
            }
        for file in place.iterdir():
            text = file.read_text()
            if "cli/upgrade_restart" in text:
                walks["upgrader upgrade"] = text.splitlines()
    for name, lines in walks.items():
        if name == "upgrader upgrade":
            print(f"\n## `{name}`\n\n{shown([line.partition(' ')[2] for line in lines])}")
            continue
        about = [line.partition(" ")[2] for line in lines if line.startswith("about")]
        print(f"\n## One connection: {name}\n\n{shown(about)}")


if __name__ == "__main__":
    main()
