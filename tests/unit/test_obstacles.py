# SPDX-License-Identifier: LGPL-2.1-or-later
"""What stands in the way of an upgrade, judged from what PID 1 says of the unit."""

from typing import Any, cast

import pytest

from tests.unit.units import unit
from upgrader.protocol.varlink_types import Description
from upgrader.systemd.unit import FdStoreContents, Unit
from upgrader.tool import upgrade
from upgrader.tool.blockers import not_ours, parked_image, settings
from upgrader.tool.instance_client import InstanceError
from upgrader.tool.presence import Presence
from upgrader.tool.systemd_client import Systemd
from upgrader.tool.upgrade import Wish


def test_a_healthy_unit_has_no_obstacle() -> None:
    """A unit as the documentation shows it is upgraded."""
    assert not_ours(unit(), Presence(Description("web"))) is None
    assert settings(unit()) is None
    assert settings(unit(fd_store_preserve=None)) is None


def test_who_uses_the_library() -> None:
    """Its instance answers, or may not be asked by this user, or PID 1 holds FDs of ours; what it
    writes into its status text does not count."""
    nobody = InstanceError("nobody answers at @x", name="Nobody")
    text = "generation 1, cold start"

    obstacle = not_ours(unit(status_text=text), Presence(error=nobody))

    assert obstacle is not None
    assert "nobody answers at @x" in obstacle.cause
    assert "systemctl restart web.service" in obstacle.remedy
    denied = InstanceError("may only be asked by root", name="PermissionDenied")
    for found in (Presence(stored=True, error=nobody), Presence(error=denied)):
        assert not_ours(unit(status_text="3 messages so far"), found) is None


@pytest.mark.parametrize(
    ("changes", "setting", "wanted"),
    [
        ({"type": "simple"}, "Type=simple", "Type=notify"),
        ({"fd_store_max": 0}, "FileDescriptorStoreMax=0", "FileDescriptorStoreMax=64"),
        ({"notify_access": "none"}, "NotifyAccess=none", "NotifyAccess=exec"),
        ({"fd_store_preserve": "no"}, "FileDescriptorStorePreserve=no", "Preserve=yes"),
        ({"stored_fds": 16}, "FileDescriptorStoreMax=16", "FileDescriptorStoreMax=64"),
        ({"environment": ("UPGRADER=off",)}, "UPGRADER=off", "remove it"),
        ({"environment": ("UPGRADER_DISCARD=all",)}, "UPGRADER_DISCARD=all", "remove it"),
    ],
)
def test_a_setting_that_loses_the_image_is_an_obstacle(
    changes: dict[str, Any], setting: str, wanted: str
) -> None:
    """Each such setting is named, with the one to write instead."""
    obstacle = settings(unit(**changes))

    assert obstacle is not None
    assert setting in obstacle.cause
    assert wanted in obstacle.remedy


def test_the_newest_parked_image_counts() -> None:
    """Of several, the newest; listeners and images set aside are none."""
    names = ("upgrader-listener-http", "upgrader-aside-9", "upgrader-channel-3", "stored")

    assert parked_image(FdStoreContents(4, names)) == 3
    assert parked_image(FdStoreContents(5, (*names, "upgrader-channel-12"))) == 12
    # A service may store anything.
    assert parked_image(FdStoreContents(5, (*names, "upgrader-channel-²"))) == 3
    assert parked_image(FdStoreContents(2, names[:2])) is None


def test_without_names_the_count_must_do() -> None:
    """Before systemd 254 there is an image if there are more FDs than were known."""
    assert parked_image(FdStoreContents(2, None), others=1) == 0
    assert parked_image(FdStoreContents(1, None), others=1) is None


def test_a_job_that_has_just_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit is judged as it is after the job, and not as it was in the middle of it."""

    class Ended:
        """PID 1, between whose answers another's restart ends."""

        user = False

        def __init__(self) -> None:
            self.units = [unit(active_state="activating", sub_state="start", job_id=7), unit()]

        def unit(self, name: str) -> Unit:
            return self.units.pop(0)

        def job(self, unit: Unit) -> None:
            return None

    class Judged(Exception):
        pass

    def judge(systemd: object, unit: Unit) -> bool:
        raise Judged(unit.active_state)

    monkeypatch.setattr(upgrade, "is_kept", judge)

    with pytest.raises(Judged, match=r"^active$"):
        upgrade._upgrade(cast(Systemd, Ended()), "web.service", Wish(), lambda text: None, 0.0)
