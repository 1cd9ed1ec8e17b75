# SPDX-License-Identifier: LGPL-2.1-or-later
"""Phases of a migration, as they are told to all who watch."""

import json
from pathlib import Path

from tests.unit.control import DESCRIBE, Instance, connected
from upgrader.instance.control_listener import Places
from upgrader.instance.control_socket import Control
from upgrader.protocol import varlink
from upgrader.protocol.phase import Phase
from upgrader.protocol.varlink import INTERFACE
from upgrader.protocol.varlink_client import call, watch
from upgrader.protocol.varlink_messages import Call, encode


def test_every_phase_is_told_once(control_path: Path, instance: Instance) -> None:
    """To all who asked with `more`, however fast one follows the other; the last reply says that it
    is the last, and then the connection takes calls again."""
    phases = [Phase.COLLECTING, Phase.FROZEN, Phase.LOADING, Phase.COMMITTED, Phase.DONE]
    with connected(control_path) as one, connected(control_path) as two:
        told = [watch(sock, f"{INTERFACE}.QueryMigration") for sock in (one, two)]
        assert ["none", "none"] == [next(each)["migration"]["phase"] for each in told]
        instance.progress.begin("live", 3)
        for phase in phases:
            instance.progress.enter(phase)
        for each in told:
            assert ["setup", *phases] == [reply["migration"]["phase"] for reply in each]
        assert "x" == call(one, DESCRIBE, {})["service"]
        assert "done" == call(two, f"{INTERFACE}.QueryMigration", {})["migration"]["phase"]


def test_who_asks_late_is_not_told_twice(control_path: Path, instance: Instance) -> None:
    """News that are still on their way are older than what the first reply says."""
    instance.progress.begin("live", 3)
    for _ in range(50):
        with connected(control_path) as sock:
            instance.progress.enter(Phase.FROZEN)
            sock.sendall(encode(Call(f"{INTERFACE}.QueryMigration", more=True)))
            instance.progress.enter(Phase.LOADING, fds=1)
            instance.progress.enter(Phase.DONE)
            buffer, seen = bytearray(), []
            while not seen or seen[-1] != "done":
                buffer += sock.recv(65536)
                while message := varlink.take(buffer):
                    seen.append(json.loads(message)["parameters"]["migration"]["phase"])
        assert sorted(set(seen), key=seen.index) == seen
        instance.progress.begin("live", 3)


def test_the_last_news_come_before_the_end(tmp_path: Path, instance: Instance) -> None:
    """Who waits for the end of a migration is told, although the process ends with it."""
    path = tmp_path / "a.sock"
    answering = Control(Places(str(path)), instance, "1.0")
    answering.open()
    instance.progress.on_change(answering.announce)
    instance.progress.begin("live", 1)
    with connected(path) as sock:
        told = watch(sock, f"{INTERFACE}.QueryMigration")
        assert "setup" == next(told)["migration"]["phase"]
        instance.progress.enter(Phase.DONE)
        answering.close()

        assert ["done"] == [each["migration"]["phase"] for each in told]
