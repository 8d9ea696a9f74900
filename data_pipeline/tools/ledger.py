"""What a run could not know before it read: rejections in its reject files, and what is assumed without them.

The index decides filters over its columns, removal lists, sizes, absent and blank captions. Whether a picture
can be decoded, what a json says that the index does not keep, and whether storage answered is known only once
a sample was read. Each sample so rejected moves its lane on by one, and all that the lane serves after it. A
run with data.reject_file writes them down, by ordinal:

    {"reason": "not_an_image", "key": "00003/000030007", "detail": "...", "ordinal": 31007}
"""

from __future__ import annotations

import glob
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.storage.files import read_text

_SET_ASIDE = "set_aside"


@dataclass
class Ledger:
    """Rejections of a run."""

    files: tuple[str, ...] = ()
    rejected: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Keys by ordinal: with buckets, samples that no order counts have the ordinal of a neighbour."""
    set_aside: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Visits that storage did not answer, which came again at the end of their epoch."""

    def rejects(self, ordinal: int, key: str) -> bool:
        """Whether the run rejected a visit, at once or when it came again."""
        return ordinal in self.rejected and key in self.rejected[ordinal]

    def defers(self, ordinal: int, key: str) -> bool:
        """Whether the run set a visit aside."""
        return ordinal in self.set_aside and key in self.set_aside[ordinal]

    def assumptions(self, config: DataConfig, undecided: Collection[str]) -> list[str]:
        """What must hold for the answer to be exact; `undecided` clauses of the filter need each json."""
        if self.files:
            return [f"{', '.join(self.files)} hold every rejection of the run up to this step"]
        return list(_assumed(config, undecided))


def _assumed(config: DataConfig, undecided: Collection[str]) -> Iterator[str]:
    yield "every picture before could be decoded"
    for text in sorted(undecided):
        yield f"every json before satisfied `{text}`, which the index does not decide"
    if config.require_caption and (columns := [source for source in config.captions if source != "txt"]):
        yield f"every sample before had a caption (the index knows those of txt, not of {', '.join(columns)})"
    for condition in config.conditions:
        yield f"every sample before had its {condition}"
    if config.removal_lists:
        yield "the removal lists were the same from the start"
    yield "storage answered, and nothing was skipped after a loss spike"


def find_ledger(config: DataConfig, paths: Sequence[str] = ()) -> Ledger:
    """The reject files `paths`, with wildcards, or those of data.reject_file as far as they exist.

    Raises DataError for paths that match nothing, and for files that are no reject files.
    """
    given = list(paths)
    if not given and config.reject_file:
        given = [glob.escape(config.reject_file).replace("{rank}", "*")]
    files: list[str] = []
    for path in given:
        found = sorted(glob.glob(path)) or ([path] if "://" in path else [])
        if paths and not found:
            raise DataError(f"--rejects {path} matches no file; name data.reject_file of all ranks.")
        files += found
    ledger = Ledger(tuple(files))
    for file in files:
        _read(ledger, file)
    return ledger


def _read(ledger: Ledger, file: str) -> None:
    lines = read_text(file).split("\n")
    for number, line in enumerate(lines, 1):
        if not line or (number == len(lines) and line.startswith("{") and not line.endswith("}")):
            continue  # a crash may have torn the last line
        try:
            record = json.loads(line)
            reason, key, ordinal = str(record["reason"]), str(record["key"]), int(record["ordinal"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(
                f"{file}, line {number} is no record of a rejection ({error}); name data.reject_file."
            ) from error
        (ledger.set_aside if reason == _SET_ASIDE else ledger.rejected)[ordinal].add(key)
