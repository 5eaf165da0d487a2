"""A tiny transformer of each family with random weights: 2 heads of 12 or 16 channels and, unless
`changes` to its settings say otherwise, 2 layers, 4 latent channels and 8 text channels.
"""

from __future__ import annotations


def wan(**changes):
    from diffusers import WanTransformer3DModel

    settings = dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    return WanTransformer3DModel(**settings | changes)


def hunyuan_video(**changes):
    """One layer of two streams, one of a single stream."""
    from diffusers import HunyuanVideoTransformer3DModel

    settings = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=8,
        pooled_projection_dim=6,
        rope_axes_dim=(4, 4, 4),
    )
    return HunyuanVideoTransformer3DModel(**settings | changes)


def hunyuan_video15(**changes):
    from diffusers import HunyuanVideo15Transformer3DModel

    settings = dict(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=8,
        text_embed_2_dim=6,
        image_embed_dim=5,
        rope_axes_dim=(4, 4, 4),
    )
    return HunyuanVideo15Transformer3DModel(**settings | changes)


def hunyuan_video15_vae():
    """The VAE whose latents it takes."""
    from diffusers import AutoencoderKLHunyuanVideo15

    return AutoencoderKLHunyuanVideo15(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8, 8),
        layers_per_block=1,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )


def cogvideox(**changes):
    from diffusers import CogVideoXTransformer3DModel

    settings = dict(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        patch_size=2,
        temporal_compression_ratio=4,
        use_rotary_positional_embeddings=True,
    )
    return CogVideoXTransformer3DModel(**settings | changes)


def flux():
    """One layer of two streams, one of a single stream."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 4),
    )


def ltx2(**changes):
    """With sound of 2 heads of 6 channels."""
    from diffusers import LTX2VideoTransformer3DModel

    settings = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=6,
        audio_cross_attention_dim=12,
        num_layers=2,
        caption_channels=8,
        rope_double_precision=False,
    )
    return LTX2VideoTransformer3DModel(**settings | changes)


def ltx2_parts():
    """What LTX2Pipeline has beside text encoder, transformer and scheduler, for ltx2() and latents
    of 4 channels, every frame, a 32nd of the size. Of sound there are latents alone.
    """
    import diffusers
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    kinds = {
        "down_block_types": ("LTX2VideoDownBlock3D",),
        "downsample_type": ("spatial",),
        "upsample_type": ("spatial",),
        "spatio_temporal_scaling": (True,),
        "decoder_spatio_temporal_scaling": (True,),
        "decoder_inject_noise": (False, False),
        "upsample_residual": (False,),
        "upsample_factor": (1,),
    }
    sizes = {
        "latent_channels": 4,
        "block_out_channels": (8,),
        "decoder_block_out_channels": (8,),
        "layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "patch_size": 16,
        "temporal_compression_ratio": 1,
    }
    heads = {
        f"{kind}_connector_{name}": value
        for kind in ("video", "audio")
        for name, value in {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 1,
            "num_learnable_registers": 7,
        }.items()
    }
    text = {"caption_channels": 8, "text_proj_in_factor": 2, "rope_double_precision": False}
    sound = {"base_channels": 4, "ch_mult": (1,), "num_res_blocks": 1, "latent_channels": 2}
    return {
        "vae": diffusers.AutoencoderKLLTX2Video(**sizes, **kinds),
        "audio_vae": diffusers.AutoencoderKLLTX2Audio(**sound, resolution=32, mel_bins=8),
        "connectors": LTX2TextConnectors(**text, **heads),
        "vocoder": None,
    }
