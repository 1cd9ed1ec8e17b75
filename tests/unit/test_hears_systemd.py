# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether an instance can ask systemd: one question that failed is no answer for ever."""

from upgrader.instance.self_report import SelfReport
from upgrader.systemd.unit_settings import Settings


def test_u10_systemd_is_asked_again() -> None:
    """It may have been executing itself anew when the instance started; once heard, that is enough."""
    report = SelfReport("x", "1", {})
    answers = [Settings(), Settings(), Settings(heard=True)]
    report.ask_settings = lambda: answers.pop(0)
    report.settings = report.ask_settings()

    assert [False, True, True] == [report.hears_systemd() for _ in range(3)]
    assert not answers
