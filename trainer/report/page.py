"""One self-contained HTML page about a run, read from its folder at any URL, running or ended."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from PIL import Image

from data_pipeline.errors import NotFound, UserError
from data_pipeline.storage.files import list_names, read_bytes
from data_pipeline.storage.urls import join, without_secrets
from trainer.config.identity import SETTINGS
from trainer.evaluator.findings import FOLDER, EvaluatorFindings
from trainer.metrics.jsonl import read_records
from trainer.report.figures import Record, changes_of, figures, script, to_html

_PICTURE = re.compile(r"(?P<name>.+)-(?P<step>\d{8})\.png")
_STARTS = ("settings changed", "resume", "phase")
"""Events with which a run goes on, perhaps as something else."""
_WIDEST = 1400
"""Pixels of a picture on the page."""


@dataclass(frozen=True)
class DrawnGrid:
    """A grid that training drew."""

    step: int
    data_url: str


def write_page(run_dir: str, *, most_pictures: int = 60) -> bytes:
    """The page, UTF-8.

    Args:
        most_pictures: grids that are put into it, evenly spaced over the run.

    Raises:
        UserError: there are no records of a run in the folder.
    """
    records = read_records(run_dir)
    if not records:
        raise UserError(
            f"{run_dir} holds no records of a run (logs/metrics*.jsonl); name the run_dir of one."
        )
    # Without its time, at which training was elsewhere.
    evaluated = [
        {k: v for k, v in r.items() if k != "time"} for r in EvaluatorFindings(join(run_dir, FOLDER)).records
    ]
    drawn = [*records, *evaluated]
    settings = _settings(run_dir)
    sections = [(title, to_html(figure)) for title, figure in figures(drawn).items()]
    grids = previews(run_dir, most_pictures)
    if grids:
        sections.insert(1, ("Pictures, same prompts and seeds", _slider(grids)))
    sections.append(("Events", _events(records)))
    sections.append(("Changes of the configuration", _changes(records)))
    sections.append(("Configuration", f"<pre>{_text(settings or 'not stored')}</pre>"))
    return _PAGE.format(
        title=_text(run_dir),
        facts=_facts(records),
        contents="".join(f'<a href="#s{i}">{html.escape(t)}</a>' for i, (t, _) in enumerate(sections)),
        sections="".join(
            f'<section id="s{i}"><h2>{html.escape(title)}</h2>{body}</section>'
            for i, (title, body) in enumerate(sections)
        ),
        script=script(),
        pictures=json.dumps([[grid.step, grid.data_url] for grid in grids]),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    ).encode()


def previews(run_dir: str, most: int) -> list[DrawnGrid]:
    """Grids of the run, oldest first, evenly chosen where there are more than `most`."""
    folder = join(run_dir, "samples")
    found = [match for match in map(_PICTURE.fullmatch, list_names(folder)) if match]
    found.sort(key=lambda match: int(match["step"]))
    if len(found) > most:
        places = {round(i * (len(found) - 1) / max(1, most - 1)) for i in range(most)}
        found = [found[place] for place in sorted(places)]
    return [DrawnGrid(int(m["step"]), _data_url(read_bytes(join(folder, m[0])))) for m in found]


def _data_url(png: bytes) -> str:
    """The picture as WebP, no wider than the page."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((_WIDEST, 8 * _WIDEST))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _settings(run_dir: str) -> str | None:
    try:
        return read_bytes(join(run_dir, SETTINGS)).decode("utf-8", "replace")
    except NotFound:
        return None


