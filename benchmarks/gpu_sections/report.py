"""The table with its goals, and device time by kind of kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Figures = dict[str, dict[str, Any]]


SHOWN = ("images_per_s", "step_s", "data_wait", "ms", "encode_ms", "unet_ms", "optimizer_ms", "peak_gib")
"""Figures of a whole step that are printed below the table."""


@dataclass(frozen=True)
class Row:
    """One measure: what it was at 48f7b48 on one H100, what is wanted, how it is read from the figures."""

    name: str
    before: float | None
    goal: float
    at_most: bool
    read: Callable[[Figures], float]


def _ratio(section: str, ours: str, theirs: str) -> Callable[[Figures], float]:
    """How many times as fast as theirs; theirs may be `a|b`: the quicker of those that are there."""

    def read(figures: Figures) -> float:
        arms = figures[section]
        least = min(arms[name]["ms"] for name in theirs.split("|") if name in arms)
        return float(least / arms[ours]["ms"])

    return read


ROWS = (
    Row("train 512 px, img/s", 57, 140, False, lambda f: f["train512"]["images_per_s"]),
    Row("train 256 px, img/s", 214, 600, False, lambda f: f["train256"]["images_per_s"]),
    Row(
        "UNet fwd+bwd 512 px batch 32, img/s",
        113,
        200,
        False,
        lambda f: f["unet"]["batch_32"]["images_per_s"],
    ),
    Row(
        "the same, compiled blocks, img/s",
        None,
        200,
        False,
        lambda f: f["unet_compile"]["batch_32"]["images_per_s"],
    ),
    Row(
        "against diffusers eager, batch 16, x",
        1.04,
        1.7,
        False,
        lambda f: f["diffusers"]["batch_16"]["diffusers"]["ms"] / f["diffusers"]["batch_16"]["ours"]["ms"],
    ),
    Row(
        "ours by CUDA graphs, batch 16, x",
        None,
        1.7,
        False,
        lambda f: f["diffusers"]["batch_16"]["diffusers"]["ms"] / f["diffusers"]["batch_16"]["graphs"]["ms"],
    ),
    Row(
        "against diffusers compiled, batch 16, x",
        None,
        1.2,
        False,
        _ratio("diffusers_compile", "ours", "regional|whole"),
    ),
    Row("rate at batch 2 / batch 32", None, 0.55, False, lambda f: f["unet"]["small_batch_ratio"]),
    Row(
        "the same, CUDA graphs at batch 2",
        None,
        0.55,
        False,
        lambda f: f["unet_graphs"]["batch_2"]["images_per_s"] / f["unet"]["batch_32"]["images_per_s"],
    ),
    Row("VAE encoder 512 px, img/s", 171, 450, False, lambda f: f["vae"]["batch_16"]["images_per_s"]),
    Row("text and random numbers of 32, ms", 55, 6, True, lambda f: f["text"]["both"]["ms"]),
    Row("sampling against diffusers, batch 8, x", None, 1.5, False, _ratio("sampling", "ours", "diffusers")),
    Row("the same, CUDA graphs, x", None, 1.5, False, _ratio("sampling", "graphs", "diffusers")),
    Row("first step after process start, s", 75, 30, True, lambda f: f["startup"]["first_step_s"]),
    Row("no kernel on disk, s", None, 30, True, lambda f: f["startup"]["cold_first_step_s"]),
    Row("compiled, cold caches, s", None, 60, True, lambda f: f["startup_compiled"]["cold_first_step_s"]),
    Row("compiled, warm caches, s", None, 30, True, lambda f: f["startup_compiled"]["first_step_s"]),
    Row("blocked by the first save, s", 8.2, 0.3, True, lambda f: f["train512"]["first_save_blocked_s"]),
    Row("memory, micro 32, 512 px, GiB", 49.7, 45, True, lambda f: f["train512"]["memory_gib"]),
)


def table(figures: Figures, results: dict[str, Any]) -> dict[str, Any]:
    """{"rows": {name: figure or None}, "lines": the printed table}"""
    about = results["about"]
    cudnn = figures.get("prepare", {}).get("cudnn")
    head = f"{about['card']}, torch {about['torch']}, cuDNN {cudnn}, driver {about['driver']}"
    lines = [f"{head}, commit {str(about['commit'])[:10]}", ""]
    lines.append(f"{'measure':42} {'48f7b48':>8} {'goal':>9} {'now':>9}")
    rows: dict[str, float | None] = {}
    for row in ROWS:
        now = _read(row, figures)
        rows[row.name] = now
        before = "-" if row.before is None else f"{row.before:g}"
        goal = f"{'<=' if row.at_most else '>='} {row.goal:g}"
        met = now is not None and (now <= row.goal if row.at_most else now >= row.goal)
        shown = "-" if now is None else f"{now:.4g}"
        lines.append(f"{row.name:42} {before:>8} {goal:>9} {shown:>9} {'met' if met else ''}".rstrip())
    lines += ["", *_sections(results["sections"]), *_phases(figures)]
    return {"rows": rows, "lines": lines}


def _read(row: Row, figures: Figures) -> float | None:
    """The row's figure, None where its section did not come so far."""
    try:
        return float(row.read(figures))
    except (KeyError, TypeError, ValueError):
        return None


def _sections(sections: dict[str, Any]) -> list[str]:
    """What ran, and how it ended."""
    return [f"{name}: {r['status']} ({r.get('seconds', 0):.0f} s)" for name, r in sections.items()]


def _phases(figures: Figures) -> list[str]:
    """Where the step's time goes, for each run that says so."""
    lines = [""]
    for name in ("unet", "unet_compile", "unet_graphs", "vae"):
        found = figures.get(name, {})
        shown = {k: v["images_per_s"] for k, v in found.items() if "images_per_s" in str(v) and "batch" in k}
        if shown:
            lines.append(f"{name}, img/s: " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items()))
    lines += _side_by_side(figures)
    for name, found in figures.items():
        if not name.startswith(("train", "step")):
            continue
        shown = {k.removeprefix("time/"): v for k, v in found.items() if k.startswith("time/") or k in SHOWN}
        if shown:
            lines.append(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items()))
    return lines


def _side_by_side(figures: Figures) -> list[str]:
    """Milliseconds of each form of what can be laid out in several ways."""
    lines = []
    for name in ("kernel_layout", "pixel_layout", "save_copy"):
        found = figures.get(name, {})
        arms = {key: value for key, value in found.items() if "ms" in str(value) and "kernels" not in key}
        for key, value in arms.items():
            forms = {key: value} if "ms" in value else value
            lines.append(f"{name}, ms: {key}: " + ", ".join(f"{k} {v['ms']:.4g}" for k, v in forms.items()))
    return lines


def kernel_tables(figures: Figures) -> str:
    """Per section: milliseconds, share and launches of one call by kind, then its dearest kernels."""
    parts = []
    for name, found in figures.items():
        profile = found.get("kernels")
        if not profile:
            continue
        total = profile["total_ms"]
        parts.append(f"{name}: {total:.2f} ms of kernels, {profile['launches']} launches of one call")
        for kind, row in profile["kinds"].items():
            share = row["ms"] / total if total else 0.0
            parts.append(f"  {kind:26} {row['ms']:9.2f} ms {share:7.1%} {row['launches']:7d}")
        calls = ", ".join(f"{call} {count}" for call, count in profile["host_calls"].items())
        parts += [f"  host: {calls or '-'}", "  dearest:"]
        parts += [f"    {r['ms']:8.3f} ms {r['count']:5d} [{r['kind']}] {r['name']}" for r in profile["top"]]
        parts.append("")
    return "\n".join(parts)
