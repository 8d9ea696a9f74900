"""What the data pipeline reads and how. Torch-free, frozen, one docstring per field."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

T = TypeVar("T")

CONDITIONS = ("class_label", "layout", "semantic_map", "depth")
"""Fields that shards may carry beside picture and caption; a condition of the model bears the same name."""

RANGE = "range"
"""Key of a field's metadata under which its `Range` lies."""


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have; NaN lies in none."""

    low: float
    high: float
    low_allowed: bool
    high_allowed: bool

    def __contains__(self, value: float) -> bool:
        above = self.low <= value if self.low_allowed else self.low < value
        return above and (value <= self.high if self.high_allowed else value < self.high)

    def __str__(self) -> str:
        low = f"{'at least' if self.low_allowed else 'above'} {self.low:.12g}"
        return f"{low} and {'at most' if self.high_allowed else 'below'} {self.high:.12g}"


def number(
    default: T,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> T:
    """A field whose numbers (those of a tuple one by one, null never) lie in a range, open or closed."""
    assert (least is None) != (above is None), "one lower limit"
    assert (most is None) != (below is None), "one upper limit"
    low, high = (least if above is None else above), (most if below is None else below)
    assert low is not None
    assert high is not None
    allowed = Range(low, high, low_allowed=above is None, high_allowed=below is None)
    return field(default=default, metadata={RANGE: allowed})


@dataclass(frozen=True)
class SourceConfig:
    """One set of shards of a mixture, with what is its own; what is null is as in `data`."""

    shards: str
    """URL with braces or wildcards, e.g. s3://laion/{00000..18699}.tar or /data/*.tar."""
    repeat: int = number(1, least=1, most=10**6)
    """How often an epoch contains each of its samples."""
    weight: float | None = number(None, above=0, most=10**6)
    """Share of the served samples, in any unit; of all sources or of none. Each source then has epochs of its
    own, and repeat stays 1."""
    filter: str | None = None
    """Rows to keep."""
    captions: tuple[str, ...] | None = None
    """Where captions come from; with captions of its own, data.caption_weights does not apply."""
    caption_weights: tuple[float, ...] | None = number(None, above=0, most=10**6)
    """How often the caption is of each of its captions."""
    crop: Literal["random", "center"] | None = None
    """Crop after resizing the shorter side."""
    horizontal_flip: bool | None = None
    """Flip half of the samples."""
    conditions: tuple[str, ...] | None = None
    """Those of data.conditions that its samples have; the others are left out as if they were dropped."""


@dataclass(frozen=True)
class HeldOutConfig:
    """Samples that training never sees, to measure it on; at most one of shards and share is set."""

    shards: str = ""
    """URL of shards of their own, with braces or wildcards; none of them may be a training shard."""
    share: float = number(0.0, least=0, most=0.5)
    """Share of the training shards' samples that is held out, chosen by a hash of their keys."""
    filter: str | None = None
    """Rows to measure on; unset: those of data.filter."""


