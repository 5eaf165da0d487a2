"""What stage 2 asks of the model: noise levels, noisy latents and targets, from the family's
objective.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WHOLE = (0.0, 1.0)


def shifted(u: float, shift: float) -> float:
    """u in [0, 1] moved to shift u / (1 + (shift - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def unshifted(sigma: float, shift: float) -> float:
    """Inverse of shifted."""
    return sigma / (shift - (shift - 1) * sigma)


def draw_sigma(
    rng: np.random.Generator,
    count: int,
    kind: str,
    shift: float,
    between: tuple[float, float] = WHOLE,
) -> Tensor:
    """Noise levels in (0, 1), fp32 (count,): u moved to shift u / (1 + (shift - 1) u).

    This is the shift of diffusers' FlowMatchEulerDiscreteScheduler, so that training sees the
    levels that sampling uses.

    Args:
        rng: the draws' generator. count: how many levels.
        kind: of u, "logit_normal" or "uniform". shift: > 0; 1 leaves u as it is.
        between: only levels between these two, as often among themselves as without it.
    """
    if between != WHOLE:
        low, high = (unshifted(level, shift) for level in between)
        u = _between(rng.random(count), kind, low, high)
        return torch.from_numpy(shift * u / (1 + (shift - 1) * u)).float()
    u = 1 / (1 + np.exp(-rng.normal(size=count))) if kind == "logit_normal" else rng.random(count)
    return torch.from_numpy(shift * u / (1 + (shift - 1) * u)).float()


def _between(share: np.ndarray, kind: str, low: float, high: float) -> np.ndarray:
    """The values of u that have `share` in [0, 1) of the distribution between low and high below
    them.
    """
    if kind == "uniform":
        return low + (high - low) * share
    ends = torch.tensor([low, high], dtype=torch.float64).logit()
    below, above = torch.special.ndtr(ends)
    place = below + (above - below) * torch.from_numpy(share)
    return torch.special.ndtri(place).sigmoid().numpy()


def noisy_and_target(
    clean: Tensor, noise: Tensor, sigma: Tensor, alphas_cumprod: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The noisy latents x and what the model should predict from them, each (B, ...) as `clean`.

    Flow matching: x = (1 - sigma) clean + sigma noise, target noise - clean. With `alphas_cumprod`,
    at the timestep t = round(sigma (T - 1)): x = sqrt(a_t) clean + sqrt(1 - a_t) noise, target
    v = sqrt(a_t) noise - sqrt(1 - a_t) clean.

    Args:
        clean, noise: fp32 (B, ...).
        sigma: (B,) in [0, 1].
        alphas_cumprod: a, (T,); None for flow matching.
    """
    shape = (-1, *([1] * (clean.ndim - 1)))
    if alphas_cumprod is None:
        return torch.lerp(clean, noise, sigma.to(clean).view(shape)), noise - clean
    step = (sigma.to(clean.device) * (len(alphas_cumprod) - 1)).round().long()
    alpha = alphas_cumprod.to(clean)[step].view(shape)
    return (
        alpha.sqrt() * clean + (1 - alpha).sqrt() * noise,
        alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,
    )
