"""Tiny random image-to-video pipelines of families beside Wan, with text embeddings given instead
of encoded.
"""

from __future__ import annotations

import torch
from PIL import Image

from helpers import models

NAMES = ("cogvideox image", "hunyuan_video image", "hunyuan_video15 image")
TEXT = 7
TEXTLESS = {"text_encoder": None, "tokenizer": None}


def build(name: str):
    """The pipeline around a transformer that takes a picture's latents beside the noise."""
    return {
        "cogvideox image": cogvideox,
        "hunyuan_video image": hunyuan_video,
        "hunyuan_video15 image": hunyuan_video15,
    }[name]()


def cogvideox():
    import diffusers

    torch.manual_seed(0)
    blocks = {"down_block_types": ("CogVideoXDownBlock3D",) * 4}
    blocks |= {"up_block_types": ("CogVideoXUpBlock3D",) * 4}
    sizes = dict(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1)
    own = dict(sample_width=10, sample_height=6, sample_frames=9, max_text_seq_length=TEXT)
    return diffusers.CogVideoXImageToVideoPipeline(
        **TEXTLESS,
        vae=diffusers.AutoencoderKLCogVideoX(**sizes, **blocks, norm_num_groups=4),
        transformer=models.cogvideox(**own, in_channels=8).eval(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def hunyuan_video():
    """The form whose layers single out the tokens of the first frame."""
    import diffusers

    torch.manual_seed(0)
    sizes = dict(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1)
    form = dict(image_condition_type="token_replace", guidance_embeds=False)
    return diffusers.HunyuanVideoImageToVideoPipeline(
        **TEXTLESS,
        text_encoder_2=None,
        tokenizer_2=None,
        image_processor=None,
        vae=diffusers.AutoencoderKLHunyuanVideo(**sizes, norm_num_groups=4),
        transformer=models.hunyuan_video(**form).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def hunyuan_video15():
    import diffusers
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    vision = dict(hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    pipe = diffusers.HunyuanVideo15ImageToVideoPipeline(
        **TEXTLESS,
        text_encoder_2=None,
        tokenizer_2=None,
        guider=diffusers.guiders.ClassifierFreeGuidance(guidance_scale=1.0),
        image_encoder=SiglipVisionModel(
            SiglipVisionConfig(**vision, image_size=8, patch_size=4)
        ).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 8, "width": 8}),
        vae=models.hunyuan_video15_vae(),
        transformer=models.hunyuan_video15(image_embed_dim=4).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    pipe.target_size = 128
    return pipe


def generate(name: str, pipe) -> torch.Tensor:
    """Latents after two denoising steps, from noise and a picture that are always the same."""
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(3)
    pixels = torch.rand(96, 160, 3, generator=rng).mul(255).byte().numpy()
    text, mask = torch.randn(1, TEXT, 8, generator=rng), torch.ones(1, TEXT).long()
    given = dict(num_inference_steps=2, num_frames=9, output_type="latent", generator=rng)
    given |= {"image": Image.fromarray(pixels), "prompt_embeds": text, "return_dict": False}
    if name == "cogvideox image":
        return pipe(negative_prompt_embeds=0 * text, height=48, width=80, **given)[0]
    if name == "hunyuan_video image":
        more = {"pooled_prompt_embeds": torch.ones(1, 6), "prompt_attention_mask": mask}
        return pipe(height=48, width=80, **more, **given)[0]
    more = {"prompt_embeds_2": torch.ones(1, 4, 6), "prompt_embeds_mask": mask}
    return pipe(prompt_embeds_mask_2=torch.ones(1, 4).long(), **more, **given)[0]
