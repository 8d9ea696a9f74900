"""The figures of a run: what its records hold, over the samples seen by training. Sole importer of plotly.

A record is one line of metrics.jsonl, an event one that says so. Restarts and rewinds make steps again, so a
column's curve may go back: it is broken there instead of being joined across.
"""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import plotly.graph_objects as go
import plotly.io
import plotly.offline
from plotly.subplots import make_subplots

from trainer.config.checks_validation import RECONSTRUCTION_DISTANCES
from trainer.metrics.jsonl import MEASURED_BY
from trainer.report.chart import fidelity_chart

Record = dict[str, Any]

SMOOTHED = 25
"""Records whose median the thick line of the loss is."""
MOST_POINTS = 4000
"""Of one curve, ends of its stretches left out: a page of a run of weeks still opens at once."""
MOST_TOLD = 8
"""Settings that an event on the time axis names; the table of changes has all."""
VALIDATION = "validation/"
"""Before the names of what is measured on held-out samples."""
_OF_NONE = re.compile("_stderr$|^validation/(samples|seconds)$")
"""Of what validation records, what is no figure."""
EVENT_COLOURS = {
    "rewind": "#d62728",
    "save failed": "#d62728",
    "storage outage": "#d62728",
    "sick gpu": "#d62728",
    "slow rank": "#ff7f0e",
    "slower": "#ff7f0e",
    "waiting for data": "#ff7f0e",
    "validation not finite": "#ff7f0e",
    "resume changed": "#9467bd",
    "settings changed": "#8c564b",
    "resume": "#7f7f7f",
}


def figures(records: Sequence[Record]) -> dict[str, go.Figure]:
    """{title: figure} of everything that these records hold, in the order in which one looks at it.

    Args:
        records: lines of metrics.jsonl and of the evaluator's, oldest first.
    """
    rows = [record for record in records if "event" not in record]
    events = [record for record in records if "event" in record]
    drawn: dict[str, go.Figure | None] = {
        "Loss": _loss(rows, events),
        **_validation(rows, events),
        "Fidelity": _measured(_group(rows, events, "eval/"), rows, "eval/"),
        "Learning rate and gradient norm": _lines(
            rows, events, {"learning_rate": "learning rate", "grad_norm": "gradient norm"}, rows_apart=True
        ),
        "Norm of the weights, by block": _group(rows, events, "layers/", "/weight"),
        "Norm of the mean gradient, by block": _group(rows, events, "layers/", "/gradient"),
        "Speed": _lines(rows, events, {"images_per_s": "images/s"}),
        "Where a step's time goes": _step_split(rows, events),
        "Most of any rank, and how long the quickest waits, in seconds": _group(
            rows, events, "ranks/", "_s_most"
        ),
        "Slow ranks": _lines(rows, events, {"slow_ranks": "ranks"}),
        "Waiting for data": _lines(rows, events, {"data_wait": "share of the step"}),
        "Rejected samples by reason": _group(rows, events, "rejected/", total=True),
        "Served samples": _lines(rows, events, {"served_share": "share of all"}),
        "Checkpoints": _lines(
            rows,
            events,
            {
                "checkpoint/blocked_s": "training stood still, s",
                "checkpoint/waited_s": "of it for the save before, s",
            },
        ),
        "Memory": _lines(rows, events, {"memory_gib": "GiB of a rank, at most"}),
        "What the GPUs' drivers say": _group(rows, events, "gpu/"),
        "Progress and faults in time": _timeline(rows, events),
    }
    return {title: figure for title, figure in drawn.items() if figure is not None}


def fidelity_curve(points: Sequence[Mapping[str, float]], networks: str) -> bytes:
    """A page of its own with `fidelity_chart`."""
    chart, figure = fidelity_chart(points), _figure()
    for name, line in chart.lines.items():
        figure.add_scatter(
            x=[point.x for point in line],
            y=[point.y for point in line],
            text=[point.label or f"{chart.across} {point.x:g}" for point in line],
            name=name,
            mode="lines+markers+text" if chart.across != "guidance" else "lines+markers",
            textposition="top center",
        )
    figure.update_layout(hovermode="closest", height=600, title=networks)
    figure.update_xaxes(title=chart.across)
    figure.update_yaxes(title=chart.up)
    page: str = figure.to_html(full_html=True, include_plotlyjs=True)
    return page.encode()


def to_html(figure: go.Figure) -> str:
    """A <div> for a page that has plotly's script already, and the figure's note."""
    drawn: str = plotly.io.to_html(
        figure, full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False}
    )
    return drawn + (f"<p>{html.escape(figure.layout.meta)}</p>" if figure.layout.meta else "")


def script() -> str:
    """plotly's JavaScript, some megabytes: the page needs no network."""
    text: str = plotly.offline.get_plotlyjs()
    return text


