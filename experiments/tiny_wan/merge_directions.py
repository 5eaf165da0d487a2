"""Turns the teacher that knew the words left, right, up, down into the one that knows horizontally,
vertically.

The teacher was first trained on captions with four directions (6,000 steps) and moved along the
right axis but either way along it, at chance. The captions now name the axis only, and its text
embedding's columns for the two directions of an axis are averaged, so that the words it never told
apart become one. Run on the weights of the commit named in README.md:

    python experiments/tiny_wan/merge_directions.py OLD_TRANSFORMER_DIR OUT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from sla2_eval.tiny import model as tiny

OLD_MOTIONS = 4  # left, right, up, down stood last among the words


def main(source: str, out: str) -> None:
    old = WanTransformer3DModel.from_pretrained(source)
    tensors = old.state_dict()
    name = "condition_embedder.text_embedder.linear_1.weight"
    words = tensors[name].shape[1] - tiny.CAPTION_LENGTH
    fixed, motions, places = tensors[name].split(
        [words - OLD_MOTIONS, OLD_MOTIONS, tiny.CAPTION_LENGTH], dim=1
    )
    tensors[name] = torch.cat([fixed, motions.unflatten(1, (2, 2)).mean(2), places], dim=1)
    new = tiny.build_transformer()
    new.load_state_dict(tensors)
    new.save_pretrained(Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
