"""Tiny random diffusers pipelines with their VAE, text encoders and tokenizers, as from_pretrained
finds them.
"""

from __future__ import annotations

import torch

from helpers import models

WORDS = ("a", "red", "blue", "circle", "square", "moving", "horizontally", "vertically")


def tokenizer(length: int = 7):
    """A word-level tokenizer with padding, of the kind transformers saves and loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("<pad>", "<unk>", "</s>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=length,
    )


def t5(kind: str = "T5"):
    """A T5 encoder of 8 channels."""
    import transformers

    settings = dict(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return getattr(transformers, f"{kind}EncoderModel")(
        getattr(transformers, f"{kind}Config")(**settings)
    ).eval()


def wan(two: bool = False):
    """A WanPipeline: videos of 5 x 32 x 48 become latents of 2 x 4 x 6, 2 x 2 x 3 tokens; with two
    transformers, as Wan2.2's.
    """
    import diffusers

    torch.manual_seed(0)

    def transformer():
        return models.wan(in_channels=16, out_channels=16)

    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5("UMT5"),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1
        ),
        transformer=transformer(),
        transformer_2=transformer() if two else None,
        boundary_ratio=0.9 if two else None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def wan_image(kind: str = "2.1"):
    """A WanImageToVideoPipeline of the sizes of wan(): "2.1" with an image encoder, "2.1 both
    frames" for the first and the last frame, "2.2" without, with two transformers.
    """
    import diffusers
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    own = {} if kind == "2.2" else {"image_dim": 6, "added_kv_proj_dim": 24}
    if kind == "2.1 both frames":
        own["pos_embed_seq_len"] = 10

    def transformer():
        return models.wan(in_channels=36, out_channels=16, **own)

    vision = dict(hidden_size=6, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    size = {"height": 8, "width": 8}
    return diffusers.WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5("UMT5"),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1
        ),
        transformer=transformer(),
        transformer_2=transformer() if kind == "2.2" else None,
        boundary_ratio=0.9 if kind == "2.2" else None,
        image_encoder=None
        if kind == "2.2"
        else CLIPVisionModel(CLIPVisionConfig(**vision, image_size=8, patch_size=4)).eval(),
        image_processor=None
        if kind == "2.2"
        else CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def clip():
    """A CLIP text encoder with 6 pooled channels."""
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = dict(hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    return CLIPTextModel(
        CLIPTextConfig(**settings, vocab_size=16, max_position_embeddings=77, eos_token_id=2)
    ).eval()


def hunyuan_video():
    """Latents of 4 channels, a quarter of the frames, an eighth of the size."""
    import diffusers
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    llama = dict(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=LlamaModel(LlamaConfig(**llama, max_position_embeddings=512)).eval(),
        tokenizer=tokenizer(400),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(77),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        transformer=models.hunyuan_video(),
    )


def hunyuan_video15():
    """Latents of 4 channels, a quarter of the frames, a sixteenth of the size. The chat template of
    the first text
    encoder belongs to the published tokenizer; a stand-in takes its place."""
    import diffusers

    torch.manual_seed(0)
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=t5(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(9),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=diffusers.guiders.ClassifierFreeGuidance(guidance_scale=1.0),
        vae=models.hunyuan_video15_vae(),
        transformer=models.hunyuan_video15(patch_size=1, text_embed_2_dim=8),
    )

    def embed(text_encoder, tokenizer, prompt: list[str], **_):
        found = tokenizer(
            [f"a {text}" for text in prompt], padding="max_length", return_tensors="pt"
        )  # never empty
        return text_encoder(found.input_ids)[0], found.attention_mask

    pipe._get_mllm_prompt_embeds, pipe.vision_num_semantic_tokens, pipe.tokenizer_2_max_length = (
        embed,
        3,
        4,
    )
    return pipe


def cogvideox(**changes):
    """Latents of 4 channels, a quarter of the frames, an eighth of the size."""
    import diffusers

    torch.manual_seed(0)
    size = dict(sample_width=6, sample_height=4, sample_frames=5, max_text_seq_length=226)
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(226),
        text_encoder=t5(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        vae=diffusers.AutoencoderKLCogVideoX(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
        ),
        transformer=models.cogvideox(**size | changes),
    )


def flux():
    """Images; latents of 2 channels, half of the size, packed to tokens of 8."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.FluxPipeline(
        text_encoder=clip(),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(512),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKL(
            latent_channels=2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            shift_factor=0.1,
            scaling_factor=0.4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        transformer=models.flux(),
    )