def changes_of(event: Record) -> list[tuple[str, str, str]]:
    """(setting, what it was, what it is) of an event that says so; "-" where there is none on a side."""

    def words(each: Record, side: str) -> str:
        return "-" if each.get(side) is None else str(each[side])

    given = event.get("changed")
    listed = [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []
    return [(words(each, "key"), words(each, "was"), words(each, "now")) for each in listed]


Curve = tuple[list[int], list[float | None]]
"""Samples seen, and values; None where the line is broken."""


def column(rows: Iterable[Record], name: str) -> Curve:
    """(samples seen, values) of one column where it has a finite value; None where training went back."""
    xs: list[int] = []
    ys: list[float | None] = []
    for row in rows:
        value = row.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue  # absent, or "nan" and "inf", which the records hold as texts
        if xs and row["samples_seen"] <= xs[-1]:
            xs.append(xs[-1])
            ys.append(None)
        xs.append(row["samples_seen"])
        ys.append(float(value))
    return xs, ys


def thinned(xs: Sequence[int], ys: Sequence[float | None]) -> Curve:
    """A curve to draw: points at equal distances within each stretch, both its ends, and every break."""
    stride = max(1, -(-len(xs) // MOST_POINTS))
    kept: list[int] = []
    place = 0  # in the stretch
    for at, y in enumerate(ys):
        ends = at + 1 == len(ys) or ys[at + 1] is None
        if y is None or ends or place % stride == 0:
            kept.append(at)
        place = 0 if y is None else place + 1
    return [xs[at] for at in kept], [ys[at] for at in kept]


def _curve(rows: Iterable[Record], name: str) -> Curve:
    return thinned(*column(rows, name))


def running_median(values: Sequence[float | None], width: int) -> list[float | None]:
    """Median of the last `width` values at each place, from the last break on."""
    medians: list[float | None] = []
    window: list[float] = []
    for value in values:
        if value is None:
            window = []
            medians.append(None)
            continue
        window = [*window[-width + 1 :], value]
        medians.append(statistics.median(window))
    return medians


def _loss(rows: Sequence[Record], events: Sequence[Record]) -> go.Figure | None:
    names = [n for n in _names(rows) if n == "loss" or n.startswith("loss/") or n in ("error", "psnr")]
    if not names:
        return None
    figure = _figure()
    for name in names:
        whole = column(rows, name)
        xs, ys = thinned(*whole)
        thin = {"width": 1} if name == "loss" else {"width": 1.5}
        figure.add_scatter(x=xs, y=ys, name=name, mode="lines", line=thin, opacity=0.45)
        if name == "loss":
            xs, ys = thinned(whole[0], running_median(whole[1], SMOOTHED))
            figure.add_scatter(x=xs, y=ys, name=f"median of {SMOOTHED}", mode="lines", line={"width": 2.5})
    buttons = [
        {"label": kind, "method": "relayout", "args": [{"yaxis.type": kind}]} for kind in ("linear", "log")
    ]
    figure.update_layout(
        updatemenus=[{"type": "buttons", "direction": "right", "buttons": buttons, "x": 1, "y": 1.18}]
    )
    return _with_events(figure, events)


def _validation(rows: Sequence[Record], events: Sequence[Record]) -> dict[str, go.Figure | None]:
    """Each figure of the averages beside that of the trained weights, with its standard errors if it has any;
    then the loss by noise level."""
    names = [name for name in _names(rows) if name.startswith(VALIDATION) and not _OF_NONE.search(name)]
    bins = [name for name in names if name.startswith(f"{VALIDATION}bin_")]
    kinds = dict.fromkeys(
        name.removeprefix(VALIDATION).removeprefix("raw_") for name in names if name not in bins
    )
    drawn: dict[str, go.Figure | None] = {}
    for kind in kinds:
        pair = [name for name in (f"{VALIDATION}{kind}", f"{VALIDATION}raw_{kind}") if name in names]
        figure = _with_errors(rows, events, pair)
        by_features = kind in RECONSTRUCTION_DISTANCES.values()
        drawn[f"Validation: {kind}"] = _measured(figure, rows, pair[0]) if by_features else figure
    if bins:
        by_place = sorted(bins, key=lambda name: int(name.rpartition("_")[2]))
        drawn["Validation by noise level, from little to much"] = _with_errors(rows, events, by_place)
    return drawn


def _measured(figure: go.Figure | None, rows: Sequence[Record], prefix: str) -> go.Figure | None:
    """With a note of the networks by which figures of names that begin so are measured, as rows tell."""
    told = dict.fromkeys(
        f"{name}, weights {digest[:16]}, {sees}"
        for row in rows
        if any(key.startswith(prefix) for key in row)
        for name, digest, sees in row.get(MEASURED_BY, {}).get("networks", {}).values()
    )
    if figure is not None and told:
        figure.update_layout(meta=f"measured by {'; '.join(told)}")
    return figure


def _with_errors(rows: Sequence[Record], events: Sequence[Record], names: Sequence[str]) -> go.Figure:
    figure = _figure()
    for name in names:
        xs, ys = _curve(rows, name)
        _, errors = _curve([row for row in rows if name in row], f"{name}_stderr")
        error = {"type": "data", "array": errors, "thickness": 1} if len(errors) == len(ys) else None
        figure.add_scatter(
            x=xs, y=ys, name=name.removeprefix(VALIDATION), mode="lines+markers", error_y=error
        )
    return _with_events(figure, events)


def _group(
    rows: Sequence[Record], events: Sequence[Record], prefix: str, suffix: str = "", *, total: bool = False
) -> go.Figure | None:
    """Columns whose names begin and end so, named by what stands between."""
    names = [name for name in _names(rows) if name.startswith(prefix) and name.endswith(suffix)]
    if not names:
        return None
    figure = _figure()
    for name in names:
        xs, ys = _curve(rows, name)
        mode = "lines" if total or len(xs) > 40 else "lines+markers"
        figure.add_scatter(x=xs, y=ys, name=name.removeprefix(prefix).removesuffix(suffix), mode=mode)
    return _with_events(figure, events)


def _lines(
    rows: Sequence[Record], events: Sequence[Record], titles: dict[str, str], *, rows_apart: bool = False
) -> go.Figure | None:
    curves = {title: _curve(rows, name) for name, title in titles.items()}
    curves = {title: curve for title, curve in curves.items() if curve[0]}
    if not curves:
        return None
    if rows_apart:
        figure = make_subplots(len(curves), 1, shared_xaxes=True, vertical_spacing=0.08)
        _style(figure)
    else:
        figure = _figure()
    for place, (title, (xs, ys)) in enumerate(curves.items(), 1):
        at = {"row": place, "col": 1} if rows_apart else {}
        figure.add_scatter(x=xs, y=ys, name=title, mode="lines", **at)
        if rows_apart and place < len(curves):
            figure.update_xaxes(title=None, row=place, col=1)
    return _with_events(figure, events)


def _step_split(rows: Sequence[Record], events: Sequence[Record]) -> go.Figure | None:
    names = [name for name in _names(rows) if name.startswith("time/")]
    if not names:
        return None
    figure = _figure()
    for name in names:
        xs, ys = _curve(rows, name)
        title = name.removeprefix("time/").removesuffix("_s")
        figure.add_scatter(x=xs, y=ys, name=title, mode="lines", stackgroup="step", line={"width": 0.5})
    xs, ys = _curve(rows, "step_s")
    figure.add_scatter(x=xs, y=ys, name="whole step", mode="lines", line={"color": "#222", "width": 1})
    figure.update_yaxes(title="seconds")
    return _with_events(figure, events)


def _timeline(rows: Sequence[Record], events: Sequence[Record]) -> go.Figure | None:
    timed = [row for row in rows if "time" in row]
    if not timed:
        return None
    figure = _figure()
    figure.add_scatter(
        x=[_date(row["time"]) for row in timed], y=[row["step"] for row in timed], name="step", mode="lines"
    )
    for kind in dict.fromkeys(event["event"] for event in events):
        own = [event for event in events if event["event"] == kind]
        figure.add_scatter(
            x=[_date(_when(event, timed)) for event in own],
            y=[event["step"] for event in own],
            text=[_told(event) for event in own],
            name=kind,
            mode="markers",
            marker={"size": 11, "symbol": "x", "color": EVENT_COLOURS.get(kind, "#1f77b4")},
        )
    figure.update_layout(legend_y=-0.3)  # below the date, which is a line more under the axis
    figure.update_xaxes(title="time (UTC)")
    figure.update_yaxes(title="optimizer steps")
    return figure


def _when(event: Record, timed: Sequence[Record]) -> float:
    """Its own time; of events without one, that of the record before."""
    if "time" in event:
        return float(event["time"])
    before = [row for row in timed if row["step"] <= event["step"]]
    return float((before or timed)[-1 if before else 0]["time"])


def _with_events(figure: go.Figure, events: Sequence[Record]) -> go.Figure:
    for event in events:
        colour = EVENT_COLOURS.get(event["event"], "#1f77b4")
        figure.add_vline(x=event["samples_seen"], line={"color": colour, "width": 1, "dash": "dot"})
    return figure


def _told(event: Record) -> str:
    changed = changes_of(event)
    known = ("step", "samples_seen", "time", "event", "skipped", *(["changed"] if changed else []))
    details = [f"{name}: {value}" for name, value in event.items() if name not in known]
    details += [f"{key}: {was} -> {now}" for key, was, now in changed[:MOST_TOLD]]
    if len(changed) > MOST_TOLD:
        details.append(f"and {len(changed) - MOST_TOLD} more")
    return ", ".join((f"step {event['step']}", *details))


def _names(rows: Sequence[Record]) -> list[str]:
    return sorted({name for row in rows for name in row})


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _figure() -> go.Figure:
    figure = go.Figure()
    _style(figure)
    return figure


def _style(figure: go.Figure) -> None:
    figure.update_layout(
        template="plotly_white",
        height=380,
        margin={"l": 60, "r": 20, "t": 40, "b": 40},
        legend={"orientation": "h", "y": -0.18},
        hovermode="x unified",
        showlegend=True,  # one curve has a name, too
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    figure.update_xaxes(title="samples seen")
