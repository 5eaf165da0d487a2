"""The quickstart: the whole pipeline on a built-in tiny model, as one small grid of variants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sla2_eval.grid.ablation import GridResult, run_grid
from sla2_eval.grid.settings import AblationSettings
from sla2_eval.runs.progress import Report, silent
from sla2_eval.runs.settings import validate
from sla2_eval.tiny.model import NAMES, weights_of

# Variants whose adapters are shipped beside the weights of a built-in model.
SHIPPED = (
    {"name": "pooled-97", "label": "SLA2 97 %, pooled", "family": "SLA2, pooled complement"},
    {"name": "pooled-90", "label": "SLA2 90 %, pooled", "family": "SLA2, pooled complement"},
    {"name": "sla2-97", "label": "SLA2 97 %", "family": "SLA2"},
    {"name": "sla2-95", "label": "SLA2 95 %", "family": "SLA2"},
    {"name": "sla2-90", "label": "SLA2 90 %", "family": "SLA2"},
    {"name": "sla-97", "label": "SLA 97 %", "family": "SLA"},
)
# What is trained here, in a minute or two each: beside shipped adapters the first alone.
LIVE = (
    {"name": "sla2-97", "label": "SLA2 97 %", "family": "SLA2", "attention": {"topk": 0.03}},
    {"name": "sla2-90", "label": "SLA2 90 %", "family": "SLA2", "attention": {"topk": 0.10}},
    {
        "name": "sla-97",
        "label": "SLA 97 %",
        "family": "SLA",
        "attention": {"topk": 0.03, "variant": "sla"},
    },
)


@dataclass(frozen=True)
class Size:
    """What two cores do with a model in minutes: videos of each variant, steps of stage 2 and of
    stage 1, and the shipped adapters.
    """

    prompts: int
    steps: int
    stage1_steps: int = 200
    shipped: tuple[str, ...] = tuple(variant["name"] for variant in SHIPPED)


# A step or a video at 4,096 tokens takes several times as long as at 1,024: fewer of both. SLA has
# been trained there as long as SLA2 with pooled keys.
SIZES = {
    "tiny-4k": Size(
        prompts=8,
        steps=15,
        stage1_steps=100,
        shipped=("pooled-97", "pooled-90", "sla2-97", "sla-97"),
    )
}
OTHER = Size(prompts=16, steps=200)


def variants_of(model: str) -> list[dict[str, Any]]:
    """The quickstart's variants of a model: its shipped adapters and one short training; of a model
    without shipped adapters, short trainings alone.
    """
    size = SIZES.get(model, OTHER)
    folder = weights_of(model) / "adapters" if model in NAMES else None
    if folder is None or not folder.is_dir():
        return [dict(variant) for variant in LIVE]
    found = [
        {**variant, "adapter": folder / variant["name"]}
        for variant in SHIPPED
        if variant["name"] in size.shipped and (folder / variant["name"]).is_dir()
    ]
    live = {
        "name": "sla2-97-here",
        "label": f"SLA2 97 %, trained here ({size.steps} steps)",
        "family": "SLA2, trained here",
    }
    return [*found, LIVE[0] | live]


def settings(model: str = "tiny-4k", workers: int = 2, **changes: Any) -> AblationSettings:
    """The quickstart's settings, in INT8: shipped adapters where the model has them, and a few
    minutes of training on one core.
    """
    size = SIZES.get(model, OTHER)
    values = {
        "title": "SLA2 quickstart: the tiny Wan on this machine",
        "model": model,
        "workers": workers,
        "attention": {"precision": "int8", "block_q": 32, "block_k": 16},
        "data": {"num_videos": 256},
        "capture": {"samples": 8},
        "stage1": {"steps": size.stage1_steps, "topk": (0.03, 0.1), "max_scores": 1 << 22},
        "stage2": {
            "steps": size.steps,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "alpha_learning_rate": 1e-2,
            "loss": "distill",
            "decay": "cosine",
            "autocast": "auto",
        },
        "generate": {"num_prompts": size.prompts, "steps": 20},
        "variants": variants_of(model),
    }
    return validate(values | changes, AblationSettings, "quickstart")


def run_quickstart(
    chosen: AblationSettings, out: str | Path, *, report: Report = silent
) -> GridResult:
    """Run the pipeline into `out` and return where the report is; killed and started again, it goes
    on where it was.
    """
    notes = [
        "Stage 2 of SLA2 ran with the low-bit forward on (quantisation-aware training).",
        "Every variant starts from the same noise as full attention, prompt by prompt.",
    ]
    if any(variant.adapter is not None for variant in chosen.variants):
        notes.append(
            "Variants without 'trained here' in their name have adapters that are shipped with the"
            " model; training.json beside each says how it was trained."
        )
    return run_grid(chosen, out, notes=tuple(notes), report=report)
