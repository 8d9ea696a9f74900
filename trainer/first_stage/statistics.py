"""Latent statistics and where they come from: measured, given by another program, or never measured.

Training measures them in its last step only. What is exported before has none, which is said in three
places: a checkpoint's small tensors (`MEASURED_TENSOR`), an exported file's metadata (`MARK`), and
`FirstStage.statistics_measured`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from trainer.config.run import ConfigError
from trainer.first_stage.base import LATENT_BUFFERS, FirstStage

MEASURED_TENSOR = "latent_measured"
"""float32 [1] in a checkpoint of a first stage: 1 where its statistics belong to its weights, else 0."""
IDLE_TENSOR = "codebook_idle"
"""float32 [K] in a checkpoint: optimizer steps since each entry of a codebook was last chosen."""
STATE_TENSORS = (MEASURED_TENSOR, IDLE_TENSOR)
"""Small tensors of a checkpoint that only its run reads."""
MARK = "latent_statistics"
"""Key in the metadata of a first stage's file; absent in files of versions that did not mark them."""
MEASURED = "measured"
GIVEN = "given"
"""Another program's file, or a user, says them."""
UNMEASURED = "not measured"
REMEDY = (
    "train it to its last step, measure them with `ldm export RUN FILE --measure SHARDS`, or set "
    "first_stage.latent_scale (--latent-scale of `ldm sample` and `ldm export`; 1 for what was trained so)"
)


def checkpoint_statistics(module: FirstStage) -> dict[str, Tensor]:
    """Small tensors for a checkpoint: float32 [z] shift and scale where they were measured, and the mark."""
    measured = module.statistics_measured
    tensors = {MEASURED_TENSOR: torch.tensor([float(measured)])}
    if measured:
        tensors |= {name: getattr(module, name).detach().cpu() for name in LATENT_BUFFERS}
    return tensors


def restore_statistics(module: FirstStage, state: Mapping[str, Tensor]) -> None:
    """The inverse of `checkpoint_statistics`; of an unmarked, older checkpoint too."""
    tensors, metadata = exported_statistics(state)
    if metadata[MARK] == MEASURED:
        module.set_latent_statistics(*(tensors[name] for name in LATENT_BUFFERS))
    else:
        module.statistics_measured = False


def exported_statistics(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A first stage's tensors from a checkpoint as a file has them, and the metadata that marks them.

    Statistics that were never measured are left out, so that no reader can take them for values.
    """
    others = {name: value for name, value in tensors.items() if name not in STATE_TENSORS}
    complete = all(name in others for name in LATENT_BUFFERS)
    if MEASURED_TENSOR in tensors:
        measured = complete and bool(tensors[MEASURED_TENSOR].item())
    else:
        measured = complete and not _is_identity(others)
    if measured:
        return others, {MARK: MEASURED}
    return {n: v for n, v in others.items() if n not in LATENT_BUFFERS}, {MARK: UNMEASURED}


def never_measured(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether a first stage's file has no statistics because nobody measured them.

    Unmarked files with a scale of exactly 1 and no shift are our runs' initial values, but for what
    `ldm import` wrote: it describes the structure and names no network, and there 1 is the source's word.
    """
    if MARK in metadata:
        return metadata[MARK] == UNMEASURED
    imported = "first_stage" in metadata and "network" not in metadata
    return not imported and all(name in tensors for name in LATENT_BUFFERS) and _is_identity(tensors)


def require_statistics(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], url: str) -> None:
    """Refuse a first stage's file that does not say how latents are scaled.

    Raises:
        ConfigError: its statistics were never measured, or it has none.
    """
    if never_measured(tensors, metadata):
        raise ConfigError(f"the latent statistics of {url} were never measured; {REMEDY}.")
    if any(name not in tensors for name in LATENT_BUFFERS):
        raise ConfigError(
            f"{url} does not say how latents are scaled; set first_stage.latent_scale "
            "(Stable Diffusion: 0.18215, SDXL: 0.13025, the paper's VQ models: 1)."
        )


def require_same_statistics(first_stage: FirstStage, trained: Mapping[str, Tensor]) -> None:
    """Refuse a first stage of other statistics than a second stage was trained with.

    Args:
        trained: "latent_shift" and "latent_scale" of the second stage's checkpoint; where they are absent,
            nothing is known and nothing refused.

    Raises:
        ConfigError: they differ, so its latents mean something else.
    """
    for name in LATENT_BUFFERS:
        if name not in trained:
            continue
        stored, now = trained[name].float(), getattr(first_stage, name).detach().cpu()
        if now.shape != stored.shape or not torch.allclose(now, stored, rtol=1e-5, atol=0):
            raise ConfigError(
                f"the checkpoint was trained with {name}={stored.flatten().tolist()[:4]} and "
                f"first_stage.weights has {now.flatten().tolist()[:4]}; name the first stage (and "
                "first_stage.latent_scale) that the run began with, or another run_dir."
            )


def measure_latent_statistics(
    first_stage: FirstStage,
    pixels: Iterable[Tensor],
    sum_over_ranks: Callable[[Tensor], Tensor],
    *,
    per_channel: bool,
) -> tuple[Tensor, Tensor]:
    """Shift and scale [z] that give latents unit variance over everything all ranks have seen.

    Moments of the posterior are taken in closed form, so nothing is drawn. Every rank gets the same
    result, whatever its share of the pictures.

    Args:
        first_stage: its present statistics do not matter.
        pixels: this rank's pictures, [B, 3, H, W] each, in -1 .. 1.
        sum_over_ranks: sums a float64 tensor over all ranks (the identity function on one).
        per_channel: mean and std of each channel; otherwise shift 0 and one global std.
    """
    device = first_stage.latent_shift.device
    # Rows: number of elements, sum of z, sum of z**2.
    sums = torch.zeros(3, first_stage.config.channels, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batch in pixels:
            first, second = first_stage.second_moment(first_stage.encode(batch))
            terms = (torch.ones_like(first), first, second)
            sums += torch.stack([x.sum(dim=(0, 2, 3), dtype=torch.float64) for x in terms])
    count, first, second = sum_over_ranks(sums).unbind()
    assert bool((count > 0).all()), "no pictures to measure latent statistics on"
    if not per_channel:
        count, first, second = (x.sum().expand_as(x) for x in (count, first, second))
    mean = first / count
    std = (second / count - mean.square()).clamp(min=1e-12).sqrt()
    shift = mean if per_channel else torch.zeros_like(mean)
    return shift.float(), (1.0 / std).float()


def _is_identity(tensors: Mapping[str, Tensor]) -> bool:
    shift, scale = (tensors[name] for name in LATENT_BUFFERS)
    return not bool(shift.any()) and bool((scale == 1).all())
