"""CLIP features: likeness to the reference frame by frame, and agreement with the prompt."""

from __future__ import annotations

from collections.abc import Callable

from sla2_eval.scoring.metrics.base import MetricSpec, Sample, need_prompt, need_reference

SPECS = (
    MetricSpec(
        name="clip_similarity",
        kind="paired",
        title="CLIP similarity",
        definition=(
            "cosine of the CLIP ViT-B/32 image features of frame and reference frame, mean over"
            " frames"
        ),
        source="Radford et al. 2021; open_clip",
        value_range=(-1.0, 1.0),
        higher_is_better=True,
        licence="MIT (OpenAI CLIP)",
        weights=("clip_b32",),
        packages=("open_clip",),
        settings={"model": "ViT-B-32-quickgelu"},
    ),
    MetricSpec(
        name="clip_score",
        kind="unpaired",
        title="CLIP score",
        definition="cosine of the CLIP ViT-B/32 features of frame and prompt, mean over frames",
        source="Hessel et al. 2021, unscaled; open_clip",
        value_range=(-1.0, 1.0),
        higher_is_better=True,
        licence="MIT (OpenAI CLIP)",
        weights=("clip_b32",),
        packages=("open_clip",),
        needs_prompt=True,
        settings={"model": "ViT-B-32-quickgelu"},
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer: cosines of normalised features, averaged over frames in double precision."""
    from sla2_eval.scoring.metrics.clip_model import Clip

    clip = Clip("clip_b32", settings, device)

    def similarity(sample: Sample) -> float:
        return (
            (clip.images(sample.frames) * clip.images(need_reference(sample)))
            .sum(-1)
            .double()
            .mean()
            .item()
        )

    def agreement(sample: Sample) -> float:
        return (clip.images(sample.frames) @ clip.text(need_prompt(sample))).double().mean().item()

    return similarity if name == "clip_similarity" else agreement
