"""A W&B workspace as code: the panels of `docs/monitoring.md`. Sole importer of wandb_workspaces."""

from __future__ import annotations

from dataclasses import dataclass

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from data_pipeline.errors import UserError

X = "samples_seen"
PICTURES = "preview"
OPEN = ("Learning", "Speed")


@dataclass(frozen=True)
class Curves:
    """One panel: columns of the records by name, or all those that a pattern fits."""

    title: str
    names: tuple[str, ...] = ()
    pattern: str = ""
    smoothed: bool = False


SECTIONS: dict[str, tuple[Curves, ...]] = {
    "Learning": (
        Curves("loss", ("loss",), smoothed=True),
        Curves("validation loss: averages and trained weights", ("validation/loss", "validation/raw_loss")),
        Curves("validation loss by noise level", pattern="^validation/bin_[0-9]+$"),
        Curves("loss by noise level", pattern="^loss/.*", smoothed=True),
        Curves("first stage on held-out pictures", pattern="^validation/(psnr|ssim|psim|codebook_.*)$"),
        Curves("fidelity, from the evaluator beside the run", pattern="^eval/.*"),
    ),
    "Optimizer": (
        Curves("learning rate", ("learning_rate",)),
        Curves("gradient norm", ("grad_norm",)),
        Curves("norm of the weights, by block", pattern="^layers/.*/weight$"),
        Curves("norm of the mean gradient, by block", pattern="^layers/.*/gradient$"),
    ),
    "Speed": (
        Curves("images per second", ("images_per_s",)),
        Curves("share of a step spent waiting for data", ("data_wait",)),
        Curves("where a step's time goes, in seconds", pattern="^time/.*_s$"),
    ),
    "Data": (
        Curves("rejected samples by reason", pattern="^rejected/.*"),
        Curves("share of samples served", ("served_share",)),
    ),
    "Machines": (
        Curves("slow ranks", ("slow_ranks",)),
        Curves("most of any rank, and how long the quickest waits, in seconds", pattern="^ranks/.*_s_most$"),
        Curves("what the GPUs' drivers say", pattern="^gpu/.*"),
        Curves("memory of a rank, GiB", ("memory_gib",)),
        Curves("seconds that a save stood in the way", pattern="^checkpoint/(blocked|waited)_s$"),
    ),
}


def workspace(place: str) -> ws.Workspace:
    """The workspace of `ENTITY/PROJECT`, checked against W&B's schema; nothing is sent.

    Raises:
        UserError: the place is not written so.
    """
    entity, slash, project = place.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise UserError(f"--workspace {place!r} is no place in W&B; write ENTITY/PROJECT.")
    sections = [
        ws.Section(name=name, is_open=name in OPEN, panels=[_panel(each) for each in curves])
        for name, curves in SECTIONS.items()
    ]
    pictures = [wr.MediaBrowser(title="previews", media_keys=[PICTURES], num_columns=1)]
    made = ws.Workspace(
        entity=entity,
        project=project,
        name="Latent diffusion",
        sections=[*sections, ws.Section(name="Pictures", is_open=True, panels=pictures)],
    )
    made._to_model()  # raises where a panel is not W&B's
    return made


def as_json(made: ws.Workspace) -> str:
    """What would be sent, for people and for tests."""
    text: str = made._to_model().model_dump_json(by_alias=True, indent=1)
    return text


def _panel(curves: Curves) -> wr.LinePlot:
    smoothing = {"smoothing_type": "average", "smoothing_factor": 25, "smoothing_show_original": True}
    return wr.LinePlot(
        title=curves.title,
        x=X,
        y=list(curves.names),
        metric_regex=curves.pattern or None,
        **(smoothing if curves.smoothed else {}),
    )
