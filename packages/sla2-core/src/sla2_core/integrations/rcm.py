"""rCM's sampler (TurboDiffusion's) as a diffusers scheduler: four steps at most, without
guidance.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

SIGMA_MAX = {"t2v": 80.0, "i2v": 200.0}  # as TurboDiffusion samples


class RCMScheduler(SchedulerMixin, ConfigMixin):
    """Jumps to x0 and back to the next noise level with fresh noise at each step.

    The levels are angles t of TrigFlow, [atan(sigma_max), *mid_timesteps, 0]. As levels of
    rectified flow they are s = sin t / (sin t + cos t). A step from s to s' is
    x' = (1 - s') (x - s v) + s' noise, v the model's velocity. The model gets 1000 s.

    The first sample is noise times `init_noise_sigma`, the first s. diffusers' Wan pipelines apply
    neither this nor the generator of the later noise: `use_rcm(pipe)` does both.

    Args:
        num_train_timesteps: 1000, the unit of the model's timestep.
        sigma_max: of the first level, 80 for text to video and 200 for image to video.
        mid_timesteps: angles between the first level and 0, in (0, pi/2), falling. n steps take
            the first n - 1.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        sigma_max: float = SIGMA_MAX["t2v"],
        mid_timesteps: Sequence[float] = (1.5, 1.4, 1.0),
    ):
        angles = [math.atan(sigma_max), *mid_timesteps, 0.0]
        if sigma_max <= 0 or any(a <= b for a, b in itertools.pairwise(angles)):
            raise ValueError(
                "sigma_max, mid_timesteps: expected falling angles between atan(sigma_max) and 0,"
                f" got {sigma_max} and {list(mid_timesteps)}"
            )
        self.generator: Any = None
        self.set_timesteps(len(mid_timesteps) + 1)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Set `sigmas` (n + 1 levels s, fp64 on the CPU) and `timesteps` (n, fp32 on `device`).

        Raises ValueError for other than 1 to len(mid_timesteps) + 1 steps.
        """
        most = len(self.config.mid_timesteps) + 1
        if not 1 <= num_inference_steps <= most:
            raise ValueError(
                f"num_inference_steps: expected 1 to {most} for rCM, got {num_inference_steps}"
            )
        between = list(self.config.mid_timesteps)[: num_inference_steps - 1]
        angles = torch.tensor(
            [math.atan(self.config.sigma_max), *between, 0.0], dtype=torch.float64
        )
        self.num_inference_steps = num_inference_steps
        self.sigmas = angles.sin() / (angles.sin() + angles.cos())
        scaled = self.sigmas[:-1] * self.config.num_train_timesteps
        self.timesteps = scaled.to(device, torch.float32)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the first sample."""
        return float(self.sigmas[0])

    def set_begin_index(self, begin_index: int = 0) -> None:
        """What diffusers' pipelines call before the first step; a step is found by its timestep."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """The sample at the next level, in the dtype of `sample`; computed in fp64.

        Args:
            model_output: the velocity v, (B, ...). sample: x, of its shape.
            timestep: one of `timesteps`.
            generator: of the fresh noise, one or one for each sample; None takes that of use_rcm,
                or else torch's.
            return_dict: a SchedulerOutput, or a tuple of the sample.

        Raises:
            ValueError: a timestep that is none of `timesteps`.
        """
        places = (self.timesteps == float(timestep)).nonzero()
        if len(places) != 1:
            raise ValueError(
                f"timestep: expected one of {self.timesteps.tolist()}, got {float(timestep)}"
            )
        now, after = self.sigmas[int(places[0])].item(), self.sigmas[int(places[0]) + 1].item()
        out = sample.double() - now * model_output.double()
        if after > 0:
            noise = randn_tensor(
                sample.shape,
                generator=self.generator if generator is None else generator,
                device=sample.device,
                dtype=torch.float32,
            )
            out = (1 - after) * out + after * noise.double()
        out = out.to(sample.dtype)
        return SchedulerOutput(prev_sample=out) if return_dict else (out,)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def use_rcm(pipe: Any, scheduler: RCMScheduler | None = None) -> RCMScheduler:
    """Let a diffusers pipeline of Wan sample with rCM: call it with guidance_scale=1.0 and
    num_inference_steps=4 or less.

    Its first noise is scaled by `init_noise_sigma`, and the noise of later steps comes from the
    generator that the call is given. Called again, it takes another scheduler.

    Args:
        pipe: the pipeline. scheduler: None takes the pipeline's own if it is rCM's, else makes one
            for a model of its kind (image to video, or text to video).

    Returns:
        The scheduler, which is the pipeline's now.
    """
    if scheduler is None:
        scheduler = pipe.scheduler
        if not isinstance(scheduler, RCMScheduler):
            kind = "i2v" if "ImageToVideo" in type(pipe).__name__ else "t2v"
            scheduler = RCMScheduler(sigma_max=SIGMA_MAX[kind])
    pipe.scheduler = scheduler
    plain = type(pipe).prepare_latents
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(pipe, *args, **kwargs).arguments
        pipe.scheduler.generator = given.get("generator")
        found = plain(pipe, *args, **kwargs)
        scale = pipe.scheduler.init_noise_sigma
        # Image to video also returns the condition, after the latents.
        return found * scale if isinstance(found, Tensor) else (found[0] * scale, *found[1:])

    pipe.prepare_latents = prepare
    return scheduler
