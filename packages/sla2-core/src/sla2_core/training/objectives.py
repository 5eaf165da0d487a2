"""What stage 2 asks of the model: noise levels, noisy latents and targets, from the family's objective."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def draw_sigma(rng: np.random.Generator, count: int, kind: str, shift: float) -> Tensor:
    """Noise levels in (0, 1), fp32 (count,): a logit-normal or uniform u, moved to shift u / (1 + (shift - 1) u).

    This is the shift of diffusers' FlowMatchEulerDiscreteScheduler, so training sees the levels sampling uses.
    """
    u = 1 / (1 + np.exp(-rng.normal(size=count))) if kind == "logit_normal" else rng.random(count)
    return torch.from_numpy(shift * u / (1 + (shift - 1) * u)).float()


def noisy_and_target(objective: str, clean: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy latents and what the model should predict from them, both in fp32.

    "flow": x = (1 - sigma) clean + sigma noise, target noise - clean. "v_prediction": x = cos clean + sin noise at the
    angle sigma pi / 2, target cos noise - sin clean (the signal and noise of a variance-preserving schedule).
    """
    weight = sigma.to(clean).view(-1, *([1] * (clean.ndim - 1)))
    if objective == "flow":
        return torch.lerp(clean, noise, weight), noise - clean
    cos, sin = torch.cos(weight * math.pi / 2), torch.sin(weight * math.pi / 2)
    return cos * clean + sin * noise, cos * noise - sin * clean
