# SPDX-License-Identifier: LGPL-2.1-or-later
"""What stands in the way of an upgrade, judged from what PID 1 says of the unit."""

from typing import Any

import pytest

from tests.unit.units import unit
from upgrader.obstacles import not_ours, parked_image, settings
from upgrader.systemd.unit import FdStore


def test_a_healthy_unit_has_no_obstacle() -> None:
    """A unit as the documentation shows it is upgraded."""
    assert not_ours(unit()) is None
    assert settings(unit()) is None
    assert settings(unit(fd_store_preserve=None)) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no status text"),
        ("Processing requests...", "'Processing requests...'"),
        ("generation two, cold start", "'generation two"),
        ("generation 1, cold start, and more", "and more"),
    ],
)
def test_a_foreign_status_text_is_no_instance_of_ours(text: str, words: str) -> None:
    """Only a status text of ours tells that the library is in use."""
    obstacle = not_ours(unit(status_text=text))

    assert obstacle is not None
    assert words in obstacle.cause
    assert "systemctl restart web.service" in obstacle.remedy


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

    assert parked_image(FdStore(4, names)) == 3
    assert parked_image(FdStore(5, (*names, "upgrader-channel-12"))) == 12
    assert parked_image(FdStore(2, names[:2])) is None


def test_without_names_the_count_must_do() -> None:
    """Before systemd 254 there is an image if there are more FDs than were known."""
    assert parked_image(FdStore(2, None), others=1) == 0
    assert parked_image(FdStore(1, None), others=1) is None