@dataclass(frozen=True)
class DataConfig:
    """Shards, order, filters, pictures and captions."""

    shards: str = ""
    """URL of the shards, with braces or wildcards; exactly one of shards and sources is set."""
    sources: tuple[SourceConfig, ...] = ()
    """A mixture of several shard sets, by weight or by repeat; exactly one of shards and sources is set."""
    index: str | None = None
    """URL of the folder that holds the index; unset: `_index` beside the shards."""
    max_bad_shards: float = number(0.01, least=0, most=1)
    """Share of a source's shards that may be no tar archives, named and left out; more end the run."""
    order: Literal["indexed", "streamed", "resampled"] = "indexed"
    """indexed: exact order and resume; more than 2000 shards without an index are streamed. streamed: as
    exact, over whole shards in turn, which need no index. resampled: plain webdataset, approximate resume."""
    lanes: int = number(0, least=0, most=10**9)
    """Independent walks over the shards, each on one rank; they divide the batch. 0: derived from it."""
    shuffle_window: int = number(0, least=0, most=10**9)
    """Samples of one lane that are shuffled together; 1: shard order; 0: derived (about 1 GB in all)."""
    filter: str = ""
    """Rows to keep, e.g. punsafe < 0.1 and min(width, height) >= 512; empty: all."""
    max_rejected_share: float = number(0.5, least=0, most=1)
    """Share of the first 1000 samples that may be rejected, by `filter` too; above it the run ends."""
    removal_lists: tuple[str, ...] = ()
    """URLs of files with keys, image URLs or digests never to be served: text, CSV, JSON lines, Parquet."""
    validation: HeldOutConfig = field(default_factory=HeldOutConfig)
    """Samples that are kept from training; `validation` says how they are measured."""
    image_size: int = number(256, least=1, most=2**16)
    """Edge length of the square crop, in pixels."""
    crop: Literal["random", "center"] = "center"
    """Crop after resizing the shorter side to image_size."""
    allow_enlarging: bool = False
    """Serve pictures whose stored size is smaller than the crop, enlarged; otherwise they are rejected."""
    horizontal_flip: bool = False
    """Flip half of the samples (never with text about left and right)."""
    buckets: bool = False
    """Aspect-ratio buckets of about image_size ** 2 pixels, of accepted samples, instead of square crops."""
    bucket_step: int = number(64, least=1, most=2**16)
    """Bucket edges are multiples of this."""
    bucket_max_aspect: float = number(2.0, least=1, most=100)
    """Largest ratio of longer to shorter edge of a bucket."""
    picture: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
    """Extensions of the member that is the picture, the first that a sample has, e.g. original.jpg."""
    captions: tuple[str, ...] = ("txt",)
    """Where captions come from: members (txt, caption) and columns of the json or of the parquet beside the
    tar (a list there means several captions)."""
    caption_weights: tuple[float, ...] = number((), above=0, most=10**6)
    """How often the caption is of each of `captions`, one number each, among those that a sample has; empty:
    every caption found is as likely as any other."""
    shorten_captions: float = number(0.0, least=0, most=1)
    """Share of captions cut after one of their sentences (of one sentence: of its parts between commas)."""
    require_caption: bool = True
    """Reject samples without a caption; otherwise they get the empty caption."""
    conditions: tuple[str, ...] = ()
    """Extra fields of each sample: class_label, layout, semantic_map, depth. Derived: those that sections of
    `conditioning` need; may be written out, but not otherwise."""
    max_layout_boxes: int = number(30, least=1, most=10_000)
    """Boxes kept per image, largest first. Derived: conditioning.layout.max_boxes."""
    max_image_pixels: int = number(64_000_000, least=1, most=10**12)
    """Larger pictures are rejected before decoding (decompression bombs)."""
    max_member_bytes: int = number(64_000_000, least=1, most=10**13)
    """Larger tar members are rejected before reading."""
    workers: int = number(2, least=0, most=4096)
    """Loader processes per rank; 0: in the training process."""
    prefetch: int = number(4, least=1, most=10**5)
    """Batches that each worker prepares ahead."""
    read_ahead_bytes: int = number(8_000_000, least=1, most=10**12)
    """Most bytes asked for in one range request."""
    buffer_bytes: int = number(256_000_000, least=1, most=10**13)
    """Most bytes that each worker has read or requested ahead of decoding, whatever the number of lanes."""
    reject_file: str | None = None
    """Local path (`{rank}` is filled in) where every rejected sample is appended as a JSON line."""
    request_timeout_s: float = number(30.0, above=0, most=10**6)
    """Per-request timeout, also for a body that stops arriving."""
    max_retries: int = number(8, least=0, most=1000)
    """Tries of one read, with exponential backoff and jitter, before its shard is set aside."""
    patience_s: float = number(600.0, least=0, most=10**7)
    """How long storage may be unreachable before the run saves and stops."""
    cache_dir: str | None = None
    """Local folder that keeps shards already read; unset: no cache."""
    cache_bytes: int = number(0, least=0, most=10**16)
    """Size bound of the cache."""


def of_source(config: DataConfig, source: SourceConfig) -> DataConfig:
    """How the samples of one source are read: as all are, but for what the source has of its own."""
    weights = config.caption_weights if source.captions is None else ()
    return replace(
        config,
        filter=config.filter if source.filter is None else source.filter,
        captions=config.captions if source.captions is None else source.captions,
        caption_weights=weights if source.caption_weights is None else source.caption_weights,
        crop=config.crop if source.crop is None else source.crop,
        horizontal_flip=config.horizontal_flip if source.horizontal_flip is None else source.horizontal_flip,
        conditions=config.conditions if source.conditions is None else source.conditions,
    )
