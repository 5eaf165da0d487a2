"""Paired comparisons of two variants: the difference over the videos that both have, its interval,
a test, and Holm's correction over several.

| what | test | interval |
|---|---|---|
| 0/1, one video a prompt | McNemar's, exact | Bonett and Price |
| one training | sign flips of the prompts' differences | as of a mean |
| several training seeds | t over seeds and prompts, crossed, unless sign flips show less | t |
| one prompt in common | unknown | unknown |
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from sla2_eval.scoring.intervals import (
    Interval,
    Z,
    means_table,
    over_seeds_and_prompts,
    spread,
)

FLIPS = 9999  # random ones; all of them where there are no more
LEVEL = 0.05

# The value of each video by (prompt, file name), and those of each training seed; None: not trained
Values = Mapping[tuple[str, str], float]
BySeed = Mapping[int | None, Values]


@dataclass(frozen=True)
class Difference:
    """First variant minus second: the mean and its 95 % interval, the p-value of no difference
    (None: unknown), and how many videos of how many seeds both have.
    """

    interval: Interval
    p: float | None
    test: str
    num_videos: int
    num_seeds: int

    def to_dict(self) -> dict:
        counts = {"num_videos": self.num_videos, "num_seeds": self.num_seeds}
        return {**self.interval.to_dict(), "p": self.p, "test": self.test, **counts}


def compare(first: BySeed, second: BySeed, *, binary: bool = False) -> Difference | None:
    """The difference of two variants over the videos that both have; None where they have none in
    common.

    Seeds of the same number are paired. A variant that was not trained is paired with every seed.
    """
    pairs = _paired(first, second)
    seeds = [seed for seed in map(_by_prompt, pairs) if seed]
    if not seeds:
        return None
    table = means_table(seeds)
    prompts = table.shape[1]
    counts = {"num_videos": sum(len(seed) for seed in pairs), "num_seeds": len(seeds)}
    if prompts < 2:
        return Difference(over_seeds_and_prompts(seeds), None, "unknown", **counts)
    single = len(seeds) == 1 and all(len(found) == 1 for found in seeds[0].values())
    if binary and single:
        interval, p = _binary(table[0])
        return Difference(interval, p, "exact McNemar", **counts)
    differences = table.mean(axis=0)
    interval, p = over_seeds_and_prompts(seeds), flips(differences)
    if binary and not differences.any():
        interval = _binary(differences)[0]
    if len(seeds) == 1:
        return Difference(interval, p, "sign flips over prompts", **counts)
    return Difference(interval, max(p, _students(table)), "t over seeds and prompts", **counts)


def _students(table: np.ndarray) -> float:
    """The p-value of a mean of zero of a (seeds, prompts) table, two-sided."""
    from scipy.stats import t

    found = spread(table)
    if found.variance == 0:
        return 0.0 if table.any() else 1.0
    return 2 * float(t.sf(abs(table.mean()) / math.sqrt(found.variance), found.freedom))


def _paired(first: BySeed, second: BySeed) -> list[dict[tuple[str, str], float]]:
    """The differences of the common videos, by seed."""
    if set(first) == {None} or set(second) == {None}:
        chosen = [(one, other) for one in first for other in second]
    else:
        chosen = [(seed, seed) for seed in first if seed in second]
    return [
        {
            key: first[one][key] - second[other][key]
            for key in sorted(first[one].keys() & second[other].keys())
        }
        for one, other in chosen
    ]


def _by_prompt(values: Values) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for (prompt, _), value in values.items():
        found.setdefault(prompt, []).append(value)
    return found


def flips(differences: np.ndarray) -> float:
    """The p-value of paired differences of mean zero: how often random signs move the mean as far
    from zero, two-sided; exact where there are at most FLIPS + 1 choices of signs.
    """
    from scipy.stats import permutation_test

    if not differences.any():
        return 1.0
    return float(
        permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            n_resamples=FLIPS,
            batch=max(1, 500_000 // len(differences)),
            rng=np.random.default_rng(0),
        ).pvalue
    )


def _binary(differences: np.ndarray) -> tuple[Interval, float]:
    """Interval and p-value of the difference of paired 0/1 values.

    The interval is Bonett and Price's adjusted Wald (Statistical Methods in Medical Research 21,
    2012): one is added to both counts of discordant pairs, so that none of them is not certainty.
    """
    from scipy.stats import binomtest

    count, up, down = len(differences), int((differences > 0).sum()), int((differences < 0).sum())
    p = float(binomtest(up, up + down).pvalue) if up + down else 1.0
    more, fewer = (up + 1) / (count + 2), (down + 1) / (count + 2)
    half = Z * math.sqrt((more + fewer - (more - fewer) ** 2) / (count + 2))
    low, high = max(-1.0, more - fewer - half), min(1.0, more - fewer + half)
    return Interval(float(differences.mean()), low, high, count, "Bonett and Price"), p


def holm(p_values: Mapping[Hashable, float | None]) -> dict[Hashable, float | None]:
    """Holm's step-down correction: a p-value below LEVEL afterwards is wrong about any of them with
    a chance of at most LEVEL. Unknown ones stay unknown and do not count.
    """
    known = sorted((p, number) for number, p in enumerate(p_values.values()) if p is not None)
    corrected: dict[int, float] = {}
    largest = 0.0
    for rank, (p, number) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[number] = largest
    return {key: corrected.get(number) for number, key in enumerate(p_values)}


def differs(corrected: float | None) -> bool:
    """Whether a corrected p-value shows a difference; an unknown one does not."""
    return corrected is not None and corrected < LEVEL
