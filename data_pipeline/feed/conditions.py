"""Task fields of a sample (class label, layout, maps) and the arrays that hold a batch of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import CONDITIONS, DataConfig
from data_pipeline.errors import DataError, Rejected
from data_pipeline.pictures.crops import Geometry, crop_map

Box = tuple[float, float, float, float, float]
"""Label, x0, y0, x1, y1."""
_MIN_BOX = 0.01
"""Boxes of which less than this share of an edge is left after the crop are dropped."""
_BEYOND = 1.0
"""How far a box may hang over the picture. Pixels taken for shares would all be dropped as lying outside."""


def check_conditions(config: DataConfig) -> None:
    """Raise DataError for a condition that does not exist."""
    for name in config.conditions:
        if name not in CONDITIONS:
            raise DataError(f"data.conditions names {name!r}; there are {', '.join(CONDITIONS)}.")


def condition_arrays(config: DataConfig, height: int, width: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape per sample of every condition of a batch."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "class_label": ("int64", ()),
        "layout": ("float32", (config.max_layout_boxes, 5)),
        "semantic_map": ("uint8", (height, width)),
        "depth": ("float32", (1, height, width)),
    }
    return {"size": ("int64", (6,))} | {name: shapes[name] for name in config.conditions}


def fill_conditions(
    config: DataConfig,
    members: Mapping[str, bytes],
    record: Mapping[str, Any] | None,
    geometry: Geometry,
    original: tuple[int, int] | None,
    out: Mapping[str, NDArray[Any]],
    row: int,
) -> None:
    """Write one sample's conditions to row `row` of the batch arrays. Raises Rejected.

    Those that its source has not are left out as an unconditional sample's are (`CAN_BE_LEFT_OUT`).
    """
    out["size"][row] = geometry.size_row(original)
    if "class_label" in out and "class_label" not in config.conditions:
        out["class_label"][row] = -1
    if "layout" in out and "layout" not in config.conditions:
        out["layout"][row] = _empty_layout(config.max_layout_boxes)
    for name in config.conditions:
        if name == "class_label":
            out[name][row] = _class_label(members, record)
        elif name == "layout":
            out[name][row] = layout_rows(record, geometry, config.max_layout_boxes)
        elif name == "semantic_map":
            out[name][row] = crop_map(
                _member(members, "seg.png"), geometry, labels=True, max_pixels=config.max_image_pixels
            )
        else:
            values = crop_map(
                _member(members, "depth.png"), geometry, labels=False, max_pixels=config.max_image_pixels
            )
            out[name][row, 0] = 2.0 * values - 1.0


def _member(members: Mapping[str, bytes], extension: str) -> bytes:
    if extension not in members:
        raise Rejected(f"no_{extension.replace('.', '_')}")
    return members[extension]


def _class_label(members: Mapping[str, bytes], record: Mapping[str, Any] | None) -> int:
    if "cls" in members:
        text = members["cls"].decode("ascii", "replace").strip()
        if text.isascii() and text.isdigit() and len(text) < 10:
            return int(text)
        raise Rejected("no_class_label", text[:50])
    value = (record or {}).get("class_label")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise Rejected("no_class_label")
    return value


def layout_rows(record: Mapping[str, Any] | None, geometry: Geometry, limit: int) -> NDArray[np.float32]:
    """[limit, 5] rows (label, x0, y0, x1, y1 in [0, 1] of the crop), largest first; label -1 is empty.

    The json's `layout` is a list of [label, x0, y0, x1, y1] in shares of the whole picture. Raises Rejected.
    """
    rows = _empty_layout(limit)
    boxes = (record or {}).get("layout")
    if not isinstance(boxes, list):
        raise Rejected("no_layout")
    kept: list[Box] = []
    for box in boxes[:10_000]:
        if not isinstance(box, list) or len(box) != 5 or not all(_is_number(v) for v in box):
            raise Rejected("no_layout", "a row is not [label, x0, y0, x1, y1]")
        label, x0, y0, x1, y1 = (float(v) for v in box)
        if label % 1 or x1 < x0 or y1 < y0 or min(x0, y0) < -_BEYOND or max(x1, y1) > 1 + _BEYOND:
            raise Rejected("bad_layout", f"{box} is no whole label and corners x0, y0, x1, y1 in 0 .. 1")
        x0, x1 = ((v - geometry.left) / (geometry.right - geometry.left) for v in (x0, x1))
        y0, y1 = ((v - geometry.top) / (geometry.bottom - geometry.top) for v in (y0, y1))
        if geometry.flip:
            x0, x1 = 1.0 - x1, 1.0 - x0
        x0, y0, x1, y1 = (min(1.0, max(0.0, v)) for v in (x0, y0, x1, y1))
        kept.append((label, x0, y0, x1, y1))
    for i, values in enumerate(in_order(kept)[:limit]):
        rows[i] = values
    return rows


def in_order(boxes: Sequence[Box]) -> list[Box]:
    """Boxes as models learn them: largest first, without those that are too thin to be seen."""
    sizes = [(x1 - x0, y1 - y0) for _, x0, y0, x1, y1 in boxes]
    seen = [i for i, (width, height) in enumerate(sizes) if width >= _MIN_BOX and height >= _MIN_BOX]
    return [boxes[i] for i in sorted(seen, key=lambda i: -sizes[i][0] * sizes[i][1])]


def _empty_layout(limit: int) -> NDArray[np.float32]:
    rows = np.zeros((limit, 5), np.float32)
    rows[:, 0] = -1
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
