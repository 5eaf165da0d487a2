"""Intervals: hand-computed means, the unit, and how often they hold the truth."""

import numpy as np
import pytest
from scipy import stats
from sla2_eval.scoring.intervals import (
    _wilson,
    over_prompts,
    over_seeds,
    over_seeds_and_prompts,
    spread,
    studentised,
)


def prompts(values) -> dict[str, list[float]]:
    return {f"{number:03d}": [float(value)] for number, value in enumerate(values)}


def test_prompts_weigh_alike_whatever_their_number_of_videos():
    interval = over_prompts({"a": [0.0, 0.0, 0.0], "b": [1.0]})
    assert (interval.mean, interval.n) == (0.5, 2)
    half = 12.7062 * np.std([0, 1], ddof=1) / 2**0.5
    assert (interval.low, interval.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert interval.method == "Student's t over prompts"


def test_one_observation_has_no_interval():
    for found in (over_prompts({"a": [2.0, 3.0]}), over_seeds([2.5])):
        assert (found.mean, found.low, found.high) == (2.5, None, None)
        assert found.method.startswith("unknown: one")
    apart = over_seeds_and_prompts([{"a": [1.0], "b": [3.0]}, {"c": [4.0]}])
    assert (apart.mean, apart.low, apart.method) == (3.0, None, "unknown: no common prompt")
    with pytest.raises(ValueError, match="values: expected at least one prompt"):
        over_prompts({})


def test_wilson_is_scipy_s_and_none_of_16_is_not_certainty():
    for k, n in ((0, 16), (1, 16), (7, 16), (16, 16), (1, 50), (3, 7)):
        theirs = stats.binomtest(k, n).proportion_ci(method="wilsoncc")
        assert _wilson(k / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    none = over_prompts(prompts([0] * 16), binary=True)
    assert (none.low, none.high) == pytest.approx((0.0, 0.2407), abs=1e-4)


@pytest.mark.parametrize("n", [16, 50])
def test_0_1_intervals_cover_the_proportion(n):
    """Without simulation: the probability of each count, at every p from 0.02 to 0.98."""
    p = np.linspace(0.02, 0.98, 193)
    covered = np.zeros_like(p)
    for k in range(n + 1):
        found = over_prompts(prompts([1] * k + [0] * (n - k)), binary=True)
        covered += stats.binom.pmf(k, n, p) * ((found.low <= p) & (p <= found.high))
    assert covered.min() > 0.93


DRAWS = {
    "normal": (lambda rng, n: rng.normal(3, 1, n), 3.0),
    "beta(8, 2)": (lambda rng, n: rng.beta(8, 2, n), 0.8),
    "exponential": (lambda rng, n: rng.exponential(1, n), 1.0),
    "two groups": (lambda rng, n: rng.normal(0, 1, n) + 6 * (rng.random(n) < 0.2), 1.2),
}


@pytest.mark.parametrize(("draw", "truth"), DRAWS.values(), ids=DRAWS)
def test_intervals_of_means_over_16_prompts_cover_them(draw, truth):
    rng, inside = np.random.default_rng(6), 0
    for _ in range(1000):
        low, high = studentised(draw(rng, 16), resamples=599)
        inside += low <= truth <= high
    assert inside / 1000 >= 0.93


@pytest.mark.parametrize(("of_seeds", "of_prompts"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.0)])
def test_intervals_over_three_seeds_and_16_prompts_cover_the_mean(of_seeds, of_prompts):
    """A prompt bootstrap of the seeds' means misses every other time where trainings differ."""
    rng, inside = np.random.default_rng(2), 0
    for _ in range(1500):
        table = of_seeds * rng.normal(size=(3, 1)) + of_prompts * rng.normal(size=(1, 16))
        table = table + 0.5 * rng.normal(size=(3, 16))
        found = spread(table)
        inside += abs(table.mean()) <= found.quantile * found.variance**0.5
    assert inside / 1500 >= 0.93


def test_a_proportion_over_seeds_and_prompts_is_covered():
    """Prompts that a model finds easy or hard, and trainings that differ."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        logits = 2 * rng.normal(size=(1, 16)) + 0.3 * rng.normal(size=(3, 1))
        seeds = [prompts(row) for row in rng.random((3, 16)) < 1 / (1 + np.exp(-logits))]
        found = over_seeds_and_prompts(seeds, binary=True)
        inside += found.low <= 0.5 <= found.high
    assert 0.93 <= inside / 400 < 0.995


def test_seeds_that_differ_widen_the_interval_however_many_prompts_there_are():
    table = np.array([[1.0] * 99 + [1.1], [2.0] * 99 + [2.1], [3.0] * 99 + [3.1]])
    found = over_seeds_and_prompts([prompts(row) for row in table])
    students = over_seeds([1.001, 2.001, 3.001])
    assert found.method == "t over seeds and prompts"
    assert (found.low, found.high) == pytest.approx((students.low, students.high), abs=0.01)
    assert students.high - 2.001 == pytest.approx(4.3027 / 3**0.5, abs=1e-4)


def test_a_prompt_that_one_seed_lacks_is_left_out():
    found = over_seeds_and_prompts([prompts([1, 2, 9]), prompts([3, 4])])
    assert (found.mean, found.n) == (2.5, 2)


def test_order_of_prompts_does_not_matter():
    values = {str(i): [i * 0.1, 1 / (i + 1)] for i in range(9)}
    assert over_prompts(values) == over_prompts(dict(reversed(values.items())))
    assert over_prompts(values).method == "studentised bootstrap over prompts"


def test_values_that_are_nearly_all_alike_get_student_s_interval():
    found = over_prompts(prompts([1.0] * 15 + [0.9]))
    assert found.method == "Student's t over prompts"
    assert found.low < 1.0 - 0.1 / 16 < found.high


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("last", [0.5, 0.75])  # all resamples are constant; about a third are
def test_a_sample_that_is_nearly_constant_warns_of_nothing(last):
    values = {str(i): [0.5] for i in range(7)} | {"7": [last]}
    assert studentised(np.array([0.5] * 7 + [last]), resamples=199) is None
    assert over_prompts(values).method == "Student's t over prompts"
