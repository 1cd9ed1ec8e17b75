# SPDX-License-Identifier: LGPL-2.1-or-later
"""`upgrader history --svg` in a real browser: what is drawn, and whether a person can read it."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.support import cannot_run
from upgrader.tool.history import HistoryEvent, upgrades
from upgrader.tool.history_svg import plot

#: Where each label has been drawn, in the units of the picture.
_MEASURE = """
<script>
const labels = [...document.querySelectorAll("text")].map(label => {
  const box = label.getBBox();
  return {text: label.textContent, x: box.x, y: box.y, width: box.width, height: box.height};
});
const view = document.querySelector("svg").viewBox.baseVal;
document.body.setAttribute("data-drawn",
  JSON.stringify({width: view.width, height: view.height, labels}));
</script>
"""


def drawn(picture: str, directory: Path) -> dict[str, Any]:
    """The labels as a browser draws them."""
    browser = shutil.which("chromium")
    if browser is None:
        cannot_run("there is no chromium: packaging/bootstrap test")
    page = directory / "picture.html"
    picture = picture.partition("?>")[2]
    page.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{picture}{_MEASURE}</body>")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={directory / 'profile'}", "--dump-dom",
            page.as_uri(),
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'data-drawn="([^"]*)"', done.stdout)
    assert found, done.stdout[-2000:]
    answer: dict[str, Any] = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    return answer


def test_every_label_can_be_read(tmp_path: Path) -> None:
    """The phases are named, every label lies inside of the picture, and none on another one."""
    phases = (("setup", 0.4), ("collecting", 0.01), ("frozen", 0.002), ("loading", 0.005))
    events = [
        HistoryEvent(1.0, 1, "source", "migrate", "done", "generation 1 has been replaced", "live", 1, 2,
              times=(*phases, ("committed", 0.02))),
        HistoryEvent(60.0, 2, "source", "migrate", "failed", "generation 2 serves on: not with me", "live",
              2, 3, times=phases),
        HistoryEvent(70.0, 2, "takeover", "upgrade", "failed", "no room for a second instance; " * 5),
        HistoryEvent(80.0, 3, "destination", "load", "done", "", "restart", 2, 3, pause=0.31),
    ]  # fmt: skip

    picture = drawn(plot("web.service", upgrades(events)), tmp_path)

    texts = {label["text"] for label in picture["labels"]}
    assert {"Upgrades of web.service", "setup", "frozen", "loading", "committed"} <= texts
    assert any("not with me" in text for text in texts)
    for label in picture["labels"]:
        assert label["width"] > 0, label
        assert label["height"] >= 9, label
        assert label["x"] >= 0, label
        assert label["x"] + label["width"] <= picture["width"], label
        assert label["y"] + label["height"] <= picture["height"], label
    for one, other in itertools.combinations(picture["labels"], 2):
        apart = (
            one["x"] + one["width"] <= other["x"]
            or other["x"] + other["width"] <= one["x"]
            or one["y"] + one["height"] <= other["y"] + 1
            or other["y"] + other["height"] <= one["y"] + 1
        )
        assert apart, (one, other)
