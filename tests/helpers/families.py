"""Every family with a tiny random model: its training samples and batches, settings that fit, and a
pipeline that generates latents.
"""

from __future__ import annotations

import torch
from sla2_core import SLA2Config
from sla2_core.integrations.family import family_of

from helpers import models

TEXT = 7


def _randn(*shape):
    return torch.randn(*shape)


def wan():
    sample = lambda: {  # noqa: E731
        "latents": _randn(4, 3, 6, 10),
        "encoder_hidden_states": _randn(TEXT, 8),
    }
    return models.wan(), sample, 45


def wan_image_to_video():
    model = models.wan(in_channels=9, image_dim=6, added_kv_proj_dim=24)
    sample = lambda: {  # noqa: E731
        "latents": _randn(4, 3, 6, 10),
        "image_latents": _randn(5, 3, 6, 10),
        "encoder_hidden_states": _randn(512, 8),
        "encoder_hidden_states_image": _randn(5, 6),
    }
    return model, sample, 45


def hunyuan_video():
    sample = lambda: {  # noqa: E731
        "latents": _randn(4, 3, 6, 10),
        "encoder_hidden_states": _randn(TEXT, 8),
        "pooled_projections": _randn(6),
        "encoder_attention_mask": (torch.arange(TEXT) < torch.randint(1, TEXT + 1, ())).long(),
    }
    return models.hunyuan_video(), sample, 45


def hunyuan_video15():
    sample = lambda: {  # noqa: E731
        "latents": _randn(4, 3, 6, 10),
        "condition_latents": _randn(5, 3, 6, 10),
        "encoder_hidden_states": _randn(TEXT, 8),
        "encoder_attention_mask": (torch.arange(TEXT) < 5).long(),
        "encoder_hidden_states_2": _randn(4, 6),
        "encoder_attention_mask_2": (torch.arange(4) < torch.randint(0, 5, ())).long(),
        "image_embeds": torch.zeros(3, 5),
    }
    return models.hunyuan_video15(), sample, 45


def cogvideox(rotary=True):
    model = models.cogvideox(
        sample_width=10,
        sample_height=6,
        sample_frames=9,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=rotary,
    )
    angle = _randn(45, 8).repeat_interleave(2, 1)
    rope = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()} if rotary else {}
    return (
        model,
        lambda: {"latents": _randn(3, 4, 6, 10), "encoder_hidden_states": _randn(TEXT, 8)} | rope,
        45,
    )


def flux():
    ids = torch.zeros(45, 3)
    ids[:, 1], ids[:, 2] = torch.arange(45) // 9, torch.arange(45) % 9
    sample = lambda: {  # noqa: E731
        "latents": _randn(45, 8),
        "encoder_hidden_states": _randn(TEXT, 8),
        "pooled_projections": _randn(6),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": ids,
    }
    return models.flux(), sample, 45


def ltx2(**changes):
    sizes = {"num_frames": 3, "height": 3, "width": 5, "audio_num_frames": 4}
    sample = lambda: {  # noqa: E731
        "latents": _randn(45, 4),
        "audio_hidden_states": _randn(4, 4),
        "encoder_hidden_states": _randn(TEXT, 8),
        "audio_encoder_hidden_states": _randn(TEXT, 8),
        **{name: torch.tensor(n) for name, n in sizes.items()},
    }
    return models.ltx2(**changes), sample, 45


BUILDERS = {
    "wan": wan,
    "wan_i2v": wan_image_to_video,
    "hunyuan_video": hunyuan_video,
    "hunyuan_video15": hunyuan_video15,
    "cogvideox_5b": cogvideox,
    "cogvideox_2b": lambda: cogvideox(rotary=False),
    "flux": flux,
    "ltx2": ltx2,
    "ltx2_gated": lambda: ltx2(
        gated_attn=True, cross_attn_mod=True, perturbed_attn=True, rope_type="split"
    ),
}


