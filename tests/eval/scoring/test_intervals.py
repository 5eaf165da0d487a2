"""Intervals: hand-computed means, the unit of resampling, pairing by prompt and index."""

import numpy as np
import pytest
from sla2_eval.scoring.intervals import over_prompts, over_seeds, paired_difference


def test_prompts_weigh_alike_whatever_their_number_of_videos():
    interval = over_prompts({"a": [0.0, 0.0, 0.0], "b": [1.0]})
    assert (interval.mean, interval.n) == (0.5, 2)
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_bootstrap_covers_the_mean_about_19_times_in_20():
    rng = np.random.default_rng(3)
    inside = 0
    for trial in range(200):
        interval = over_prompts(
            {str(i): [x] for i, x in enumerate(rng.normal(2.0, 1.0, 30))}, resamples=400, seed=trial
        )
        inside += interval.low <= 2.0 <= interval.high
    assert 176 <= inside <= 198


@pytest.mark.parametrize(("prompts", "least", "most"), [(3, 0.18, 0.32), (10, 0.05, 0.16)])
def test_bootstrap_over_few_prompts_is_too_narrow_by_as_much_as_is_said(prompts, least, most):
    rng = np.random.default_rng(4)
    missed = 0
    for trial in range(400):
        values = {str(i): [x] for i, x in enumerate(rng.normal(2.0, 1.0, prompts))}
        interval = over_prompts(values, resamples=400, seed=trial)
        missed += not interval.low <= 2.0 <= interval.high
    assert least < missed / 400 < most


def test_order_of_prompts_does_not_matter():
    values = {str(i): [i * 0.1, 1 / (i + 1)] for i in range(9)}
    assert over_prompts(values) == over_prompts(dict(reversed(values.items())))


def test_one_observation_has_no_interval():
    assert over_prompts({"a": [2.0]}).low is None
    assert over_seeds([2.0]).high is None
    assert not over_prompts({"a": [2.0]}).excludes_zero


def test_students_interval_of_three_seeds():
    interval = over_seeds([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.high - 2.0 == pytest.approx(4.303 / 3**0.5)


def test_paired_difference_uses_common_videos_alone():
    variant = {("a", 0): 3.0, ("b", 0): 5.0, ("c", 0): 100.0}
    reference = {("a", 0): 1.0, ("b", 0): 2.0, ("b", 1): -100.0}
    difference = paired_difference(variant, reference)
    assert (difference.mean, difference.low, difference.high, difference.n) == (2.5, 2.0, 3.0, 2)
    assert difference.excludes_zero
    assert paired_difference(variant, {}) is None


def test_pairing_sees_a_small_difference_between_prompts_that_differ_much():
    rng = np.random.default_rng(0)
    prompts = rng.normal(30.0, 5.0, 40)
    reference = {(str(i), 0): x for i, x in enumerate(prompts)}
    variant = {
        (str(i), 0): x - 0.2 + e for i, (x, e) in enumerate(zip(prompts, rng.normal(0, 0.2, 40)))
    }
    difference = paired_difference(variant, reference)
    assert difference.mean == pytest.approx(np.mean([variant[k] - reference[k] for k in variant]))
    assert difference.excludes_zero
    assert difference.low == pytest.approx(difference.mean - 1.96 * 0.2 / 40**0.5, abs=0.03)
    alone = [over_prompts({k[0]: [v] for k, v in side.items()}) for side in (variant, reference)]
    assert alone[0].low < alone[1].mean < alone[0].high  # without pairing it would be within noise
    same = paired_difference(variant, {k: v + 0.01 * (-1) ** int(k[0]) for k, v in variant.items()})
    assert not same.excludes_zero
