"""The sources of a configuration: how much of the batches each is, and how its samples are read.

By `repeat` an epoch contains each sample of a source so often, and all sources are one order. By `weight`
each source has an order and epochs of its own, and rows are taken from these in turn (`order/mixture.py`).
"""

from __future__ import annotations

from data_pipeline.config import DataConfig, SourceConfig, of_source
from data_pipeline.errors import DataError
from data_pipeline.order.lanes import MAX_SOURCES

CAN_BE_LEFT_OUT = ("class_label", "layout")
"""Conditions that have a value for `none`."""


def shares_of(config: DataConfig) -> tuple[float, ...]:
    """How much of the served samples is of each source; () where they have no weights."""
    weights = [source.weight for source in sources_of(config) if source.weight is not None]
    return tuple(weight / sum(weights) for weight in weights)


def configs_of(config: DataConfig) -> tuple[DataConfig, ...]:
    """How the samples of each source are read."""
    return tuple(of_source(config, source) for source in sources_of(config))


def sources_of(config: DataConfig) -> tuple[SourceConfig, ...]:
    """The sources of a configuration.

    Raises DataError unless exactly one of the two fields is set, and for sources that contradict themselves.
    """
    if bool(config.shards) == bool(config.sources):
        raise DataError(
            "Set exactly one of data.shards and data.sources, e.g. data.shards=s3://bucket/{00000..00099}.tar"
        )
    sources = config.sources or (SourceConfig(config.shards),)
    weighted = [source for source in sources if source.weight is not None]
    for source in sources:
        if source.repeat < 1:
            raise DataError(f"repeat of {source.shards} is {source.repeat}; it must be at least 1.")
        if weighted and source.weight is None:
            raise DataError(
                f"data.sources: {source.shards} has no weight and {weighted[0].shards} has one; give each a "
                "weight, or none."
            )
        if weighted and source.repeat != 1:
            raise DataError(
                f"data.sources: {source.shards} has a weight and repeat={source.repeat}; a weight alone says "
                "how much of the batches it is."
            )
        _check_own(config, source)
    if len(weighted) > MAX_SOURCES:
        raise DataError(
            f"data.sources names {len(weighted)} sources with weights; {MAX_SOURCES} are possible, so join "
            "those that are read alike by braces."
        )
    return tuple(sources)


def _check_own(config: DataConfig, source: SourceConfig) -> None:
    """Raises DataError for settings of a source that its samples cannot be read by."""
    own = of_source(config, source)
    if own.caption_weights and len(own.caption_weights) != len(own.captions):
        raise DataError(
            f"data.sources: caption_weights={list(own.caption_weights)} of {source.shards} must be one "
            f"number for each of captions={list(own.captions)}, or empty."
        )
    for name in own.conditions:
        if name not in config.conditions:
            raise DataError(
                f"data.sources: {source.shards} has the condition {name}, which the model does not read "
                f"({', '.join(config.conditions) or 'none'}); remove it."
            )
    for name in config.conditions:
        if name not in (*own.conditions, *CAN_BE_LEFT_OUT):
            raise DataError(
                f"data.sources: {source.shards} leaves out {name}, and there is no {name} that says there is "
                f"none ({' and '.join(CAN_BE_LEFT_OUT)} have one); name it, or leave the source out."
            )
