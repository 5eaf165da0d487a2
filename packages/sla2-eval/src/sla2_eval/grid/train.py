"""One variant trained into a folder: what `sla2 train router` and `sla2 train finetune` do."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from sla2_eval.generation.sampling import model_fingerprint
from sla2_eval.grid import steps
from sla2_eval.grid.settings import TrainSettings
from sla2_eval.grid.source import open_source, with_shift
from sla2_eval.parallel.launch import is_first_process, launched_processes
from sla2_eval.runs.folders import note_settings
from sla2_eval.runs.progress import Report, silent


def train(
    settings: TrainSettings, folder: Path, *, tune: bool, report: Report = silent
) -> dict[str, Any]:
    """Training data, captures, stage 1, and stage 2 if `tune`; returns the last one's report.

    Args:
        folder: gets data/, captures/, stage1/ and stage2/, each with an adapter; run again,
            finished parts are not done twice.

    Raises:
        ValueError: a model that cannot be trained here, a folder made with other settings, or
            several processes for what one does: everything before stage 2.
    """
    from sla2_core.training.stage1.train import REPORT_NAME

    source = open_source(settings)
    settings = with_shift(settings, source)
    attention, router = settings.attention, folder / "stage1"
    finished = (router / REPORT_NAME).exists()
    # A variant without anything to learn in stage 1 is still measured by `sla2 train router`.
    learns = attention.learns_in_stage1() or not tune
    if launched_processes() > 1 and not (tune and (finished or not learns)):
        raise ValueError(
            f"--out: expected a finished stage 1 in {folder} for several processes, got none; run"
            " sla2 train router in one"
        )
    if not is_first_process():
        report = silent
    inputs = settings.model_dump(mode="json", include={"video", "data", "capture"})
    if settings.data.videos is not None:
        inputs["data"]["videos"] = str(settings.data.videos.resolve())
    if settings.expert is not None:
        inputs["expert"] = settings.expert
    inputs |= {"model": model_fingerprint(settings.model), "shift": settings.stage2.shift}
    made = any((folder / name).exists() for name in ("data", "captures"))
    note_settings(folder / "inputs.json", inputs, replace=not made)
    data = functools.cache(
        functools.partial(source.encode, settings.data, folder / "data", report=report)
    )
    found: dict[str, Any] = {}
    if learns:
        captures = folder / "captures"
        if not steps.is_captured(settings.capture, captures):
            steps.capture_qkv(
                source,
                data(),
                settings.capture,
                captures,
                shift=settings.stage2.shift,
                order=attention.order(),
                sigma_range=settings.stage2.sigma_range,
                report=report,
            )
        config = replace(settings.stage1, seed=settings.seed)
        found = steps.stage1(source, attention, captures, config, router, report=report)
    if tune:
        tuning = replace(settings.stage2, seed=settings.seed)
        start = router if learns else None
        found = steps.stage2(
            source, attention, start, data, tuning, folder / "stage2", report=report
        )
    return found
