"""Means with 95 % confidence intervals: over the prompts of one training, or over training seeds
and prompts together.

Prompts are the unit, never videos: the videos of one prompt are not independent.

| what | interval |
|---|---|
| 0/1 values | Wilson's with continuity correction |
| means over 8 prompts or more | studentised bootstrap over prompts |
| means over fewer, and sets of videos over seeds | Student's t |
| means over several seeds | seeds and prompts as crossed random effects |
| one prompt | unknown |

Why these, at a nominal 95 %: Wilson's interval without the correction covers 92 % at n = 50 and
p = 0.02, and 90 % in its dips at n = 16; Student's t over 16 prompts covers 91 % of a skewed
distribution's means, BCa about as much, the studentised bootstrap 94 %.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

Z = 1.959963984540054  # the normal's two-sided 95 % quantile
RESAMPLES = 4999
LEAST_RESAMPLED = 8  # prompts; fewer give too few different resamples
_DEGENERATE = 0.01  # share of resamples without spread from which on the bootstrap is not used

# The values of each video by prompt, and those of every training seed.
ByPrompt = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Interval:
    """A mean over `n` prompts, or seeds, and its 95 % confidence interval; `low` and `high` are
    None where nothing is known of the spread. `method` names the interval in words.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    method: str

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Spread:
    """The variance of a mean and the degrees of freedom that it is known with."""

    variance: float
    freedom: float

    @property
    def quantile(self) -> float:
        """Student's, two-sided 95 %."""
        from scipy.stats import t

        return float(t.ppf(0.975, self.freedom))


def over_prompts(values: ByPrompt, *, binary: bool = False) -> Interval:
    """Mean over prompts of each prompt's mean, with its interval; `binary`: values are 0 or 1.
    Raises ValueError for no values.
    """
    return over_seeds_and_prompts([values], binary=binary)


def over_seeds_and_prompts(seeds: Sequence[ByPrompt], *, binary: bool = False) -> Interval:
    """Mean of the prompts that every training seed has, with an interval for another training and
    other prompts. Raises ValueError for no values.
    """
    table = means_table(seeds)
    if not table.shape[1]:  # seeds without a common prompt
        means = [float(np.mean([np.mean(v) for v in seed.values()])) for seed in seeds]
        return Interval(math.fsum(means) / len(means), None, None, 0, "unknown: no common prompt")
    mean, prompts = math.fsum(table.ravel()) / table.size, table.shape[1]
    if prompts == 1:
        return Interval(mean, None, None, 1, "unknown: one prompt")
    if binary:
        whole = len(seeds) == 1 and all(len(found) == 1 for found in seeds[0].values())
        low, high = _wilson(mean, prompts if whole else _effective(table))
        return Interval(mean, low, high, prompts, "Wilson, continuity-corrected")
    if len(table) > 1:
        found = spread(table)
        half = found.quantile * math.sqrt(found.variance)
        return Interval(mean, mean - half, mean + half, prompts, "t over seeds and prompts")
    low, high, method = of_mean(table[0])
    return Interval(mean, low, high, prompts, method)


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean of one value a training seed, as a set of videos gives, with Student's t interval.
    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("values: expected at least one seed, got none")
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean, None, None, 1, "unknown: one set of videos")
    low, high = students(np.asarray(values, dtype=np.float64))
    return Interval(mean, low, high, len(values), "t over seeds")


def means_table(seeds: Sequence[ByPrompt]) -> np.ndarray:
    """Float64 (seeds, prompts): each prompt's mean in each seed, for the prompts that all seeds
    have, in alphabetical order. Raises ValueError where there are no values.
    """
    if not seeds or not all(seeds):
        raise ValueError("values: expected at least one prompt of each seed, got none")
    common = sorted(set(seeds[0]).intersection(*seeds[1:]))
    rows = [[math.fsum(seed[prompt]) / len(seed[prompt]) for prompt in common] for seed in seeds]
    return np.array(rows, dtype=np.float64).reshape(len(seeds), len(common))


