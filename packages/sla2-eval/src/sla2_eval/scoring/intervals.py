"""Means with confidence intervals: bootstrap over prompts, Student's t over seeds, and paired
differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000
# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the normal's is
# close enough.
_T95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval; `low` and `high` are None where one observation says
    nothing of spread.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly on one side of zero; False where there is no
        interval.
        """
        if self.low is None or self.high is None:
            return False
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict:
        return asdict(self)


def over_prompts(
    values: Mapping[str, Sequence[float]], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean over prompts of each prompt's mean, with a percentile bootstrap over prompts.

    The videos of one prompt are not independent, so the prompt is the unit. Over few prompts the
    interval is too narrow: it misses the mean one time in four with three, one in ten with ten, as
    any percentile bootstrap does. Raises ValueError for no values.
    """
    if not values:
        raise ValueError("values: expected at least one prompt, got none")
    means = np.array([math.fsum(values[prompt]) / len(values[prompt]) for prompt in sorted(values)])
    mean = math.fsum(means) / len(means)
    if len(means) < 2:
        return Interval(mean, None, None, len(means))
    rng, found, rows = np.random.default_rng(seed), [], max(1, 250_000 // len(means))
    for start in range(
        0, resamples, rows
    ):  # in pieces, so that many prompts do not need much memory
        drawn = rng.integers(len(means), size=(min(rows, resamples - start), len(means)))
        found.append(means[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return Interval(mean, float(low), float(high), len(means))


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean of one value a training seed, with Student's t interval. Raises ValueError for no
    values.
    """
    if not values:
        raise ValueError("values: expected at least one seed, got none")
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, None, None, count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = (_T95[count - 2] if count <= 31 else 1.96) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired_difference(
    variant: Mapping[tuple[str, str], float], reference: Mapping[tuple[str, str], float]
) -> Interval | None:
    """Variant minus reference over the (prompt, file name) that both have, with a bootstrap over
    prompts; None if none.
    """
    differences: dict[str, list[float]] = {}
    for key in sorted(variant.keys() & reference.keys()):
        differences.setdefault(key[0], []).append(variant[key] - reference[key])
    return over_prompts(differences) if differences else None
