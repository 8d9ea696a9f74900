"""What the data pipeline reads and how. Torch-free, frozen, one docstring per field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SourceConfig:
    """One set of shards in a weighted mixture."""

    shards: str
    """URL with braces or wildcards, e.g. s3://laion/{00000..18699}.tar or /data/*.tar."""
    repeat: int = 1
    """How often an epoch contains each of its samples."""


@dataclass(frozen=True)
class DataConfig:
    """Shards, order, filters, pictures and captions."""

    shards: str = ""
    """URL of the shards, with braces or wildcards; exactly one of shards and sources is set."""
    sources: tuple[SourceConfig, ...] = ()
    """A mixture of several shard sets; exactly one of shards and sources is set."""
    index: str | None = None
    """URL of the folder that holds the index; unset: `_index` beside the shards."""
    order: Literal["indexed", "resampled"] = "indexed"
    """indexed: exact order and resume; resampled: plain webdataset streaming, resume is approximate."""
    lanes: int = 0
    """Independent walks over the shards; ranks x workers must divide it. 0: derived from the global batch."""
    shuffle_window: int = 0
    """Samples of one lane that are shuffled together; 1: shard order; 0: derived (about 1 GB in all)."""
    filter: str = ""
    """Rows to keep, e.g. punsafe < 0.1 and min(width, height) >= 512; empty: all."""
    removal_lists: tuple[str, ...] = ()
    """URLs of files with keys, image URLs or sha256 hashes (one per line) never to be served."""
    image_size: int = 256
    """Edge length of the square crop, in pixels."""
    crop: Literal["random", "center"] = "center"
    """Crop after resizing the shorter side to image_size."""
    horizontal_flip: bool = False
    """Flip half of the samples (never with text about left and right)."""
    buckets: bool = False
    """Aspect-ratio buckets of about image_size ** 2 pixels instead of square crops."""
    bucket_step: int = 64
    """Bucket edges are multiples of this."""
    bucket_max_aspect: float = 2.0
    """Largest ratio of longer to shorter edge of a bucket."""
    captions: tuple[str, ...] = ("txt",)
    """Where captions come from: txt, or columns of the json (a list there means several captions)."""
    require_caption: bool = True
    """Reject samples without a caption; otherwise they get the empty caption."""
    conditions: tuple[str, ...] = ()
    """Extra fields of each sample: class_label, layout, semantic_map, depth."""
    max_layout_boxes: int = 30
    """Boxes kept per image, largest first (layout)."""
    max_image_pixels: int = 64_000_000
    """Larger pictures are rejected before decoding (decompression bombs)."""
    max_member_bytes: int = 64_000_000
    """Larger tar members are rejected before reading."""
    workers: int = 2
    """Loader processes per rank; 0: in the training process."""
    prefetch: int = 4
    """Batches that each worker prepares ahead."""
    read_ahead_bytes: int = 8_000_000
    """Most bytes asked for in one range request."""
    buffer_bytes: int = 256_000_000
    """Bytes that each worker may have read or requested ahead of decoding."""
    reject_file: str | None = None
    """Local path (`{rank}` is filled in) where every rejected sample is appended as a JSON line."""
    request_timeout_s: float = 30.0
    """Per-request timeout, also for a body that stops arriving."""
    max_retries: int = 8
    """Tries of one read, with exponential backoff and jitter, before its shard is set aside."""
    patience_s: float = 600.0
    """How long storage may be unreachable before the run saves and stops."""
    cache_dir: str | None = None
    """Local folder that keeps shards already read; unset: no cache."""
    cache_bytes: int = 0
    """Size bound of the cache."""
