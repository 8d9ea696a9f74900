"""The manifest: the file whose presence makes a checkpoint count."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.storage.large import checksum_bytes
from trainer.checkpoint.layout import ShardPlan, Table, tables_from_json, tables_to_json
from trainer.config.checks_validation import TRAINING_LOSS

FORMAT = 1
MANIFEST_NAME = "manifest.json"


class BadManifest(ValueError):
    """The manifest is torn, changed, or of a format this version does not read."""


@dataclass(frozen=True)
class StoredFile:
    """One file of a checkpoint, as written."""

    name: str
    size: int
    """Bytes."""
    checksum: str
    """XXH3-128 of the content, hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """Everything needed to find an element in a checkpoint, and to know that it is intact."""

    step: int
    shards: tuple[StoredFile, ...]
    """One per rank that wrote."""
    state: StoredFile
    """JSON: progress, configuration, versions."""
    tensors: StoredFile
    """safetensors: small tensors beside the weights."""
    tables: tuple[dict[str, Table], ...]
    """What each shard holds, by engine."""
    kinds: dict[str, tuple[str, ...]]
    """Flat tensors of each engine, the same in all shards."""
    shapes: dict[str, dict[str, tuple[int, ...]]]
    """Whole shape of every parameter, by engine."""
    loss: float | None
    """Recent training loss; None where it is not known."""
    best_metric: str = TRAINING_LOSS
    """What the best are kept by: the training loss, or one of `metrics`."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What was measured on held-out samples at this very step; empty where nothing was."""

    def value(self, metric: str) -> float | None:
        """What the checkpoint has of a metric by which the best are kept; None where it is not known."""
        value = self.loss if metric == TRAINING_LOSS else self.metrics.get(metric)
        return value if value is not None and math.isfinite(value) else None

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """All files but the manifest itself."""
        return (*self.shards, self.state, self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files but the manifest itself."""
        return sum(file.size for file in self.files)

    def plan(self, shard: int) -> ShardPlan:
        """Layout of one shard file."""
        return ShardPlan(self.tables[shard], self.kinds)

    def to_bytes(self, tables: bytes | None = None) -> bytes:
        """JSON with a checksum over itself.

        tables: those of all ranks, which `self` then lacks, as `tables_text` has each, in a JSON list. Under
            ZeRO-3 on hundreds of ranks they are nearly all of the manifest, and are copied as they are.
        """
        if tables is None:
            tables = _canonical([tables_to_json(of_rank) for of_rank in self.tables])
        body = {
            "format": FORMAT,
            "step": self.step,
            "shards": [vars(file) for file in self.shards],
            "state": vars(self.state),
            "tensors": vars(self.tensors),
            "kinds": self.kinds,
            "shapes": self.shapes,
            # JSON has no NaN and no infinity.
            "loss": self.loss if self.loss is not None and math.isfinite(self.loss) else None,
            "best_metric": self.best_metric,
            "metrics": {name: value for name, value in self.metrics.items() if math.isfinite(value)},
        }
        # Without sorting: engines lie in a shard in the order of `kinds`.
        text = json.dumps({"checksum": _checksum(body, tables), **body}, separators=(",", ":")).encode()
        return b'%s,"tables":%s}' % (text[:-1], tables)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises BadManifest."""
        try:
            body: dict[str, Any] = json.loads(data)
            checksum, tables = body.pop("checksum"), body.pop("tables")
        except (ValueError, KeyError, AttributeError) as error:
            raise BadManifest("the manifest is torn") from error
        if checksum != _checksum(body, _canonical(tables)):
            raise BadManifest("the manifest does not match its checksum")
        if body["format"] != FORMAT:
            raise BadManifest(f"the manifest has format {body['format']}, this version reads {FORMAT}")
        return cls(
            step=body["step"],
            shards=tuple(StoredFile(**file) for file in body["shards"]),
            state=StoredFile(**body["state"]),
            tensors=StoredFile(**body["tensors"]),
            tables=tuple(tables_from_json(of_rank) for of_rank in tables),
            kinds={engine: tuple(kinds) for engine, kinds in body["kinds"].items()},
            shapes={
                engine: {name: tuple(shape) for name, shape in shapes.items()}
                for engine, shapes in body["shapes"].items()
            },
            loss=body.get("loss"),  # manifests of earlier versions do not have it, nor what follows
            best_metric=body.get("best_metric", TRAINING_LOSS),
            metrics=body.get("metrics", {}),
        )


def tables_text(tables: dict[str, Table]) -> bytes:
    """One rank's tables as they are in a manifest."""
    return _canonical(tables_to_json(tables))


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _checksum(body: dict[str, Any], tables: bytes) -> str:
    """Of the canonical JSON of body and tables together."""
    texts = {key: _canonical(value) for key, value in body.items()} | {"tables": tables}
    fields = (b'"%s":%s' % (key.encode(), text) for key, text in sorted(texts.items()))
    return checksum_bytes(b"{%s}" % b",".join(fields))
