"""Whether a run trains on its data: the share of samples that is served, said once and held to a limit.

A filter with a slip in it, captions under another name, a tar whose members lie apart: the loader counts all
of that and goes on with what is left, which may be one sample in a hundred, seen a hundred times as often. So
over the first thousand samples of all ranks together the counts are told, and too many rejections end the run
before it has cost anything. Together, since the lanes of one rank may well begin in the one bad shard.
"""

from __future__ import annotations

import logging

from data_pipeline.errors import DataError
from data_pipeline.tally import FIRST, Tally, added
from trainer.distributed import collectives

logger = logging.getLogger(__name__)


class ServedShare:
    """Judges the first samples of a process, once; later ones are in the metrics (`served_share`)."""

    def __init__(self, limit: float) -> None:
        """limit: data.max_rejected_share"""
        self._limit = limit
        self._judged = False

    def judge(self, seen: float, tally: Tally, *, main_rank: bool) -> None:
        """Judge as soon as enough has been seen. Collective when it does, which `seen` decides.

        seen: samples that all ranks have looked at, the same number on every rank
        tally: this rank's

        Raises:
            DataError: on every rank, with the counts by reason.
        """
        if self._judged or seen < FIRST:
            return
        self._judged = True
        total = added(collectives.all_gather_object(tally))
        try:
            total.check(self._limit)
        except DataError as error:
            error.share = 1.0  # counted over all ranks: no machine is to blame
            raise
        if main_rank:
            logger.info("data: %s", total.sentence())
