"""Where captions come from: members, the json, and the parquet beside the tar."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import build_loader

COUNT = 24
LONG = [f"picture number {i} of a long series, each with a caption of its own" for i in range(COUNT)]


@pytest.fixture
def pictures(tmp_path: Path, write_tar, tiny_picture) -> Callable[..., Path]:
    """Function that writes 24 pictures, their other members and columns of a parquet; returns the latter."""

    def write(table: dict[str, list[object]], *members: tuple[str, list[bytes]]) -> Path:
        content = []
        for i in range(COUNT):
            content.append((f"{i:09d}.jpg", tiny_picture(i)))
            content += [(f"{i:09d}.{extension}", bodies[i]) for extension, bodies in members]
        write_tar(tmp_path / "0.tar", content)
        pq.write_table(pa.table(table), tmp_path / "0.parquet")
        return tmp_path / "0.parquet"

    return write


def served(folder: Path, captions: tuple[str, ...], **changes: object) -> dict[int, str]:
    """Caption by number of the sample."""
    config = DataConfig(shards=f"{folder}/*.tar", image_size=16, workers=0, lanes=2, captions=captions)
    config = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    with build_loader(config, seed=1, global_batch_size=COUNT) as loader:
        batch = next(loader)
        return {
            int(key.rpartition("/")[2]): text for key, text in zip(batch.keys, batch.captions, strict=True)
        }


@pytest.mark.parametrize(
    "keys", [list(range(COUNT)), [f"{i:09d}" for i in range(COUNT)]], ids=["int", "text"]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_captions_of_the_parquet_on_shards_of_pictures_alone(pictures, tmp_path: Path, keys, workers) -> None:
    order = [(7 * i) % COUNT for i in range(COUNT)]  # the rows need not lie as the members do
    pictures({"key": [keys[i] for i in order], "caption": [LONG[i] for i in order]})
    assert served(tmp_path, ("caption",), workers=workers) == dict(enumerate(LONG))


def test_few_texts_lists_bytes_and_gaps(pictures, tmp_path: Path) -> None:
    several = [[f"{text}, first", f"{text}, second"] for text in LONG]
    some: list[object] = [text if i % 2 else None for i, text in enumerate(LONG)]
    pictures(
        {
            "key": list(range(COUNT)),
            "kind": [("a boat", "a house")[i % 2] for i in range(COUNT)],
            "all": several,
            "raw": [text.encode() for text in LONG],
            "some": some,
        }
    )
    assert served(tmp_path, ("kind",)) == {i: ("a boat", "a house")[i % 2] for i in range(COUNT)}
    assert all(text in several[i] for i, text in served(tmp_path, ("all",)).items())
    assert served(tmp_path, ("raw",)) == dict(enumerate(LONG))
    assert served(tmp_path, ("some",), require_caption=False) == {
        i: text or "" for i, text in enumerate(some)
    }


def test_members_and_the_json_go_on_as_before_and_come_first(pictures, tmp_path: Path) -> None:
    records = [json.dumps({"caption": f"json {i}" if i % 2 else None, "n": i}).encode() for i in range(COUNT)]
    pictures({"key": list(range(COUNT)), "blip": LONG}, ("json", records))
    assert served(tmp_path, ("caption",), require_caption=False) == {
        i: f"json {i}" if i % 2 else "" for i in range(COUNT)
    }
    assert served(tmp_path, ("blip",)) == dict(enumerate(LONG))


def test_members_named_caption(pictures, tmp_path: Path) -> None:
    pictures({"key": list(range(COUNT))}, ("caption", [text.encode() for text in LONG]))
    assert served(tmp_path, ("caption",)) == dict(enumerate(LONG))
    with pytest.raises(DataError, match="no_caption"):
        served(tmp_path, ("txt",))


def test_a_source_that_is_nowhere_is_refused_with_the_nearest(pictures, tmp_path: Path) -> None:
    pictures({"key": list(range(COUNT)), "caption": LONG})
    with pytest.raises(
        DataError, match=r"data\.captions names captoin, .* of any shard; the nearest is caption\."
    ):
        served(tmp_path, ("captoin",))


def test_a_parquet_that_went_away_is_a_sentence(pictures, tmp_path: Path) -> None:
    parquet = pictures({"key": list(range(COUNT)), "caption": LONG})
    assert served(tmp_path, ("caption",))
    parquet.unlink()
    with pytest.raises(
        DataError, match=r"The captions in caption of .*0\.tar lie in .*0\.parquet, which cannot be read"
    ):
        served(tmp_path, ("caption",))
