"""Random checkpoints with TurboDiffusion's keys, shapes and dtypes in every layout, and a plain
forward pass of Wan with its SLA operator, written on Wan's own names.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

SMALL = dict(dim=24, heads=2, ffn=40, layers=2, channels=4, text=8, freq=16, out=4)
TURBO_1_3B = dict(dim=1536, heads=12, ffn=8960, layers=30, channels=16, text=4096, freq=256, out=16)
TURBO_A14B = dict(
    dim=5120, heads=40, ffn=13824, layers=40, channels=36, text=4096, freq=256, out=16
)
# Wan's names -> diffusers', as the two converted layouts have them.
RENAMED = (
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("head.head.", "proj_out."),
    ("head.modulation", "scale_shift_table"),
    (".modulation", ".scale_shift_table"),
    ("self_attn.q.", "attn1.to_q."),
    ("self_attn.k.", "attn1.to_k."),
    ("self_attn.v.", "attn1.to_v."),
    ("self_attn.o.", "attn1.to_out.0."),
    ("self_attn.norm", "attn1.norm"),
    ("cross_attn.q.", "attn2.to_q."),
    ("cross_attn.k.", "attn2.to_k."),
    ("cross_attn.v.", "attn2.to_v."),
    ("cross_attn.o.", "attn2.to_out.0."),
    ("cross_attn.norm", "attn2.norm"),
    (".norm3.", ".norm2."),
    (".ffn.0.", ".ffn.net.0.proj."),
    (".ffn.2.", ".ffn.net.2."),
)
PROJECTION = {
    "turbodiffusion": "self_attn.attn_op.local_attn.proj_l.",
    "fastvideo": "attn1.attn_impl.proj_l.",
    "sglang": "attn1.attn_op.local_attn.proj_l.",
}


def shapes(
    *, dim: int, heads: int, ffn: int, layers: int, channels: int, text: int, freq: int, out: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{Wan's name: (shape, dtype)} of a checkpoint: norms fp32, the rest bf16."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (rows, columns), (rows,)

    linear("patch_embedding", dim, channels * 4)
    linear("text_embedding.0", dim, text)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, freq)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    for i in range(layers):
        block = f"blocks.{i}."
        found[f"{block}modulation"] = (1, 6, dim)
        found[f"{block}norm3.weight"] = found[f"{block}norm3.bias"] = (dim,)
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linear(f"{block}{attention}.{name}", dim, dim)
            found[f"{block}{attention}.norm_q.weight"] = (dim,)
            found[f"{block}{attention}.norm_k.weight"] = (dim,)
        linear(f"{block}self_attn.attn_op.local_attn.proj_l", dim // heads, dim // heads)
        linear(f"{block}ffn.0", ffn, dim)
        linear(f"{block}ffn.2", dim, ffn)
    linear("head.head", 4 * out, dim)
    found["head.modulation"] = (1, 2, dim)
    return {
        name: (shape, torch.float32 if "norm" in name else torch.bfloat16)
        for name, shape in found.items()
    }


def checkpoint(sizes=SMALL, seed: int = 0, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random tensors in TurboDiffusion's own layout."""
    rng = torch.Generator().manual_seed(seed) if device == "cpu" else None
    out = {}
    for name, (shape, dtype) in shapes(**sizes).items():
        value = torch.randn(shape, generator=rng, device=device)
        scale = 1 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.1
        out[name] = (value * scale + ("norm" in name and "weight" in name)).to(dtype)
    return out


def quantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The linear layers of the blocks but proj_l in int8 with a scale for 128 x 128 weights."""
    out = {}
    for name, value in tensors.items():
        if value.ndim != 2 or not name.startswith("blocks.") or "proj_l" in name:
            out[name] = value
            continue
        module, (rows, columns) = name.removesuffix(".weight"), value.shape
        scale = torch.zeros(-(-rows // 128), -(-columns // 128))
        ints = torch.zeros(rows, columns, dtype=torch.int8)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
                scale[i, j] = value[part].float().abs().max() / 127
                ints[part] = (value[part].float() / scale[i, j]).round().to(torch.int8)
        out[f"{module}.int8_weight"], out[f"{module}.scale"] = ints, scale
    return out


def product(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What quantised() made, each weight the bf16 product of its integers and their scale."""
    out = {n: v for n, v in tensors.items() if not n.endswith(("int8_weight", "scale"))}
    for name, ints in tensors.items():
        if name.endswith("int8_weight"):
            scale = tensors[name.replace("int8_weight", "scale")]
            rows, columns = (torch.arange(n) // 128 for n in ints.shape)
            weight = ints.float() * scale[rows][:, columns]
            out[name.replace("int8_weight", "weight")] = weight.bfloat16()
    return out


def in_layout(tensors: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """TurboDiffusion's own layout under the names of another."""
    if layout == "turbodiffusion":
        return dict(tensors)
    out = {}
    for name, value in tensors.items():
        name = name.replace(PROJECTION["turbodiffusion"], PROJECTION[layout])
        if "proj_l" not in name:
            for ours, theirs in RENAMED:
                if name.startswith(ours) or (ours in name and "blocks" in name):
                    name = name.replace(ours, theirs)
                    break
        out[name] = value
    return out


def operator(q, k, v, weight, bias, *, topk, block_q, block_k):
    """SLA as TurboDiffusion computes it, on (B, H, N, d): a loop over query blocks."""
    n, d = q.shape[2:]
    pooled_q = torch.stack([x.mean(2) for x in q.split(block_q, 2)], 2)
    centred = k - k.mean(2, keepdim=True)
    pooled_k = torch.stack([x.mean(2) for x in centred.split(block_k, 2)], 2)
    scores = pooled_q @ pooled_k.transpose(-1, -2)
    count = max(1, int(topk * scores.shape[-1]))
    chosen = scores.topk(count, -1).indices
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
    mask = mask.repeat_interleave(block_q, 2)[:, :, :n].repeat_interleave(block_k, 3)[..., :n]
    logits = (q @ k.transpose(-1, -2) / math.sqrt(d)).masked_fill(~mask, -torch.inf)
    phi_q, phi_k = q.softmax(-1), k.softmax(-1)
    rest = phi_q @ (phi_k.transpose(-1, -2) @ v)
    rest = rest / (1e-5 + (phi_q * phi_k.sum(2, keepdim=True)).sum(-1, keepdim=True))
    return logits.softmax(-1) @ v + rest @ weight.t() + bias


def forward(tensors, latents, timestep, text, *, heads, out, **geometry):
    """Wan on Wan's own names in fp32: latents (B, C, T, H, W), timestep (B,), text (B, L, D)."""
    w = {name: value.float() for name, value in tensors.items()}

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def rms(name, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    batch, channels, frames, height, width = latents.shape
    grid = (frames, height // 2, width // 2)
    x = latents.reshape(batch, channels, frames, grid[1], 2, grid[2], 2)
    x = x.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, math.prod(grid), channels * 4)
    x = linear("patch_embedding", x)
    dim = x.shape[-1]
    d = dim // heads
    half = w["time_embedding.0.weight"].shape[1] // 2
    angles = timestep[:, None] * 10000 ** (-torch.arange(half) / half)
    e = torch.cat([angles.cos(), angles.sin()], 1)
    e = linear("time_embedding.2", F.silu(linear("time_embedding.0", e)))
    e6 = linear("time_projection.1", F.silu(e)).unflatten(1, (6, dim))
    text = linear("text_embedding.2", F.gelu(linear("text_embedding.0", text), approximate="tanh"))
    part = 2 * (d // 6)
    turns = []
    for axis, size in enumerate((d - 2 * part, part, part)):
        frequency = 10000 ** (-torch.arange(0, size, 2).double() / size)
        place = torch.arange(grid[axis]).double()[:, None] * frequency
        view = [1, 1, 1, -1]
        view[axis] = grid[axis]
        turns.append(place.view(view).expand(*grid, -1))
    turn = torch.cat(turns, -1).reshape(math.prod(grid), 1, d // 2).float()
    turn = torch.polar(torch.ones_like(turn), turn)

    def rotate(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    for i in range(sum(name.endswith("ffn.0.bias") for name in w)):
        own = f"blocks.{i}."
        m = (w[f"{own}modulation"] + e6).unbind(1)
        h = norm(x) * (1 + m[1][:, None]) + m[0][:, None]
        q, k = (rms(f"{own}self_attn.norm_{n}", linear(f"{own}self_attn.{n}", h)) for n in "qk")
        q, k = (rotate(y.unflatten(2, (heads, d))) for y in (q, k))
        v = linear(f"{own}self_attn.v", h).unflatten(2, (heads, d))
        proj = [w[f"{own}self_attn.attn_op.local_attn.proj_l.{n}"] for n in ("weight", "bias")]
        y = operator(*(y.transpose(1, 2) for y in (q, k, v)), *proj, **geometry)
        x = x + linear(f"{own}self_attn.o", y.transpose(1, 2).flatten(2)) * m[2][:, None]
        h = F.layer_norm(x, (dim,), w[f"{own}norm3.weight"], w[f"{own}norm3.bias"], 1e-6)
        q = rms(f"{own}cross_attn.norm_q", linear(f"{own}cross_attn.q", h))
        k = rms(f"{own}cross_attn.norm_k", linear(f"{own}cross_attn.k", text))
        v = linear(f"{own}cross_attn.v", text)
        q, k, v = (y.unflatten(2, (heads, d)).transpose(1, 2) for y in (q, k, v))
        y = (q @ k.transpose(-1, -2) / math.sqrt(d)).softmax(-1) @ v
        x = x + linear(f"{own}cross_attn.o", y.transpose(1, 2).flatten(2))
        h = norm(x) * (1 + m[4][:, None]) + m[3][:, None]
        h = linear(f"{own}ffn.2", F.gelu(linear(f"{own}ffn.0", h), approximate="tanh"))
        x = x + h * m[5][:, None]
    shift, scale = (w["head.modulation"] + e[:, None]).chunk(2, 1)
    x = linear("head.head", norm(x) * (1 + scale) + shift)
    x = x.reshape(batch, *grid, 1, 2, 2, out).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(batch, out, frames, height, width)
