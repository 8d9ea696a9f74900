"""Healing decisions: symptoms, skip lists, limits, and their journey through checkpoints."""

import json
import math
import random

import pytest

from trainer.config.training import HealingConfig
from trainer.reliability.healing import Healer, robust_zscore


def gaussian_losses(count: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(0.5, 0.05) for _ in range(count)]


def heal(healer: Healer, step: int, loss: float, ordinals: list[int]) -> bool:
    """What the loop does about a step; whether it rewinds."""
    verdict = healer.check(step, loss, None)
    if verdict.action == "rewind":
        assert verdict.symptom is not None
        healer.record(verdict, ordinals)
    return verdict.action == "rewind"


def test_zscore_of_a_gaussian_is_its_sigma_distance() -> None:
    history = gaussian_losses(4001)
    assert robust_zscore(0.5 + 4 * 0.05, history) == pytest.approx(4.0, abs=0.25)
    assert robust_zscore(0.5, history) == pytest.approx(0.0, abs=0.1)


def test_zscore_is_not_moved_by_outliers_in_the_history() -> None:
    history = gaussian_losses(1001)
    polluted = history + [1e6] * 20
    assert robust_zscore(1.0, polluted) == pytest.approx(robust_zscore(1.0, history), rel=0.1)


def test_zscore_of_a_flat_history_is_finite() -> None:
    assert robust_zscore(1.0, [0.5] * 20) == pytest.approx(1000.0)
    assert math.isfinite(robust_zscore(1.0, [0.0] * 20))


BAD = [
    (math.nan, math.nan, "nan"),
    (math.inf, math.inf, "inf"),
    (0.5, math.nan, "gradient"),
    (0.5, math.inf, "gradient"),
]


@pytest.mark.parametrize(("loss", "grad_norm", "kind"), BAD)
def test_a_step_whose_gradient_is_not_finite_is_left_out_in_place(
    loss: float, grad_norm: float, kind: str
) -> None:
    healer = Healer(HealingConfig())
    assert healer.check(1, 0.4, 1.0).symptom is None
    verdict = healer.check(2, loss, grad_norm)
    assert verdict.action == "continue"
    assert verdict.symptom is not None
    incident = healer.record(verdict, iter([3, 2]), ["rank 1 (b): 00001/7"])
    assert (incident.kind, incident.step, incident.ordinals) == (kind, 2, (2, 3))
    assert incident.value == repr(loss if kind in ("nan", "inf") else grad_norm)
    assert (incident.action, incident.culprits) == ("skipped", ("rank 1 (b): 00001/7",))
    assert healer.skipped == set()  # a rewind to before it meets it again, and leaves it out again
    assert healer.check(3, 0.4, 1.0).symptom is None
    assert str(verdict.symptom).endswith("at step 2")


@pytest.mark.parametrize(("loss", "grad_norm", "kind"), BAD)
def test_a_second_bad_step_right_after_it_rewinds_and_skips_the_samples_of_both(
    loss: float, grad_norm: float, kind: str
) -> None:
    healer = Healer(HealingConfig())
    healer.record(healer.check(2, loss, grad_norm), [3, 2])
    resumed = Healer(HealingConfig())
    resumed.load_state(json.loads(json.dumps(healer.state())))
    for each in (healer, resumed):
        verdict = each.check(3, loss, grad_norm)
        assert verdict.action == "rewind"
        assert each.record(verdict, [5, 4]).kind == kind
        assert each.skipped == {2, 3, 4, 5}
    later = Healer(HealingConfig())  # what an older checkpoint knows, and then the journal
    later.load_state({"losses": [], "incidents": [{**i, "action": "skipped"} for i in healer.journal()]})
    assert later.skipped == set()
    later.merge(json.loads(json.dumps(healer.journal())))
    assert later.skipped == {2, 3, 4, 5}


def test_weights_that_are_not_finite_rewind_at_once() -> None:
    healer = Healer(HealingConfig())
    assert healer.check(2, math.nan, math.nan, poisoned=lambda: True).action == "rewind"
    # An update that was made although the loss was not finite: nobody knows what it did.
    assert healer.check(2, math.nan, 1.0).action == "rewind"


def test_bad_steps_have_a_budget_per_hundred_thousand_steps_and_so_have_rewinds() -> None:
    healer = Healer(HealingConfig(max_skips=2, max_rewinds=1))
    actions = []
    for step in (10, 20, 30, 40, 100_025, 100_045):
        verdict = healer.check(step, math.nan, math.nan)
        actions.append(verdict.action)
        if verdict.action != "stop":
            healer.record(verdict, [step])
    assert actions == ["continue", "continue", "rewind", "stop", "continue", "continue"]
    assert (
        "within 100000 steps"
        in Healer(HealingConfig(max_skips=0, max_rewinds=0)).check(1, math.nan, math.nan).message
    )


