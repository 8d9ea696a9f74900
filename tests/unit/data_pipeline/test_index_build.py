"""How an index is built: what it tells while it works, what a kill leaves, what it reads and writes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.errors import AccessDenied, DataError, Unreachable
from data_pipeline.loader import build_loader
from data_pipeline.shards import build_index as build
from data_pipeline.shards import manifest, recorder
from data_pipeline.shards.build_index import Estimate, build_index
from data_pipeline.shards.manifest import (
    MANIFEST,
    PARTS,
    ManifestRow,
    append_rows,
    merge_parts,
    read_manifest,
    read_parts,
    write_manifest,
)
from data_pipeline.shards.opening import open_dataset
from data_pipeline.shards.tars import scan
from data_pipeline.storage.listing import ListedFile, list_files
from trainer.__main__ import main


class _Stopped(BaseException):
    """What ends a build in the middle, as a kill would."""


@pytest.fixture(name="gate")
def gate_fixture(tmp_path: Path) -> Iterator[tuple[str, threading.Event]]:
    """Address of a web server on a folder that sends no byte of a tar before the event is set."""
    opened = threading.Event()

    class Gated(SimpleHTTPRequestHandler):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts, directory=str(tmp_path))

        def do_GET(self) -> None:
            opened.wait()
            path = tmp_path / self.path.lstrip("/")
            if not path.exists():
                return self.send_error(404)
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            body = path.read_bytes()[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
            self.end_headers()
            self.wfile.write(body)
            return None

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Gated) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", opened
        opened.set()
        server.shutdown()


def test_a_build_tells_that_it_lives_while_no_shard_is_finished(
    gate: tuple[str, threading.Event], tmp_path: Path, write_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, opened = gate
    write_shards(tmp_path, [3, 2])
    monkeypatch.setattr(build, "_SPEAK_EVERY_S", 0.02)
    told: list[tuple[str, int, int]] = []

    def progress(*said: Any) -> None:
        told.append(said)
        if len(told) == 5:  # nothing can have been read by now
            opened.set()

    config = DataConfig(shards=f"{address}/{{00000..00001}}.tar", index=str(tmp_path / "index"))
    assert open_dataset(config, progress=progress).counts.tolist() == [3, 2]
    assert [said[1:] for said in told[:5]] == [(0, 2)] * 5
    assert told[-1][1:] == (2, 2)
    assert {said[0] for said in told} == {f"indexing {config.shards}"}


def killed_build(folder: Path, index: str, after: int) -> None:
    """Index a folder until `after` shards are done."""

    def stop(done: int, total: int) -> None:
        if done == after:
            raise _Stopped

    with pytest.raises(_Stopped):
        build_index(list_files(str(folder)), index, progress=stop)


def part_rows(index: str) -> list[list[str]]:
    """Names of the shards in each part beside the manifest."""
    lines = [
        gzip.decompress(path.read_bytes()).decode().splitlines() for path in (Path(index) / PARTS).iterdir()
    ]
    return [[json.loads(line)["shard"].rpartition("/")[2] for line in part[1:]] for part in lines]


def test_what_a_killed_build_has_saved_is_not_read_again(
    tmp_path: Path, write_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = str(tmp_path / "index")
    write_shards(tmp_path / "shards", [2, 3, 1, 4, 2])
    monkeypatch.setattr(build, "_SAVE_EVERY_S", -1.0)
    killed_build(tmp_path / "shards", index, after=4)
    # Each row was written once, by a part of its own, and the last was not: the kill came before.
    assert [len(part) for part in part_rows(index)] == [1, 1, 1]
    assert not (Path(index) / MANIFEST).exists()
    assert len(read_manifest(index)) == 3
    report = build_index(list_files(str(tmp_path / "shards")), index)
    assert report.read == 2
    assert [row.samples for row in report.rows.values()] == [2, 3, 1, 4, 2]
    whole = {f"{tmp_path}/shards/{i:05d}.tar": samples for i, samples in enumerate([2, 3, 1, 4, 2])}
    assert {url: row.samples for url, row in read_manifest(index).items()} == whole
    # The manifest has them all by now; what others may not have read yet is removed later.
    assert len(part_rows(index)) == 5
    monkeypatch.setattr(manifest, "_SETTLED_S", -1.0)
    monkeypatch.setattr(manifest, "_MANY_PARTS", 4)
    assert build_index(list_files(str(tmp_path / "shards")), index, restore=True).read == 0
    assert part_rows(index) == []
    assert {url: row.samples for url, row in read_manifest(index).items()} == whole


def row_of(shard: int, **changes: Any) -> ManifestRow:
    """A row as the manifest has it, of a shard that nobody opens."""
    row = ManifestRow(f"s3://b/{shard:05d}.tar", 1, "e", 1, 1, f"{shard:05d}.npz", "c")
    return replace(row, **changes)


def test_who_reads_while_another_merges_misses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are listed, merged and removed by another, and only then read."""
    index = str(tmp_path)
    for shard in range(100):
        append_rows(index, [row_of(shard)])
    monkeypatch.setattr(manifest, "_SETTLED_S", -1.0)
    list_names, others = manifest.list_names, [lambda: merge_parts(index, *read_parts(index))]

    def listed(folder: str) -> list[str]:
        names = list_names(folder)
        while others:
            others.pop()()
        return names

    monkeypatch.setattr(manifest, "list_names", listed)
    rows, parts = read_parts(index)
    assert (len(rows), parts, part_rows(index)) == (100, [], [])


