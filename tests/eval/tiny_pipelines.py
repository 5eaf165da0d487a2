"""Tiny random diffusers pipelines with their VAE, text encoders and tokenizers, as from_pretrained finds them."""

from __future__ import annotations

import torch

WORDS = ("a", "red", "blue", "circle", "square", "moving", "horizontally", "vertically")


def tokenizer(length: int = 7):
    """A word-level tokenizer with padding, of the kind transformers saves and loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("<pad>", "<unk>", "</s>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=length
    )


def t5(kind: str = "T5"):
    """A T5 encoder of 8 channels."""
    import transformers

    settings = dict(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return getattr(transformers, f"{kind}EncoderModel")(getattr(transformers, f"{kind}Config")(**settings)).eval()


def wan():
    """A WanPipeline: videos of 5 x 32 x 48 become latents of 2 x 4 x 6, 2 x 2 x 3 tokens."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.WanPipeline(
        tokenizer=tokenizer(), text_encoder=t5("UMT5"),
        vae=diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=8,
            freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
