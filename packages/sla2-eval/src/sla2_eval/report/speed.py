"""Seconds a video, by wall clock while it was generated, with their spread and the machine."""

from __future__ import annotations

from statistics import median

import numpy as np

from sla2_eval.report.groups import Group
from sla2_eval.runs.progress import SPEED, read_batches

LEAST_BATCHES = 6  # fewer say too little of the spread for an interval


def speeds(groups: list[Group]) -> list[dict]:
    """A row for each variant and machine: {"variant", "device", "seconds" (the median over
    batches), "least", "most", "batches", "videos", "speedup", "speedup_low", "speedup_high"}.

    `speedup` is how many times as fast as the reference on the same machine, None where that is not
    known. Its interval is a bootstrap over batches.
    """
    taken = {group.label: _batches(group) for group in groups}
    name = next((group.label for group in groups if group.reference), None)
    full = taken[name] if name is not None else {}
    rows = []
    for label, by_device in taken.items():
        for device, batches in by_device.items():
            each = [seconds / videos for videos, seconds in batches]
            row = {"variant": label, "device": device, "seconds": round(median(each), 4)}
            row |= {"least": round(min(each), 4), "most": round(max(each), 4)}
            row |= {"batches": len(each), "videos": sum(videos for videos, _ in batches)}
            theirs = [seconds / videos for videos, seconds in full.get(device, ())]
            rows.append({**row, **_speedup(each if label == name else theirs, each)})
    return rows


def _batches(group: Group) -> dict[str, list[tuple[int, float]]]:
    """(videos, seconds) of each batch, by machine. One without a name is that of its folder."""
    found: dict[str, list[tuple[int, float]]] = {}
    read = set()
    for source, member in group.members:
        path = member.videos / SPEED if member.videos else None
        if path is None or not path.is_file() or path.resolve() in read:
            continue
        read.add(path.resolve())
        processor = source.about.get("hardware", {}).get("processor")
        unnamed = processor or f"unknown ({source.name})"
        for batch in read_batches(path.parent):
            if batch["videos"] and batch["seconds"] > 0:
                timed = (batch["videos"], batch["seconds"])
                found.setdefault(batch.get("device", unnamed), []).append(timed)
    return found


def _speedup(full: list[float], each: list[float]) -> dict[str, float | None]:
    if not full:
        return {"speedup": None, "speedup_low": None, "speedup_high": None}
    found = {"speedup": round(median(full) / median(each), 3)}
    if full is each or min(len(full), len(each)) < LEAST_BATCHES:
        return {**found, "speedup_low": None, "speedup_high": None}
    from scipy.stats import bootstrap

    interval = bootstrap(
        (np.array(full), np.array(each)),
        lambda a, b, axis: np.median(a, axis) / np.median(b, axis),
        method="percentile",
        n_resamples=4999,
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = round(float(interval.low), 3), round(float(interval.high), 3)
    return {**found, "speedup_low": low, "speedup_high": high}