def _facts(records: Sequence[Record]) -> str:
    rows = [record for record in records if "event" not in record]
    last = rows[-1] if rows else records[-1]
    events = [record["event"] for record in records if "event" in record]
    told = {
        "step": f"{last['step']:,}",
        "samples seen": f"{last['samples_seen']:,}",
        "loss": _number(_latest(rows, "loss")),
        "images/s": _number(_latest(rows, "images_per_s")),
        "waiting for data": _percent(_latest(rows, "data_wait")),
        "samples served": _percent(_latest(rows, "served_share")),
        "starts again": str(events.count("resume")),
        "rewinds": str(events.count("rewind")),
        "newest record": datetime.fromtimestamp(last["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")
        if "time" in last
        else "-",
    }
    return "".join(
        f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in told.items()
    )


def _latest(rows: Iterable[Record], name: str) -> Any:
    values = [row[name] for row in rows if name in row]
    return values[-1] if values else None


def _number(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, int | float) else "-" if value is None else str(value)


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "-"


def _events(records: Sequence[Record]) -> str:
    events = [record for record in records if "event" in record]
    if not events:
        return "<p>None: no restart, no rewind, no fault.</p>"
    lines = []
    for event in events:
        known = ("step", "samples_seen", "time", "event")
        details = {name: value for name, value in event.items() if name not in known}
        cells = (
            _when(event),
            f"{event['step']:,}",
            event["event"],
            json.dumps(details)[:400] if details else "",
        )
        lines.append(_line(cells))
    head = "<tr><th>time</th><th>step</th><th>event</th><th>details</th></tr>"
    return f'<div class="wide"><table>{head}{"".join(lines)}</table></div>'


def _changes(records: Sequence[Record]) -> str:
    """A line for each setting that a start or a phase has otherwise than what was before it.

    A start that changes some says so just before it says where it goes on; one without a checkpoint to go on
    from says the first alone.
    """
    told = [record for record in records if record.get("event") in _STARTS]
    lines = []
    for at, event in enumerate(told):
        after = told[at + 1] if at + 1 < len(told) else {}
        before = told[at - 1] if at else {}
        if event["event"] == "settings changed":
            resumes = after.get("event") == "resume" and after["step"] == event["step"]
            what = _resumed(after) if resumes else "start"
        elif event["event"] == "resume":
            if before.get("event") == "settings changed" and before["step"] == event["step"]:
                continue  # told with what it changed
            what = _resumed(event)
        else:
            what = f"phase {event.get('phase', '')}"
        changed = changes_of(event) or [("nothing recorded", "", "")]
        lines += [_line((_when(event), f"{event['step']:,}", what, *each)) for each in changed]
    if not lines:
        return "<p>None: one start, one phase.</p>"
    head = "<tr><th>time</th><th>step</th><th>start</th><th>setting</th><th>was</th><th>is</th></tr>"
    return f'<div class="wide"><table id="changes">{head}{"".join(lines)}</table></div>'


def _resumed(event: Record) -> str:
    ranks = event.get("world_size")
    return "resume" if ranks is None else f"resume on {ranks} rank{'s' if ranks != 1 else ''}"


def _line(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"


def _when(event: Record) -> str:
    return datetime.fromtimestamp(event["time"], UTC).strftime("%m-%d %H:%M:%S") if "time" in event else ""


def _text(text: str) -> str:
    """As the page shows it: nothing of it is read as HTML, and no password is in it."""
    return html.escape(without_secrets(text))


def _slider(grids: Sequence[DrawnGrid]) -> str:
    last = len(grids) - 1
    return (
        f'<label>step <output id="at">{grids[-1].step:,}</output> '
        f'<input type="range" id="when" min="0" max="{last}" value="{last}" aria-label="pictures at step">'
        f"</label>"
        f'<img id="grid" alt="pictures drawn at step {grids[-1].step}" src="{grids[-1].data_url}">'
    )


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 0 16px;
       color: #1a1a1a; }}
h1 {{ font-size: 1.2rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin: 2rem 0 .4rem; }}
nav {{ position: sticky; top: 0; background: #fff; padding: 6px 0; border-bottom: 1px solid #ddd; z-index: 2;
      display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: .85rem; }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 10px; }}
.facts div {{ border: 1px solid #ddd; border-radius: 6px; padding: 8px; }}
.facts b {{ display: block; overflow-wrap: anywhere; }} .facts span {{ color: #595959; font-size: .8rem; }}
section {{ scroll-margin-top: 60px; }}
img {{ max-width: 100%; height: auto; display: block; margin-top: 8px; image-rendering: auto; }}
input[type=range] {{ width: 100%; }}
pre, .wide {{ overflow-x: auto; background: #f6f6f6; padding: 10px; font-size: .8rem; }}
table {{ border-collapse: collapse; }}
td, th {{ text-align: left; padding: 2px 12px 2px 0; white-space: nowrap; vertical-align: top; }}
#changes td:nth-last-child(-n+2) {{ white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }}
</style>
<script>{script}</script></head>
<body><h1>{title}</h1><div class="facts">{facts}</div><nav>{contents}</nav>
{sections}
<p><small>made {made} by ldm report</small></p>
<script>
const pictures = {pictures};
const when = document.getElementById("when");
if (when) when.addEventListener("input", () => {{
  const [step, url] = pictures[Number(when.value)];
  const grid = document.getElementById("grid");
  grid.src = url;
  grid.alt = "pictures drawn at step " + step;
  document.getElementById("at").textContent = step.toLocaleString("en");
}});
</script></body></html>
"""