def spread(table: np.ndarray) -> Spread:
    """Of the mean of a (seeds, prompts) table with at least two prompts.

    One seed: prompts are the sample. Several: both are samples, crossed, as readers and cases are
    in studies of diagnosis, with the degrees of freedom of Hillis (Statistics in Medicine 26, 2007)
    where the seeds differ. A difference between seeds thus widens the interval however many prompts
    there are. Two seeds say little of it: where they make most of the variance, the interval covers
    88 %.
    """
    seeds, prompts = table.shape
    by_prompt = table.mean(axis=0)
    of_prompts = seeds * float(by_prompt.var(ddof=1))
    if seeds == 1:
        return Spread(of_prompts / prompts, prompts - 1)
    by_seed = table.mean(axis=1)
    of_seeds = prompts * float(by_seed.var(ddof=1))
    rest = table - by_seed[:, None] - by_prompt + table.mean()
    of_both = float((rest**2).sum()) / ((seeds - 1) * (prompts - 1))
    total = max(of_seeds + max(of_prompts - of_both, 0.0), of_prompts)
    freedom = prompts - 1.0
    if of_seeds > 0:
        freedom = min(freedom, total**2 / (of_seeds**2 / (seeds - 1)))
    return Spread(total / table.size, freedom)


def of_mean(sample: np.ndarray) -> tuple[float, float, str]:
    """Low, high and method for the mean of a sample of at least two values."""
    if len(sample) >= LEAST_RESAMPLED and (found := studentised(sample)):
        return (*found, "studentised bootstrap over prompts")
    return (*students(sample), "Student's t over prompts")


def students(sample: np.ndarray) -> tuple[float, float]:
    """Student's t interval of the mean of at least two values."""
    from scipy.stats import t

    error = sample.std(ddof=1) / math.sqrt(len(sample))
    half = float(t.ppf(0.975, len(sample) - 1) * error)
    mean = float(sample.mean())
    return mean - half, mean + half


def studentised(sample: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """The studentised bootstrap interval of the mean (Efron and Tibshirani 1993, section 12.5);
    None where too many resamples are constant.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    root, mean = math.sqrt(len(sample)), sample.mean()

    def statistic(drawn: np.ndarray, axis: int) -> np.ndarray:
        return (drawn.mean(axis) - mean) * root / drawn.std(axis, ddof=1)

    # Constant resamples have no statistic; those are counted below.
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)
        drawn = bootstrap(
            (sample,),
            statistic,
            n_resamples=resamples,
            batch=max(1, 500_000 // len(sample)),  # so that many prompts do not need much memory
            method="percentile",
            rng=np.random.default_rng(0),
        ).bootstrap_distribution
    finite = drawn[np.isfinite(drawn)]
    if len(finite) < (1 - _DEGENERATE) * resamples:
        return None
    least, most = np.quantile(finite, (0.025, 0.975), method="weibull")
    error = sample.std(ddof=1) / root
    return float(mean - most * error), float(mean - least * error)


def _effective(table: np.ndarray) -> float:
    """How many independent 0/1 values know a proportion as well as a (seeds, prompts) table does
    (Korn and Graubard, Survey Methodology 24, 1998); as many as there are prompts where the table
    has no spread.
    """
    mean, found = float(table.mean()), spread(table)
    if found.variance <= 0:
        return table.shape[1]
    return mean * (1 - mean) / found.variance * (Z / found.quantile) ** 2


def _wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's score interval with continuity correction (Newcombe 1998, method 4), for a count
    that need not be whole, which scipy's `proportion_ci` wants.
    """
    z, rest = Z, 1 - share
    down = 1 + z * math.sqrt(max(z**2 - 2 - 1 / count + 4 * share * (count * rest + 1), 0.0))
    up = 1 + z * math.sqrt(max(z**2 + 2 - 1 / count + 4 * share * (count * rest - 1), 0.0))
    middle, scale = 2 * count * share + z**2, 2 * (count + z**2)
    low = 0.0 if share == 0 else max(0.0, (middle - down) / scale)
    high = 1.0 if share == 1 else min(1.0, (middle + up) / scale)
    return low, high
