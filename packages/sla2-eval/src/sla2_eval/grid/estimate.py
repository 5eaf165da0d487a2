"""What a grid will cost: counts what is left to do, and times one forward pass of the model on this
machine.
"""

from __future__ import annotations

import time
from pathlib import Path

from sla2_eval.generation import sampling as generation
from sla2_eval.grid import ablation
from sla2_eval.runs.settings import AblationSettings

# In forward passes of one video: a training step runs forward and backward; a distilled one also
# runs the teacher.
_STEP = {"diffusion": 3.0, "distill": 4.0}
_STAGE1_STEP = 1.5  # all layers on a few query blocks
_OVERHEAD = 8.0  # seconds a task: loading the model, the data, or the scoring process


def counts(settings: AblationSettings, out: Path) -> dict[str, int]:
    """What is not done yet: videos, stage-1 and stage-2 trainings, score sets."""
    grid, config = ablation.cells(settings), ablation.sampling(settings)
    prompts = ablation.prompts_of(settings)
    wanted = [
        out / "videos" / cell.name / generation.video_name(p, cell.seed)
        for cell in grid
        for p in prompts
    ]
    full = out / "videos" / ablation.REFERENCE
    wanted += [full / r.file_name for r in generation.plan(prompts, settings.seeds, config.seed)]
    routers = {cell.router for cell in grid if cell.router}
    tunings = {cell.tuned for cell in grid if cell.tuned}
    scores = [ablation.REFERENCE, *(cell.name for cell in grid)]
    return {
        "videos": sum(not path.exists() for path in wanted),
        "routers": sum(not (out / "work" / key / "report.json").exists() for key in routers),
        "tunings": sum(not (out / "work" / key / "finished.json").exists() for key in tunings),
        "scores": sum(not (out / "scores" / name / "results.json").exists() for name in scores),
    }


def seconds_per_forward(settings: AblationSettings) -> float:
    """Seconds of one full-attention forward pass of one video on one thread."""
    import torch

    generator = generation.load_generator(settings.model)
    request = generation.Request(ablation.prompts_of(settings)[0], 0, 0)
    config = generation.SamplingConfig(steps=1, guidance=1.0, dtype=settings.generate.dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator.sample([request], config)
        started = time.perf_counter()
        generator.sample([request] * 2, config)
        return (time.perf_counter() - started) / 2
    finally:
        torch.set_num_threads(threads)


def estimate(settings: AblationSettings, out: str | Path, processes: int) -> str:
    """One line: what is left to do and about how long it takes in so many processes as fast as one
    thread here.
    """
    left, forward = counts(settings, Path(out)), seconds_per_forward(settings)
    passes = (
        left["videos"] * settings.generate.steps * (1 if settings.generate.guidance == 1 else 2)
    )
    passes += (
        left["tunings"]
        * settings.stage2.steps
        * settings.stage2.batch_size
        * _STEP[settings.stage2.loss]
    )
    passes += left["routers"] * settings.stage1.steps * _STAGE1_STEP
    tasks = (
        left["tunings"]
        + left["routers"]
        + left["scores"]
        + left["videos"] / max(1, settings.generate.num_prompts)
    )
    minutes = (passes * forward + tasks * _OVERHEAD) / max(1, processes) / 60
    return (
        f"left to do: {left['routers']} routers, {left['tunings']} fine-tunings, {left['videos']}"
        f" videos, {left['scores']} score sets; about {max(1, round(minutes))} minutes in"
        f" {max(1, processes)} processes ({forward * 1000:.0f} ms a forward pass)"
    )
