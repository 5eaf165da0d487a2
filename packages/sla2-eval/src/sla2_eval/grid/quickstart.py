"""The quickstart: the whole pipeline on the built-in tiny model, as one small grid of variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sla2_eval.grid.ablation import GridResult, run_grid
from sla2_eval.grid.settings import AblationSettings
from sla2_eval.runs.progress import Report, silent
from sla2_eval.runs.settings import validate

VARIANTS = (
    {"name": "sla2-97", "label": "SLA2 97 %", "family": "SLA2", "attention": {"topk": 0.03}},
    {"name": "sla2-90", "label": "SLA2 90 %", "family": "SLA2", "attention": {"topk": 0.10}},
    {
        "name": "sla-97",
        "label": "SLA 97 %",
        "family": "SLA",
        "attention": {"topk": 0.03, "variant": "sla"},
    },
)


def settings(model: str = "tiny", workers: int = 2, **changes: Any) -> AblationSettings:
    """The quickstart's settings: three variants in INT8, a few minutes of training each on one
    core.
    """
    values = {
        "title": "SLA2 quickstart: the tiny Wan on this machine",
        "model": model,
        "workers": workers,
        "attention": {"precision": "int8", "block_q": 32, "block_k": 16},
        "data": {"num_videos": 256},
        "capture": {"samples": 8},
        "stage1": {"steps": 200, "topk": (0.03, 0.1), "max_scores": 1 << 22},
        "stage2": {
            "steps": 200,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "alpha_learning_rate": 1e-2,
            "decay": "cosine",
            "autocast": "auto",
        },
        "generate": {"num_prompts": 16, "steps": 20},
        "variants": VARIANTS,
    }
    return validate(values | changes, AblationSettings, "quickstart")


def run_quickstart(
    chosen: AblationSettings, out: str | Path, *, report: Report = silent
) -> GridResult:
    """Run the pipeline into `out` and return where the report is; killed and started again, it goes
    on where it was.
    """
    notes = (
        (
            "Stage 2 ran with the low-bit forward on (quantisation-aware training), the published"
            " SLA too."
        ),
        "Every variant starts from the same noise as full attention, prompt by prompt.",
    )
    return run_grid(chosen, out, notes=notes, report=report)
