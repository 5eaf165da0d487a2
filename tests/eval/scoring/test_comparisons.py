"""Paired comparisons: the videos in common, tests against scipy's own, Holm's correction."""

import numpy as np
import pytest
from scipy import stats
from sla2_eval.scoring.comparisons import compare, differs, flips, holm


def videos(values, index=0) -> dict[tuple[str, str], float]:
    return {(f"p{n}", f"p{n}-{index}.mp4"): float(value) for n, value in enumerate(values)}


def test_only_videos_that_both_have_are_compared():
    variant = {("a", "a-0"): 3.0, ("b", "b-0"): 5.0, ("c", "c-0"): 100.0}
    reference = {("a", "a-0"): 1.0, ("b", "b-0"): 2.0, ("b", "b-1"): -100.0}
    found = compare({None: variant}, {None: reference})
    assert (found.interval.mean, found.interval.n, found.num_videos) == (2.5, 2, 2)
    assert compare({None: variant}, {None: {}}) is None
    one = compare({None: {("a", "a-0"): 3.0}}, {None: reference})
    assert (one.p, one.interval.low, one.test) == (None, None, "unknown")
    assert not differs(one.p)


def test_pairing_sees_a_small_difference_between_prompts_that_differ_much():
    rng = np.random.default_rng(0)
    base = rng.normal(30.0, 5.0, 40)
    found = compare({None: videos(base - 0.2 + rng.normal(0, 0.2, 40))}, {None: videos(base)})
    assert found.p < 0.001
    assert found.interval.high < 0
    half = 1.96 * 0.2 / 40**0.5
    assert found.interval.low == pytest.approx(found.interval.mean - half, abs=0.03)
    zigzag = compare({None: videos(base)}, {None: videos(base + 0.01 * (-1) ** np.arange(40))})
    assert zigzag.p > 0.9


def test_sign_flips_are_exact_for_few_prompts():
    differences = np.array([0.3, 0.1, 0.2, 0.4, -0.05, 0.6])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    means = (differences[:, None] * signs).mean(0)
    expected = np.mean(np.abs(means) >= differences.mean() - 1e-12)
    assert flips(differences) == pytest.approx(expected)
    assert flips(np.zeros(9)) == 1.0


def test_0_1_values_are_compared_by_mcnemar():
    first, second = [1] * 9 + [0] * 7, [0] * 8 + [1, 1] + [0] * 6
    found = compare({None: videos(first)}, {None: videos(second)}, binary=True)
    assert found.p == pytest.approx(stats.binomtest(8, 9).pvalue)
    assert found.interval.mean == pytest.approx(7 / 16)
    same = compare({None: videos([1] * 16)}, {None: videos([1] * 16)}, binary=True)
    assert same.p == 1.0
    assert -0.2 < same.interval.low < -0.1 < 0.1 < same.interval.high < 0.2


def test_seeds_are_paired_by_number_and_a_model_without_training_with_each():
    rng = np.random.default_rng(5)
    base = rng.normal(size=(8, 16))
    first = {seed: videos(base[seed] + 1 + 0.5 * seed, seed) for seed in range(3)}
    second = {seed: videos(base[seed], seed) for seed in (0, 1, 2, 7)}
    found = compare(first, second)
    assert (found.num_seeds, found.num_videos, found.interval.n) == (3, 48, 16)
    # The differences vary over seeds alone, so this is the t-test of three values.
    assert found.p == pytest.approx(stats.ttest_1samp([1, 1.5, 2], 0).pvalue)
    untrained = {None: {k: v for seed in range(3) for k, v in second[seed].items()}}
    assert compare(first, untrained).to_dict() == found.to_dict()
    assert compare(untrained, first).interval.mean == pytest.approx(-found.interval.mean)


def test_a_test_of_nothing_is_wrong_one_time_in_twenty():
    rng, wrong = np.random.default_rng(3), np.zeros(2)
    for _ in range(300):
        noise = rng.exponential(1, 16) - rng.exponential(1, 16)
        wrong[0] += differs(compare({None: videos(noise)}, {None: videos(np.zeros(16))}).p)
        seeds = {s: videos(0.3 * rng.normal() + rng.normal(size=16), s) for s in range(3)}
        wrong[1] += differs(compare(seeds, {s: videos([0] * 16, s) for s in range(3)}).p)
    assert (wrong / 300 <= 0.08).all()


def test_holm_is_the_step_down_of_its_paper():
    corrected = holm({"a": 0.01, "b": 0.04, "c": None, "d": 0.03, "e": 0.005})
    assert corrected == {
        "a": pytest.approx(0.03),
        "b": pytest.approx(0.06),
        "c": None,
        "d": pytest.approx(0.06),
        "e": pytest.approx(0.02),
    }
    assert holm({}) == {}
