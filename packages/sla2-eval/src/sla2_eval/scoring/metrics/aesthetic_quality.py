"""VBench's aesthetic quality: a linear head on CLIP features."""

from __future__ import annotations

from collections.abc import Callable

from sla2_eval.scoring.metrics.base import MetricSpec, MetricUnavailable, Sample

SPECS = (
    MetricSpec(
        name="aesthetic_quality",
        kind="unpaired",
        title="Aesthetic quality",
        definition=(
            "LAION's linear head on normalised CLIP ViT-L/14 features, / 10, mean over frames"
        ),
        source="VBench, aesthetic_quality.py",
        value_range=(0.0, 1.0),
        higher_is_better=True,
        licence="MIT (OpenAI CLIP, LAION)",
        weights=("clip_l14", "aesthetic_head"),
        packages=("open_clip",),
        vbench="aesthetic_quality",
        settings={"model": "ViT-L-14-quickgelu"},
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer. The head is a linear layer with `weight` (1, d) and `bias` (1,)."""
    from sla2_eval.scoring.metrics.clip_model import Clip
    from sla2_eval.scoring.metrics.loading import load_tensors

    clip = Clip("clip_l14", settings, device)
    head = load_tensors("aesthetic_head", settings)
    if sorted(head) != ["bias", "weight"] or head["weight"].shape != (
        1,
        clip.model.visual.output_dim,
    ):
        shapes = {key: tuple(value.shape) for key, value in head.items()}
        raise MetricUnavailable(
            f"unavailable: aesthetic_head: expected weight (1, {clip.model.visual.output_dim}) and"
            f" bias (1,), got {shapes}"
        )
    weight, bias = head["weight"][0].to(device).float(), head["bias"].to(device).float()

    def score(sample: Sample) -> float:
        features = clip.images(sample.frames, antialias=False)
        return ((features @ weight + bias) / 10).double().mean().item()

    return score
