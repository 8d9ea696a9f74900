"""The report in a real browser: figures are drawn, nothing fails, it fits a telephone, the slider works."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.unit.report.test_page import record, run_dir
from trainer.__main__ import main

__all__ = ["run_dir"]  # a fixture

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no browser here: apt-get install chromium")

LISTENS = """<script>
const failed = [];
addEventListener("error", (e) => failed.push(String(e.message || e.target.outerHTML)), true);
addEventListener("unhandledrejection", (e) => failed.push(String(e.reason)));
for (const level of ["error", "warn"]) console[level] = (...words) => failed.push(words.join(" "));
</script>"""
"""Before all scripts of the page."""
LOOKS = """<script>
addEventListener("load", () => requestAnimationFrame(() => {
  const titles = (found) => [...found].map((each) => each.closest("section").querySelector("h2").textContent);
  const slider = document.getElementById("when");
  const last = document.getElementById("grid").alt;
  slider.focus();
  slider.stepDown();  // as the left arrow does
  slider.dispatchEvent(new Event("input", {bubbles: true}));
  const links = [...document.querySelectorAll("nav a")].map((a) => document.querySelector(a.hash));
  parent.postMessage(JSON.stringify({
    failed,
    figures: titles(document.querySelectorAll(".plotly-graph-div")),
    drawn: titles(document.querySelectorAll(".plotly-graph-div .main-svg:first-child")),
    wider: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    alts: [last, document.getElementById("grid").alt],
    shown: document.getElementById("grid").naturalWidth,
    focused: document.activeElement === slider,
    dead: links.filter((each) => each === null).length,
    changes: [...document.querySelectorAll("#changes td")].map((cell) => cell.textContent),
  }), "*");
}));
</script>"""
FRAME = """<!DOCTYPE html><iframe src="page.html" style="width:{width}px;height:800px"></iframe>
<pre id="told"></pre><script>
onmessage = (e) => {{ document.getElementById("told").textContent = e.data; }};
</script>"""


def looked_at(page: str, folder: Path, width: int) -> dict[str, Any]:
    """What the page says of itself in a window of so many pixels."""
    heard = page.replace("<head>", f"<head>{LISTENS}", 1).replace("</body>", f"{LOOKS}</body>", 1)
    (folder / "page.html").write_text(heard, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    assert CHROMIUM is not None
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    profile = f"--user-data-dir={folder}/profile"
    # Time is virtual: it stands still while something loads, so that a slow machine sees the same.
    command = [CHROMIUM, *words, profile, "--virtual-time-budget=60000", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    (told,) = re.findall(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    found: dict[str, Any] = json.loads(html.unescape(told))
    return found


@needs_chromium
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_works_in_a_browser(run_dir: Path, tmp_path: Path, width: int) -> None:
    changed = [{"key": "optimizer.learning_rate", "was": "0.0001", "now": "<b>0.5</b>"}]
    events = [record(4, event="settings changed", changed=changed), record(4, event="resume", world_size=2)]
    with (run_dir / "logs/metrics.jsonl").open("a") as file:
        file.write("\n" + "".join(f"{json.dumps(each)}\n" for each in events))
    out = tmp_path / "report.html"
    assert main(["report", str(run_dir), "--out", str(out)]) == 0
    found = looked_at(out.read_text(encoding="utf-8"), tmp_path, width)
    assert found["failed"] == []
    assert found["drawn"] == found["figures"]
    assert {"Loss", "Validation: loss", "Progress and faults in time"} <= set(found["drawn"])
    assert found["wider"] <= 0
    assert (found["alts"], found["shown"] > 0, found["focused"]) == (
        ["pictures drawn at step 4", "pictures drawn at step 2"],
        True,
        True,
    )
    assert found["dead"] == 0
    assert found["changes"][1:] == [
        "4",
        "resume on 2 ranks",
        "optimizer.learning_rate",
        "0.0001",
        "<b>0.5</b>",
    ]
