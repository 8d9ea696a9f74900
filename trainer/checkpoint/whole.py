"""Weights whole in memory, from a run folder, a checkpoint or an exported file."""

from __future__ import annotations

from torch import Tensor

from trainer.checkpoint.commands import find_checkpoint
from trainer.checkpoint.export import choose_kind, export_metadata, read_small_tensors, read_state
from trainer.checkpoint.reader import EngineReader
from trainer.weights import read_weights


def open_weights(
    source: str, *, profile: str | None = None, step: int | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The averaged network's tensors (CPU, fp32) and metadata, as `ldm export` would write them.

    Args:
        source: run folder, checkpoint folder or .safetensors file; any URL.
        profile: average to take, or "weights"; unset: the average where there is one.
        step: which checkpoint of a run folder; unset: the newest.

    Raises:
        ConfigError: there is nothing there.
    """
    if source.endswith(".safetensors"):
        return read_weights(source)
    handle = find_checkpoint(source, step)
    state = read_state(handle)
    engine = str(state["averaged"])
    profile, kind = choose_kind(handle, engine, profile)
    tensors = EngineReader(handle, engine).whole(kind, list(handle.manifest.shapes[engine]))
    return {**tensors, **read_small_tensors(handle)}, export_metadata(handle, state, profile)