def test_who_merges_beside_another_loses_no_row(tmp_path: Path) -> None:
    index = str(tmp_path)
    append_rows(index, [row_of(0)])
    slow = read_parts(index)
    append_rows(index, [row_of(1), row_of(0, samples=7)])
    merge_parts(index, *read_parts(index))
    merge_parts(index, *slow)  # over what the other has written
    assert {row.samples for row in read_manifest(index).values()} == {7, 1}


def test_many_parts_are_read_once_and_removed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start among the parts that a large run has left takes a request for each, and tells of every one."""
    number, counts = 150, Counter[str]()
    shards = [f"s3://b/{shard:05d}.tar" for shard in range(number)]
    for shard in range(number):
        append_rows(str(tmp_path), [row_of(shard)])
    monkeypatch.setattr(manifest, "_SETTLED_S", -1.0)
    monkeypatch.setattr(manifest, "_REMOVED_AT_ONCE", 60)
    monkeypatch.setattr("data_pipeline.shards.opening._SMALL", 2)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            counts[call.__name__] += 1
            return call(*given, **named)

        return wrapped

    for name in ("read_bytes", "list_names", "remove_names", "remove_file", "write_bytes"):
        monkeypatch.setattr(manifest, name, counted(getattr(manifest, name)))
    told: list[tuple[Any, ...]] = []
    config = DataConfig(shards=f"s3://b/{{00000..{number - 1:05d}}}.tar", index=str(tmp_path))
    open_dataset(config, progress=lambda *said: told.append(said))
    assert counts == {"read_bytes": number + 1, "list_names": 1, "remove_names": 3, "write_bytes": 1}
    assert [said for said in told if said[0] == "reading the index"][-1][1:] == (number, number)
    assert len(told) >= number + 3
    assert (part_rows(str(tmp_path)), sorted(read_manifest(str(tmp_path)))) == ([], shards)


def test_a_process_leaves_one_part_however_often_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until that is a large one; what others have written later counts all the same."""
    index = str(tmp_path)
    monkeypatch.setattr(recorder, "_PART_ROWS", 12)
    monkeypatch.setattr(recorder, "store_index", lambda folder, shard: row_of(shard))
    kept = recorder.Recorder([(0, index)])
    for shard in range(10):
        kept.keep(shard, pieces_of(shard))
        kept.flush()
        if shard == 4:
            append_rows(index, [row_of(3, samples=9)])
    assert sorted(len(part) for part in part_rows(index)) == [1, 10]
    rows = read_manifest(index)
    assert (len(rows), rows[row_of(3).shard].samples) == (10, 9)
    for shard in range(10, 20):
        kept.keep(shard, pieces_of(shard))
        kept.flush()
    assert sorted(len(part) for part in part_rows(index)) == [1, 8, 12]
    assert len(read_manifest(index)) == 20


def pieces_of(shard: int) -> Any:
    """Of a shard that has been read to its end; its index is its number."""
    return SimpleNamespace(whole=lambda: shard, shard=ListedFile(row_of(shard).shard, 1, "e"))


@pytest.mark.parametrize("instead", ["", "s3://b/run/index"])
def test_a_short_fault_of_storage_costs_one_visit(monkeypatch: pytest.MonkeyPatch, instead: str) -> None:
    """It says nothing of whether one may write there, so that the next shard goes to the same place."""
    fails = [Unreachable("503 SlowDown")]
    stored: list[str] = []

    def store(folder: str, index: int) -> ManifestRow:
        if fails:
            raise fails.pop()
        stored.append(folder)
        return row_of(index)

    monkeypatch.setattr(recorder, "store_index", store)
    kept = recorder.Recorder([(0, "s3://b/_index")], instead)
    for shard in (0, 1, 0, 0):  # the first one is kept when it comes again
        kept.keep(shard, pieces_of(shard))
    assert (stored, kept.refused) == (["s3://b/_index"] * 2, False)

    written: list[list[str]] = []

    def append(folder: str, rows: Sequence[ManifestRow], *, instead_of: str) -> str:
        if not written:
            written.append([])
            raise Unreachable("503 SlowDown")
        written.append([row.shard for row in rows])
        return "part"

    monkeypatch.setattr(recorder, "append_rows", append)
    kept.flush()
    kept.flush()
    assert (written, kept.refused) == ([[], [row_of(1).shard, row_of(0).shard]], False)


