"""VBench's overall consistency: ViCLIP's agreement of video and prompt."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from itertools import pairwise

from sla2_eval.scoring.metrics.base import MetricSpec, Sample

SPECS = (
    MetricSpec(
        name="overall_consistency",
        kind="unpaired",
        title="Overall consistency",
        definition="cosine of the ViCLIP features of 8 frames and of the prompt",
        source="VBench, overall_consistency.py",
        value_range=(-1.0, 1.0),
        higher_is_better=True,
        licence="Apache-2.0 (InternVid)",
        weights=("viclip",),
        packages=("vbench",),
        needs_prompt=True,
        vbench="overall_consistency",
        settings={"frames": 8},
        revision=2,
    ),
)


def load(name: str, settings: dict, device: str) -> Callable[[Sample], float]:
    """The scorer: VBench's own copy of ViCLIP, with `encode_vision(video, test=True)` and
    `encode_text(text)`.
    """
    import numpy as np
    import torch
    from torch.nn.functional import normalize
    from vbench.third_party.ViCLIP import viclip
    from vbench.third_party.ViCLIP.simple_tokenizer import SimpleTokenizer

    from sla2_eval.scoring.metrics.loading import CLIP_MEAN, CLIP_STD, prepared, weight_path

    vocabulary = files(viclip.__package__) / "bpe_simple_vocab_16e6.txt.gz"
    tokenizer = SimpleTokenizer(str(vocabulary))
    model = (
        viclip.ViCLIP(tokenizer=tokenizer, pretrain=str(weight_path("viclip", settings)))
        .to(device)
        .eval()
    )

    def score(sample: Sample) -> float:
        chosen = np.ascontiguousarray(
            sample.frames[middles(len(sample.frames), settings["frames"])]
        )
        x = prepared(
            chosen,
            device,
            224,
            CLIP_MEAN,
            CLIP_STD,
            mode="bicubic",
            crop=True,
            antialias=False,
            whole=True,
        )
        with torch.inference_mode():
            video = normalize(model.encode_vision(x[None], test=True).float(), dim=-1)
            text = normalize(model.encode_text(sample.prompt).float(), dim=-1)
        return float((video @ text.T)[0, 0])

    return score


def middles(length: int, count: int) -> list[int]:
    """The middle frame of each of `count` equal parts of a video; the last is repeated where there
    are too few.
    """
    import numpy as np

    parts = np.linspace(0, length, min(count, length) + 1).astype(int)
    found = [int(start + end - 1) // 2 for start, end in pairwise(parts)]
    return found + [found[-1]] * (count - len(found))
