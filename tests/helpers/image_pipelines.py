"""Tiny random image-to-video pipelines of families beside Wan, LTX-2's with first and last frame
too, with text embeddings given instead of encoded.
"""

from __future__ import annotations

import torch
from PIL import Image

from helpers import families, models

NAMES = (
    "cogvideox image",
    "hunyuan_video image",
    "hunyuan_video skyreels image",
    "hunyuan_video15 image",
    "ltx2 image",
    "ltx2 both frames",
)
TEXT = 7
TEXTLESS = {"text_encoder": None, "tokenizer": None}


def build(name: str):
    """The pipeline around a transformer that takes a picture's latents beside the noise."""
    return {
        "cogvideox image": cogvideox,
        "hunyuan_video image": hunyuan_video,
        "hunyuan_video skyreels image": hunyuan_video_skyreels,
        "hunyuan_video15 image": hunyuan_video15,
        "ltx2 image": lambda: ltx2("LTX2ImageToVideoPipeline"),
        "ltx2 both frames": lambda: ltx2("LTX2ConditionPipeline"),
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

    form = dict(image_condition_type="token_replace", guidance_embeds=False)
    return diffusers.HunyuanVideoImageToVideoPipeline(
        **_hunyuan_video(**form), image_processor=None
    )


def hunyuan_video_skyreels():
    """The form whose latents come with the first frame's, and zeros for the others."""
    import diffusers

    return diffusers.HunyuanSkyreelsImageToVideoPipeline(**_hunyuan_video(in_channels=8))


def _hunyuan_video(**form):
    import diffusers

    torch.manual_seed(0)
    sizes = dict(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1)
    return {
        **TEXTLESS,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "vae": diffusers.AutoencoderKLHunyuanVideo(**sizes, norm_num_groups=4),
        "transformer": models.hunyuan_video(**form).eval(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


def ltx2(pipeline: str):
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, pipeline)(
        **TEXTLESS,
        **models.ltx2_parts(),
        transformer=models.ltx2().eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
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
    """Latents after two denoising steps, from noise and pictures that are always the same."""
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(3)
    pixels = torch.rand(2, 96, 160, 3, generator=rng).mul(255).byte().numpy()
    first, last = (Image.fromarray(x) for x in pixels)
    text, mask = torch.randn(1, TEXT, 8, generator=rng), torch.ones(1, TEXT).long()
    given = dict(num_inference_steps=2, num_frames=9, output_type="latent", generator=rng)
    given |= {"image": first, "prompt_embeds": text, "return_dict": False}
    if name == "cogvideox image":
        return pipe(negative_prompt_embeds=0 * text, height=48, width=80, **given)[0]
    if name.startswith("hunyuan_video "):
        more = {"pooled_prompt_embeds": torch.ones(1, 6), "prompt_attention_mask": mask}
        if "skyreels" in name:
            more |= {"true_cfg_scale": 1.0}
        return pipe(height=48, width=80, **more, **given)[0]
    if name.startswith("ltx2"):
        given |= {"prompt_embeds": text.repeat(1, 1, 2), "prompt_attention_mask": mask}
        given |= {"height": 96, "width": 160, "num_frames": 3} | families.NO_GUIDANCE
        if name == "ltx2 image":
            return pipe(image_crf=0, **given)[0]
        given["conditions"] = both_frames(given.pop("image"), last)
        return pipe(**given)[0]
    more = {"prompt_embeds_2": torch.ones(1, 4, 6), "prompt_embeds_mask": mask}
    return pipe(prompt_embeds_mask_2=torch.ones(1, 4).long(), **more, **given)[0]


def both_frames(first: Image.Image, last: Image.Image):
    """LTX-2's conditions: the last frame becomes tokens behind those of the video."""
    from diffusers.pipelines.ltx2 import LTX2VideoCondition

    return [LTX2VideoCondition(first, index=0, crf=0), LTX2VideoCondition(last, index=-1, crf=0)]