def test_a_bucket_that_may_not_be_listed_holds_no_index_yet(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(url: str) -> bool:
        raise AccessDenied(f"Access to {url} is denied.")

    monkeypatch.setattr(recorder, "exists", refused)
    kept = recorder.Recorder([(0, "s3://b/_index")])
    assert (kept.has(0, row_of(0).shard), kept.refused, caplog.text) == (False, False, "")


def test_a_damaged_index_file_is_made_anew_as_the_error_says(tmp_path: Path, write_shards, capsys) -> None:
    write_shards(tmp_path, [20, 30, 10])
    config = DataConfig(shards=str(tmp_path), workers=0, image_size=16)
    dataset = open_dataset(config)
    damaged = Path(dataset.index_urls[1])
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with (
        pytest.raises(DataError, match=r"00001-.*npz does not match its manifest; delete it and run"),
        build_loader(config, seed=0, global_batch_size=60) as loader,
    ):
        next(loader)
    damaged.unlink()
    assert main(["data", "index", str(tmp_path)]) == 0
    assert "shards            3 (1 read now)" in capsys.readouterr().out
    with build_loader(config, seed=0, global_batch_size=60) as loader:
        assert len(set(next(loader).keys)) == 60


def test_rows_of_several_writers_are_kept_and_the_newest_counts(tmp_path: Path, write_shards) -> None:
    write_shards(tmp_path / "shards", [2, 3])
    (first, second), index = list_files(str(tmp_path / "shards")), str(tmp_path / "index")
    old = build_index([first], index).rows[first.url]
    write_shards(tmp_path / "shards", [5])
    new = build_index(list_files(first.url), str(tmp_path / "other")).rows[first.url]
    append_rows(index, [new])
    assert read_manifest(index)[first.url].samples == 5
    report = build_index([second], index)  # whose end must not forget what the other wrote
    assert (report.read, old.samples) == (1, 2)
    assert {url: row.samples for url, row in read_manifest(index).items()} == {first.url: 5, second.url: 3}


def test_manifests_of_earlier_and_of_later_versions_are_one_format(tmp_path: Path, write_shards) -> None:
    """Written as one text, as it was before; and what is written now reads as that text."""
    write_shards(tmp_path / "shards", [2, 3, 1])
    rows = build_index(list_files(str(tmp_path / "shards")), str(tmp_path / "index")).rows
    path = tmp_path / "index" / MANIFEST
    head, *lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    assert json.loads(head)["checksum"] == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert [json.loads(line)["samples"] for line in lines] == [2, 3, 1]
    path.write_bytes(gzip.compress("\n".join([head, *lines]).encode(), mtime=0))
    assert read_manifest(str(tmp_path / "index")) == rows
    write_manifest(str(tmp_path / "index"), rows)
    assert read_manifest(str(tmp_path / "index")) == rows


def test_what_the_rest_will_take_is_told_before_it_is_read(tmp_path: Path, write_shards) -> None:
    write_shards(tmp_path / "shards", [2] * 20)
    shards = list_files(str(tmp_path / "shards"))
    told: list[tuple[int, Estimate]] = []
    done = [0]
    report = build_index(
        shards,
        str(tmp_path / "index"),
        progress=lambda now, total: done.append(now),
        announce=lambda estimate: told.append((done[-1], estimate)),
    )
    ((at, estimate),) = told
    assert (at, estimate.shards, report.read) == (3, 17, 20)
    # The tar in one request; another one finds no parquet.
    assert (estimate.requests, estimate.bytes) == (2, shards[0].size)
    some = Estimate(shards=1000, workers=20, requests=3, bytes=5e8, wall_s=36.0, cpu_s=0.0)
    assert some.seconds == 1800
    assert "1,000 are left: 500.0 GB in 3,000 requests, about 30 min with 20 workers" in some.sentence()
    one_core = Estimate(shards=1000, workers=1, requests=3, bytes=5e8, wall_s=5.0, cpu_s=7.2)
    assert one_core.seconds == 7200  # no faster than one processor computes
    assert "2 h 0 min" in one_core.sentence()


def test_few_shards_are_not_probed(tmp_path: Path, write_shards) -> None:
    write_shards(tmp_path / "shards", [1, 2])

    def announce(estimate: Estimate) -> None:
        raise AssertionError(estimate)

    build_index(list_files(str(tmp_path / "shards")), str(tmp_path / "index"), announce=announce)


def large_picture(num_bytes: int) -> bytes:
    """A picture in a file of this size: decoders do not mind what follows its end."""
    out = io.BytesIO()
    Image.new("RGB", (40, 30)).save(out, "JPEG")
    return out.getvalue().ljust(num_bytes, b"\1")


@pytest.mark.parametrize(
    ("picture_bytes", "most_of_all"), [(2_000_000, 0.25), (40_000, 1.0)], ids=["large", "small"]
)
def test_large_pictures_are_jumped_over_and_small_ones_read_through(
    tmp_path: Path,
    write_tar: Callable[..., None],
    picture_bytes: int,
    most_of_all: float,
) -> None:
    names = [(f"{i:03d}.jpg", large_picture(picture_bytes)) for i in range(20)]
    texts = [(f"{i:03d}.txt", b"words") for i in range(20)]
    write_tar(tmp_path / "0.tar", sorted(names + texts))
    body = (tmp_path / "0.tar").read_bytes()
    counts: Counter[str] = Counter()

    def read(start: int, stop: int) -> bytes:
        counts.update(requests=1, bytes=stop - start)
        return body[start:stop]

    found = scan(read, len(body), look=lambda name, member: len(member.read(0, 4000)))
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert [(m.name, m.offset) for m in found.members] == [(m.name, m.offset_data) for m in tar]
    assert found.problems == []
    assert counts["bytes"] <= most_of_all * len(body)
    # One request for each picture that is jumped over, and its text; else one for each 4 MB.
    assert counts["requests"] <= (21 if picture_bytes > 1_000_000 else 1)


def write_parquet(folder: Path, **columns: list[Any]) -> None:
    table = {"key": [f"00000{i:04d}" for i in range(3)], **columns}
    pq.write_table(pa.table(table), folder / "00000.parquet")


def test_a_parquet_that_comes_or_changes_later_is_read(tmp_path: Path, write_shards) -> None:
    write_shards(tmp_path, [3, 2])

    def built() -> tuple[int, dict[str, str]]:
        report = build_index(list_files(str(tmp_path)), str(tmp_path / "_index"), restore=True)
        return report.read, report.rows[f"{tmp_path}/00000.tar"].columns

    assert built()[0] == 2
    write_parquet(tmp_path, aesthetic=[5.0, 6.0, 7.0])
    start = build_index(list_files(str(tmp_path)), str(tmp_path / "_index"))
    assert (start.read, start.other_parquets) == (0, 1)  # other runs have the index as it is
    assert (built()[0], built()[0], built()[1]["aesthetic"]) == (1, 0, "number")
    write_parquet(tmp_path, aesthetic=["good", "bad", "good"])
    assert (built()[0], built()[0], built()[1]["aesthetic"]) == (1, 0, "text")
    (tmp_path / "00000.parquet").unlink()  # what the index knows by it stays
    assert (built()[0], built()[1]["aesthetic"]) == (0, "text")


def test_rows_of_earlier_versions_are_read_anew_where_they_lack_a_column(
    tmp_path: Path, write_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which no note tells of; the others get one, for what changes later."""
    index = str(tmp_path / "_index")
    write_shards(tmp_path, [3])
    write_parquet(tmp_path, aesthetic=[5.0, 6.0, 7.0])
    shards = list_files(str(tmp_path))
    (row,) = build_index(shards, index).rows.values()
    assert row.beside
    former = replace(row, beside="")

    def built(**how: Any) -> tuple[int, dict[str, ManifestRow]]:
        return build_index(shards, index, **how).read, read_manifest(index)

    append_rows(index, [former])
    with monkeypatch.context() as patch:  # a start needs to write nothing, and often may not
        patch.setattr(manifest, "write_bytes", lambda *_: 1 / 0)
        assert built() == (0, {row.shard: former})
    with monkeypatch.context() as patch:  # a fault of storage says nothing of the parquet
        patch.setattr(build, "open_stream", lambda url: 1 / 0)
        assert built(restore=True) == (0, {row.shard: former})
    assert built(restore=True) == (0, {row.shard: row})
    append_rows(index, [replace(former, columns={"url": "mixed"})])
    assert built(restore=True) == (1, {row.shard: row})


def test_runs_of_earlier_versions_read_the_rows(tmp_path: Path) -> None:
    """They refuse a row with a field that they do not know, and take no notice of what is new in the head."""
    row = row_of(0, beside="7 etag")
    append_rows(str(tmp_path), [row])
    (part,) = (tmp_path / PARTS).iterdir()
    head, *rows = gzip.decompress(part.read_bytes()).splitlines()
    assert "beside" in json.loads(head)
    assert [json.loads(line).keys() & {"beside"} for line in rows] == [set()]
    assert read_manifest(str(tmp_path)) == {row.shard: row}
