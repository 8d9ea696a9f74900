"""The manifest survives the round trip and notices every change."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.storage.large import checksum_bytes
from trainer.checkpoint.layout import Span
from trainer.checkpoint.manifest import BadManifest, Manifest, StoredFile

MANIFEST = Manifest(
    step=12,
    shards=(StoredFile("rank_00000.safetensors", 100, "ab"),),
    state=StoredFile("state.json", 10, "cd"),
    tensors=StoredFile("state.safetensors", 20, "ef"),
    tables=({"unet": (Span("w", 0, 6),)},),
    kinds={"unet": ("master", "exp_avg")},
    shapes={"unet": {"w": (2, 3), "scalar": ()}},
    loss=0.25,
)


def test_round_trip() -> None:
    assert Manifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST
    assert MANIFEST.num_bytes == 130
    assert MANIFEST.plan(0).flat_numel("unet") == 6


@given(st.integers(0, len(MANIFEST.to_bytes()) - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(position: int, change: int) -> None:
    data = bytearray(MANIFEST.to_bytes())
    data[position] ^= change
    with pytest.raises(BadManifest):
        Manifest.from_bytes(bytes(data))


@given(st.integers(0, len(MANIFEST.to_bytes()) - 1))
def test_any_cut_is_noticed(length: int) -> None:
    with pytest.raises(BadManifest):
        Manifest.from_bytes(MANIFEST.to_bytes()[:length])


@pytest.mark.parametrize("loss", [None, math.nan, math.inf, -math.inf])
def test_a_loss_that_json_cannot_hold_is_unknown(loss: float | None) -> None:
    data = replace(MANIFEST, loss=loss).to_bytes()
    assert Manifest.from_bytes(data).loss is None
    assert json.loads(data)["loss"] is None


def test_a_manifest_without_a_loss_is_read() -> None:
    body = json.loads(MANIFEST.to_bytes())
    del body["checksum"], body["loss"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))  # as they were written before, too
    data = json.dumps({"checksum": checksum_bytes(text.encode()), **body}).encode()
    assert Manifest.from_bytes(data) == replace(MANIFEST, loss=None)


def test_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.checkpoint.manifest.FORMAT", 99)
    data = MANIFEST.to_bytes()
    monkeypatch.undo()
    with pytest.raises(BadManifest, match="format 99"):
        Manifest.from_bytes(data)
    assert json.loads(data)["format"] == 99
