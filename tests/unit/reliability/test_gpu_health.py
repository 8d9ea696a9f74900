"""What the driver's figures are a sign of, and that nothing is read where there is no driver."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trainer.reliability.gpu_health import PATIENCE, Examiner, GpuReading, Health, health_record, open_health

WELL = GpuReading(temperature_c=60, remapped_rows=2, uncorrected=3)


@pytest.mark.parametrize(
    ("now", "symptom"),
    [
        (replace(WELL, xids=(79,)), "XID 79 (fell off the bus)"),
        (replace(WELL, xids=(48, 48)), "XID 48 (memory error that could not be corrected)"),
        (replace(WELL, remap_failed=True), "no spare row is left for its memory"),
        (replace(WELL, remap_pending=True), "rows of its memory wait for a reset to be replaced"),
        (replace(WELL, uncorrected=5), "2 memory errors that could not be corrected"),
    ],
)
def test_each_sign_is_told_once(now: GpuReading, symptom: str) -> None:
    examiner = Examiner()
    assert examiner.judge(WELL).symptoms == ()
    assert examiner.judge(now).symptoms == (symptom,)
    assert examiner.judge(replace(now, xids=())).symptoms == ()


def test_what_a_program_does_and_what_a_card_has_behind_it_is_no_sickness() -> None:
    examiner = Examiner()
    # Errors from before this run, rows replaced long ago, and a heat that is told but not judged.
    assert examiner.judge(replace(WELL, uncorrected=100, temperature_c=88)).symptoms == ()
    assert examiner.judge(replace(WELL, uncorrected=100, xids=(13, 31, 43))).symptoms == ()
    assert examiner.judge(replace(WELL, uncorrected=100, remapped_rows=3)).symptoms == ()


def test_what_lasts_is_told_at_the_first_reading() -> None:
    assert Examiner().judge(replace(WELL, remap_failed=True)).symptoms != ()


def test_a_brake_counts_when_it_stays() -> None:
    examiner = Examiner()
    hot = replace(WELL, braked=("too hot",))
    assert [examiner.judge(hot).symptoms for _ in range(PATIENCE - 1)] == [()] * (PATIENCE - 1)
    assert examiner.judge(WELL).symptoms == ()  # begins to count anew
    found = [examiner.judge(hot).symptoms for _ in range(PATIENCE + 2)]
    assert [bool(symptoms) for symptoms in found] == [False] * (PATIENCE - 1) + [True, False, False]
    assert "too hot" in found[PATIENCE - 1][0]


def test_a_record_adds_up_the_ranks() -> None:
    ranks = [Health(WELL), None, Health(replace(WELL, temperature_c=71, braked=("power brake",), xids=(31,)))]
    assert health_record(ranks) == {
        "gpu/hottest_c": 71.0,
        "gpu/braked": 1.0,
        "gpu/remapped_rows": 4.0,
        "gpu/uncorrected_errors": 6.0,
        "gpu/xids": 1.0,
    }
    assert health_record([None, None]) == {}


def test_without_a_gpu_nothing_is_read() -> None:
    assert open_health(torch.device("cpu")) is None
