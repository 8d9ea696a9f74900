"""data.cache_dir shared by processes that are killed: never a wrong byte, never above the limit."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.storage import cache
from data_pipeline.storage.cache import BLOCK, BlockCache

LIMIT, SIZE, OBJECTS = 16 * BLOCK, 7 * BLOCK + 12_345, 4
"""More is asked for than fits: blocks come and go all the time."""

READER = """
import random, sys
from data_pipeline.storage.cache import BlockCache
folder, limit, size, objects, seed, reads = sys.argv[1], *map(int, sys.argv[2:])
contents = {f"shard {i}": random.Random(i).randbytes(size) for i in range(objects)}
cache, choose = BlockCache(folder, limit), random.Random(seed)
print("begun", flush=True)
for _ in range(reads):
    name = choose.choice(sorted(contents))
    start = choose.randrange(size)
    stop = min(size, start + choose.randrange(1, 3_000_000))
    wanted = contents[name][start:stop]
    if cache.read(name, size, start, stop, lambda a, b: contents[name][a:b]) != wanted:
        sys.exit(f"other bytes of {name} {start}:{stop}")
"""


def reader(folder: Path, seed: int, reads: int) -> subprocess.Popen[str]:
    numbers = map(str, (LIMIT, SIZE, OBJECTS, seed, reads))
    command = [sys.executable, "-c", READER, str(folder), *numbers]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def files(folder: Path) -> dict[Path, int]:
    """Blocks, and what is on its way, by size; those that are gone meanwhile are left out."""
    found = {}
    for path in folder.glob("*/*.*"):
        try:
            found[path] = path.stat().st_size
        except FileNotFoundError:
            continue
    return found


def test_two_ranks_share_a_folder_and_are_killed_again_and_again(tmp_path: Path) -> None:
    """Each kill comes while a block is being written, as far as one is met; who is left goes on."""
    choose, left_behind = random.Random(0), 0
    other = reader(tmp_path, 1000, 10**9)
    kills = itertools.count()
    while (kill := next(kills)) < 15 or not left_behind:  # until one was killed in the midst of it
        victim = reader(tmp_path, kill, 10**9)
        mine = f".{victim.pid}."
        for _ in range(choose.randrange(1, 4)):
            while not any(mine in path.name for path in tmp_path.glob("*/*.part")):
                assert victim.poll() is None, victim.communicate()
        victim.kill()
        victim.wait()
        left_behind += any(mine in path.name for path in files(tmp_path))
        assert other.poll() is None, other.communicate()
        blocks = [size for path, size in files(tmp_path).items() if path.suffix != ".part"]
        # One that another process moves in while these are listed may be counted beside what it displaced.
        assert sum(blocks) <= LIMIT + 2 * BLOCK
    other.kill()
    other.wait()
    last = reader(tmp_path, 99, 60)
    assert last.wait() == 0, last.communicate()
    after = files(tmp_path)
    assert sum(after.values()) <= LIMIT
    assert not [path for path in after if path.suffix == ".part"]
    assert len(after) > LIMIT // BLOCK // 2  # and it is used


@pytest.mark.parametrize("left", [0.0, 0.5, 1.0])
def test_a_block_that_was_not_written_whole_is_read_again(tmp_path: Path, left: float) -> None:
    """As after a power cut, when names survive and contents do not: also of the right size."""
    content, asked = random.Random(1).randbytes(2 * BLOCK), list[tuple[int, int]]()

    def fetch(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return content[start:stop]

    cache = BlockCache(str(tmp_path), LIMIT)
    for _ in range(2):
        assert cache.read("shard", len(content), 10, BLOCK + 10, fetch) == content[10 : BLOCK + 10]
    assert asked == [(0, 2 * BLOCK)]
    for path, size in files(tmp_path).items():
        path.write_bytes(bytes(int(left * size)))
    for _ in range(2):
        assert cache.read("shard", len(content), 10, BLOCK + 10, fetch) == content[10 : BLOCK + 10]
    assert asked == [(0, 2 * BLOCK)] * 2


def test_large_caches_look_at_few_files_and_keep_the_limit(tmp_path: Path) -> None:
    """Several folders share the limit, and the least recently used of each go."""
    limit, size = 400 * BLOCK, 150 * BLOCK
    cache = BlockCache(str(tmp_path), limit)
    zeros = bytes(BLOCK)
    for name in "abcd":
        for block in range(size // BLOCK):
            cache.read(name, size, block * BLOCK, (block + 1) * BLOCK, lambda start, stop: zeros)
    taken = files(tmp_path)
    assert 0.6 * limit < sum(taken.values()) <= limit
    folders = {path.parent for path in taken}
    assert len(folders) == 3
    newest = BlockCache(str(tmp_path), limit)  # as the next process finds it
    newest.read("d", size, size - BLOCK, size, lambda start, stop: pytest.fail("it was kept"))


def test_a_disk_that_takes_nothing_is_told_once_and_left_alone_for_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, fetched = random.Random(0).randbytes(SIZE), list[tuple[int, int]]()
    (tmp_path / "000").write_bytes(b"")  # in the place of the only folder of blocks

    def fetch(start: int, stop: int) -> bytes:
        fetched.append((start, stop))
        return content[start:stop]

    stored = BlockCache(str(tmp_path), LIMIT)
    for _ in range(3):
        assert stored.read("shard", SIZE, 0, SIZE, fetch) == content
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        f"nothing more is cached in {tmp_path}"
    ]
    (tmp_path / "000").unlink()
    stored.read("shard", SIZE, 0, SIZE, fetch)
    assert not files(tmp_path)
    monkeypatch.setattr(cache, "_PAUSE_S", 0.0)
    stored._paused_until = 0.0
    for _ in range(2):
        assert stored.read("shard", SIZE, 0, SIZE, fetch) == content
    assert len(fetched) == 5  # all but the last, which found it
    assert len(caplog.records) == 1