def test_old_journals_without_actions_were_rewinds() -> None:
    healer = Healer(HealingConfig())
    healer.merge([{"step": 5, "kind": "nan", "value": "nan", "zscore": None, "ordinals": [8, 9]}])
    assert healer.skipped == {8, 9}


def test_spikes_count_only_when_configured_and_after_some_history() -> None:
    losses = gaussian_losses(64)
    silent = Healer(HealingConfig())
    alert = Healer(HealingConfig(spike_zscore=8.0, spike_patience=1))
    assert alert.check(0, 100.0, 1.0).action == "continue"
    for step, loss in enumerate(losses):
        assert silent.check(step, loss, 1.0).action == "continue"
        assert alert.check(step, loss, 1.0).action == "continue"
    assert silent.check(64, 5.0, 1.0).action == "continue"
    verdict = alert.check(64, 5.0, 1.0)
    assert verdict.action == "rewind"
    assert verdict.symptom is not None
    assert verdict.symptom.kind == "spike"
    assert verdict.symptom.zscore is not None
    assert verdict.symptom.zscore > 8
    # A sudden fall is no spike.
    assert alert.check(65, 0.01, 1.0).action == "continue"


def test_a_spike_that_stays_rewinds_and_one_that_passes_is_noted() -> None:
    healer = Healer(HealingConfig(spike_zscore=8.0, spike_patience=3))
    for step, loss in enumerate(gaussian_losses(64)):
        healer.check(step, loss, 1.0)
    seen = []
    for step, loss in ((64, 5.0), (65, 5.0), (66, 0.5), (67, 5.0), (68, 5.0), (69, 5.0)):
        verdict = healer.check(step, loss, 1.0)
        if verdict.symptom is not None:
            seen.append((step, healer.record(verdict, [step]).action))
    assert seen == [(64, "noted"), (65, "noted"), (67, "noted"), (68, "noted"), (69, "rewound")]
    assert healer.skipped == {67, 68, 69}


def test_it_gives_up_after_the_configured_number_of_rewinds() -> None:
    healer = Healer(HealingConfig(max_rewinds=2))
    for step in (1, 2):
        assert heal(healer, step, math.nan, [step])
    verdict = healer.check(3, math.nan, None)
    assert verdict.action == "stop"
    assert "healing.max_rewinds=2" in verdict.message


def test_switched_off_it_stops_at_once() -> None:
    verdict = Healer(HealingConfig(enabled=False)).check(1, math.nan, None)
    assert verdict.action == "stop"
    assert "healing.enabled" in verdict.message


def test_state_makes_the_same_decisions_after_a_restart() -> None:
    config = HealingConfig(spike_zscore=6.0, spike_window=32)
    unbroken = Healer(config)
    losses = gaussian_losses(80, seed=3)
    for step, loss in enumerate(losses[:40]):
        unbroken.check(step, loss, 1.0)
    assert heal(unbroken, 40, math.nan, [400, 401])
    resumed = Healer(config)
    resumed.load_state(json.loads(json.dumps(unbroken.state())))
    for step, loss in enumerate([*losses[40:], 9.0]):
        assert unbroken.check(step, loss, 1.0) == resumed.check(step, loss, 1.0)
    assert unbroken.state() == resumed.state()
    assert resumed.skipped >= {400, 401}


def test_a_rewind_keeps_incidents_and_restores_the_history() -> None:
    healer = Healer(HealingConfig(spike_zscore=6.0))
    for step in range(10):
        healer.check(step, 0.5 + step / 100, 1.0)
    saved = json.loads(json.dumps(healer.state()))
    for step in range(10, 20):
        healer.check(step, 0.6, 1.0)
    assert heal(healer, 20, math.inf, [77])
    healer.load_state(saved)
    assert healer.skipped == {77}
    assert healer.state()["losses"] == saved["losses"]


def test_the_recent_loss_is_the_mean_of_the_window_and_travels_with_the_state() -> None:
    healer = Healer(HealingConfig(spike_window=2))
    assert healer.recent_loss is None
    for step, loss in enumerate((9.0, 0.5, math.nan, 0.25)):
        healer.check(step, loss, 1.0)
    assert healer.recent_loss == 0.375
    resumed = Healer(HealingConfig(spike_window=2))
    resumed.load_state(json.loads(json.dumps(healer.state())))
    assert resumed.recent_loss == 0.375


def test_journal_is_merged_once() -> None:
    first = Healer(HealingConfig())
    assert heal(first, 5, math.nan, [8, 9])
    journal = json.loads(json.dumps(first.journal()))
    second = Healer(HealingConfig())
    second.merge(journal)
    second.merge(journal)
    assert second.journal() == first.journal()
    assert second.skipped == {8, 9}