def build(name: str, seed: int = 0):
    """(transformer in eval mode, sample(i) -> dict, video tokens)."""
    torch.manual_seed(seed)
    model, draw, tokens = BUILDERS[name]()

    def sample(i: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(1000 + i)
        return draw()

    return model.eval(), sample, tokens


def config(transformer, **changes) -> SLA2Config:
    """Settings that fit a tiny transformer, with several blocks on both axes."""
    family = family_of(transformer)
    heads, dim = family.heads(next(iter(family.attention_layers(transformer).values())))
    settings = dict(head_dim=dim, num_heads=heads, topk=0.3, block_q=8, block_k=5)
    return SLA2Config(**settings | dict(alpha="position", alpha_knots=3) | changes)


def batch(sample, count: int = 2):
    """(latents, sigma, conditions) of the first samples, as a family's predict takes them."""
    items = [sample(i) for i in range(count)]
    out = {key: torch.stack([item[key] for item in items]) for key in items[0]}
    return out.pop("latents"), torch.linspace(0.3, 0.8, count), out


class Samples:
    """Five samples; the one after `limit` draws raises, in every process alike."""

    def __init__(self, sample, limit: int | None = None):
        self.sample, self.limit, self.drawn = sample, limit, 0

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if self.drawn == self.limit:
            raise KeyboardInterrupt
        self.drawn += 1
        return self.sample(index)


# LTX-2's forms of guidance, each of which is one more forward pass.
NO_GUIDANCE = {
    f"{kind}{name}": scale
    for kind in ("", "audio_")
    for name, scale in {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0}.items()
}
PIPELINES = ("wan", "hunyuan_video", "hunyuan_video15", "cogvideox_5b", "flux", "ltx2")


def pipeline(name: str, transformer):
    """The family's diffusers pipeline around `transformer`, without text encoders (embeddings are
    given instead).
    """
    import diffusers

    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    text = {"text_encoder": None, "tokenizer": None}
    two = text | {"text_encoder_2": None, "tokenizer_2": None}
    given = {"transformer": transformer, "scheduler": flow, "vae": None}
    if name == "wan":
        return diffusers.WanPipeline(**given, **text)
    if name == "hunyuan_video":
        return diffusers.HunyuanVideoPipeline(**given, **two)
    if name == "hunyuan_video15":
        vae = models.hunyuan_video15_vae()
        guider = diffusers.guiders.ClassifierFreeGuidance(guidance_scale=1.0)
        return diffusers.HunyuanVideo15Pipeline(**(given | {"vae": vae}), **two, guider=guider)
    if name == "cogvideox_5b":
        scheduler = diffusers.CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )
        return diffusers.CogVideoXPipeline(**(given | {"scheduler": scheduler}), **text)
    if name == "flux":
        return diffusers.FluxPipeline(**given, **two)
    return diffusers.LTX2Pipeline(**(given | text | models.ltx2_parts()))


def load_pipeline(name: str, folder):
    """Load a saved pipeline the ordinary way; components that are None are passed as such."""
    import diffusers

    cls = (
        getattr(diffusers, type(pipeline(name, None)).__name__)
        if name != "hunyuan_video15"
        else None
    )
    cls = cls or diffusers.HunyuanVideo15Pipeline
    components = pipeline(name, None).components
    absent = {
        key: None for key, value in components.items() if value is None and key != "transformer"
    }
    pipe = cls.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(name: str, pipe, seed: int = 0) -> torch.Tensor:
    """Two denoising steps from noise that `seed` fixes: latents."""
    rng = torch.Generator().manual_seed(seed)
    text = torch.randn(1, TEXT, 8, generator=rng)
    mask = torch.ones(1, TEXT).long()
    given = dict(num_inference_steps=2, output_type="latent", generator=rng, return_dict=False)
    if name in ("wan", "cogvideox_5b"):
        size = dict(height=48, width=80, num_frames=9)
        return pipe(prompt_embeds=text, negative_prompt_embeds=0 * text, **size, **given)[0]
    if name == "hunyuan_video":
        return pipe(
            prompt_embeds=text,
            pooled_prompt_embeds=torch.ones(1, 6),
            prompt_attention_mask=mask,
            height=48,
            width=80,
            num_frames=9,
            **given,
        )[0]
    if name == "hunyuan_video15":
        return pipe(
            prompt_embeds=text,
            prompt_embeds_mask=mask,
            prompt_embeds_2=torch.ones(1, 4, 6),
            prompt_embeds_mask_2=torch.ones(1, 4).long(),
            height=96,
            width=160,
            num_frames=9,
            **given,
        )[0]
    if name == "flux":
        return pipe(
            prompt_embeds=text, pooled_prompt_embeds=torch.ones(1, 6), height=80, width=144, **given
        )[0]
    return pipe(
        prompt_embeds=torch.randn(1, TEXT, 16, generator=rng),
        prompt_attention_mask=mask,
        height=96,
        width=160,
        num_frames=3,
        **NO_GUIDANCE,
        **given,
    )[0]
