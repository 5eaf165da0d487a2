"""Training data of stage 2 as a data set of dictionaries: latents beside the model's conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class TensorData:
    """Latents (n, ...) and text embeddings (n, L, D) in memory, as a data set of n samples
    {"latents": ..., "encoder_hidden_states": ...}.

    Raises TypeError for what is no tensor, ValueError for other numbers of samples or none.
    """

    def __init__(self, latents: Tensor, text: Tensor):
        for name, x in (("latents", latents), ("text", text)):
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"data: expected tensors (latents, text), got {type(x).__name__} for {name}"
                )
        if len(latents) != len(text) or not len(latents):
            raise ValueError(
                f"data: expected as many latents as texts, at least one, got {len(latents)} and"
                f" {len(text)}"
            )
        self.latents, self.text = latents, text

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"latents": self.latents[index], "encoder_hidden_states": self.text[index]}


def as_dataset(data: Any) -> Any:
    """`data` itself if it has len() and items, or the TensorData of a (latents, text) pair.

    Raises TypeError for anything else, ValueError for no samples or a tuple of another length.
    """
    if isinstance(data, tuple):
        if len(data) != 2:
            raise ValueError(f"data: expected (latents, text), got a tuple of {len(data)}")
        return TensorData(*data)
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TypeError(
            "data: expected (latents, text) or a data set with len() and items, got"
            f" {type(data).__name__}"
        )
    if not len(data):
        raise ValueError("data: expected at least one sample, got none")
    return data


def collate(
    items: Sequence[Mapping[str, Tensor]],
    dropped: Sequence[bool],
    unconditional: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Stack samples to a batch: {name: (B, ...)}.

    Args:
        items: B samples, each {name: tensor without a batch dimension}.
        dropped: B flags, True for samples that are trained without their condition.
        unconditional: {name: tensor} to put in place of a dropped condition; other names keep their
            values. None puts zeros in place of encoder_hidden_states.

    Raises:
        ValueError: a sample with other keys or shapes than the first.
    """
    out = {}
    for name in items[0]:
        values = []
        for item, drop in zip(items, dropped):
            if set(item) != set(items[0]):
                raise ValueError(
                    f"data: expected the keys {sorted(items[0])} in every sample, got"
                    f" {sorted(item)}"
                )
            value = item[name]
            if drop and unconditional is not None and name in unconditional:
                value = unconditional[name]
            elif drop and unconditional is None and name == "encoder_hidden_states":
                value = torch.zeros_like(value)
            values.append(value)
        if any(v.shape != values[0].shape for v in values):
            raise ValueError(
                f"data: expected one shape for {name}, got"
                f" {sorted({tuple(v.shape) for v in values})}"
            )
        out[name] = torch.stack(values)
    return out
