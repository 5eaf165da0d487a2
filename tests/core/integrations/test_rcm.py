"""rCM's sampler: its formulas, a Wan pipeline with it, and the folder that import writes as a
pipeline.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import pipelines
from helpers import turbodiffusion as turbo
from sla2_core.integrations.rcm import RCMScheduler, use_rcm
from sla2_core.integrations.turbodiffusion import import_turbodiffusion

CALL = dict(
    prompt=["a red circle", "a blue square"],
    num_frames=5,
    height=32,
    width=48,
    guidance_scale=1.0,
    output_type="latent",
    return_dict=False,
)


def levels(sigma_max, count):
    angles = [*[math.atan(sigma_max), 1.5, 1.4, 1.0][:count], 0.0]
    return [math.sin(a) / (math.sin(a) + math.cos(a)) for a in angles]


def generators():
    return [torch.Generator().manual_seed(seed) for seed in (5, 6)]


@pytest.mark.parametrize(("sigma_max", "steps"), [(80.0, 4), (200.0, 2)])
def test_levels_timesteps_and_steps_are_the_formulas(sigma_max, steps):
    scheduler = RCMScheduler(sigma_max=sigma_max)
    scheduler.set_timesteps(steps)
    s = levels(sigma_max, steps)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(s, dtype=torch.float64))
    torch.testing.assert_close(scheduler.timesteps, 1000 * torch.tensor(s[:-1]))
    assert scheduler.init_noise_sigma == pytest.approx(sigma_max / (sigma_max + 1))
    x, v = torch.randn(2, 2, 3, 4)
    for i, t in enumerate(scheduler.timesteps):
        rng = torch.Generator().manual_seed(i)
        found = scheduler.step(v, t, x, generator=rng).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(found, (1 - s[i + 1]) * (x - s[i] * v) + s[i + 1] * noise)


def test_refuses_other_numbers_of_steps_and_other_timesteps():
    scheduler = RCMScheduler()
    with pytest.raises(ValueError, match="num_inference_steps: expected 1 to 4 for rCM, got 20"):
        scheduler.set_timesteps(20)
    with pytest.raises(ValueError, match="timestep: expected one of"):
        scheduler.step(torch.ones(2), 500.0, torch.ones(2))
    with pytest.raises(ValueError, match="sigma_max, mid_timesteps: expected falling angles"):
        RCMScheduler(mid_timesteps=(1.0, 1.4))


def plain_sampling(pipe, transformers, sigma_max):
    """rCM's loop over the two prompts, each with its own generator."""
    text, _ = pipe.encode_prompt(
        CALL["prompt"], do_classifier_free_guidance=False, max_sequence_length=512
    )
    rngs, s = generators(), levels(sigma_max, 4)
    draw = lambda: torch.cat([torch.randn(1, 16, 2, 4, 6, generator=g) for g in rngs])  # noqa: E731
    x = draw() * s[0]
    for i, now in enumerate(s[:-1]):
        model = transformers[0] if now >= 0.9 else transformers[-1]
        v = model(x, torch.full((2,), 1000 * now), text, return_dict=False)[0]
        x = x - now * v
        if s[i + 1]:
            x = (1 - s[i + 1]) * x + s[i + 1] * draw()
    return x


@pytest.mark.parametrize("two", [False, True], ids=["Wan2.1", "Wan2.2"])
@torch.no_grad()
def test_a_wan_pipeline_samples_as_the_plain_loop(two):
    pipe = pipelines.wan(two)
    pipe.set_progress_bar_config(disable=True)
    scheduler = use_rcm(pipe, RCMScheduler(sigma_max=200.0))
    found = pipe(**CALL, num_inference_steps=4, generator=generators())[0]
    models = [pipe.transformer, pipe.transformer_2] if two else [pipe.transformer]
    expected = plain_sampling(pipe, models, 200.0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert use_rcm(pipe) is scheduler  # again changes nothing
    again = pipe(**CALL, num_inference_steps=4, generator=generators())[0]
    assert torch.equal(again, found)


@torch.no_grad()
def test_an_import_with_a_base_is_a_pipeline(tmp_path):
    from diffusers import DiffusionPipeline
    from sla2_core.integrations.loading import apply_adapter

    sizes = turbo.SMALL | {"channels": 16, "out": 16}
    torch.save(turbo.checkpoint(sizes), tmp_path / "turbo.pth")
    pipelines.wan().save_pretrained(tmp_path / "base")
    how = dict(topk=0.5, block_q=4, block_k=3, torch_dtype=torch.float32)
    folder = import_turbodiffusion(
        tmp_path / "turbo.pth", tmp_path / "out", base=tmp_path / "base", **how
    )
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.scheduler, RCMScheduler)
    assert pipe.scheduler.config.sigma_max == 80.0
    handle = apply_adapter(pipe.transformer, folder / "transformer")
    use_rcm(pipe)
    found = pipe(**CALL, num_inference_steps=4, generator=generators())[0]
    torch.testing.assert_close(
        found, plain_sampling(pipe, [pipe.transformer], 80.0), atol=1e-4, rtol=1e-4
    )
    with handle.disabled():
        dense = pipe(**CALL, num_inference_steps=4, generator=generators())[0]
    assert (dense - found).abs().max() > 1e-3
    pipelines.wan_image("2.1").save_pretrained(tmp_path / "i2v")
    message = r"base: expected a pipeline of in_channels=16 as \S+turbo.pth has, got 36 in \S+json$"
    with pytest.raises(ValueError, match=message):
        import_turbodiffusion(
            tmp_path / "turbo.pth", tmp_path / "other", base=tmp_path / "i2v", **how
        )
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="base: expected a pipeline with 2 transformers"):
        import_turbodiffusion(
            tmp_path / "turbo.pth",
            tmp_path / "pair",
            low_noise=tmp_path / "turbo.pth",
            base=tmp_path / "base",
        )
