"""Run by two gloo processes (see test_two_processes.py): Ulysses against one process, and stage 2
of every family.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sla2_core import SLA2Config, build_attention
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.family import family_of
from sla2_core.integrations.loading import apply_adapter
from sla2_core.integrations.ulysses import Ulysses
from sla2_core.training.stage2.train import Stage2Config, train_stage2

from helpers import families, tiny_wan

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SETTINGS = Stage2Config(
    steps=2, batch_size=4, learning_rate=1e-3, checkpoint_every=1, ema=0.5, accumulate=2
)
CHECKPOINTED = ("hunyuan_video", "cogvideox_5b", "ltx2")


def mesh_config():
    from diffusers import ContextParallelConfig

    return ContextParallelConfig(ulysses_degree=RANKS)


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).detach().abs().max())


def exchange(parallel, changes: dict, text: int) -> dict[str, float]:
    """Forward and backward of one attention, tokens and heads spread over the ranks, against all on
    one.
    """
    torch.manual_seed(0)
    video, dim, heads = 44, 8, 4
    attention = build_attention(
        SLA2Config(
            **(
                dict(head_dim=dim, num_heads=heads, topk=0.3, block_q=8, block_k=5, alpha_knots=3)
                | changes
            )
        )
    )
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    whole = torch.randn(3, 2, video + text, heads, dim)  # q, k, v; video tokens first
    weight = torch.randn(2, video + text, heads, dim)

    def local(x):  # this rank's video tokens and this rank's text tokens
        return torch.cat(
            [part.chunk(RANKS, 1)[RANK] for part in (x[:, :video], x[:, video:]) if part.shape[1]],
            1,
        )

    leaf = whole.clone().requires_grad_()
    out, _, _ = attention.attend(*(x.transpose(1, 2) for x in leaf), text_tokens=text)
    out = out.transpose(1, 2)
    (out * weight).sum().backward()
    expected = {
        name: p.grad.clone() for name, p in attention.named_parameters() if p.grad is not None
    }
    attention.zero_grad(set_to_none=True)

    ulysses = Ulysses(parallel, heads)
    mine = torch.stack([local(x) for x in whole]).requires_grad_()
    text_here = text // RANKS
    q, k, v = (ulysses.gather_tokens(x, text_here) for x in mine)
    turned = (x.transpose(1, 2) for x in (q, k, v))
    routed, _, _ = attention.attend(*turned, text_tokens=text, heads=ulysses.heads)
    result = ulysses.scatter_tokens(routed.transpose(1, 2), text_here)
    (result * local(weight)).sum().backward()
    found = {
        "forward": difference(result, local(out)),
        "backward": max(difference(a, local(b)) for a, b in zip(mine.grad, leaf.grad)),
    }
    for name, grad in expected.items():
        own = dict(attention.named_parameters())[name].grad
        total = torch.zeros_like(grad) if own is None else own.clone()
        dist.all_reduce(total)
        found[name] = difference(total, grad)
    return found


def model(name: str, parallel_first: bool) -> dict[str, float]:
    """A whole transformer under diffusers' context parallelism against the same on one process."""
    transformer, sample, _ = families.build(name)
    family = family_of(transformer)
    config = families.config(transformer)
    latents, sigma, batch = families.batch(sample)
    if name == "flux":  # every axis that is split must divide by the ranks
        latents, batch["img_ids"] = latents[:, :44], batch["img_ids"][:, :44]
        for key in ("encoder_hidden_states", "txt_ids"):
            batch[key] = batch[key][:, :6]
    else:
        latents = latents[..., :8]  # 3 x 3 x 4 tokens
    with torch.no_grad():
        handle = apply_sla2(transformer, config)
        expected = family.predict(transformer, latents, sigma, batch)
        if parallel_first:
            handle.remove()
            transformer.enable_parallelism(config=mesh_config())
            apply_sla2(transformer, config)
        else:
            transformer.enable_parallelism(config=mesh_config())
        calls, gather = [], Ulysses.gather_tokens
        Ulysses.gather_tokens = lambda self, x, text: (
            calls.append(x.shape[1]) or gather(self, x, text)
        )
        out = family.predict(transformer, latents, sigma, batch)
        Ulysses.gather_tokens = gather
    return {
        "forward": difference(out, expected),
        "size": float(expected.abs().max()),
        "tokens": calls,
    }


def refusals(parallel) -> list[str]:
    messages = []
    for config, heads in (
        ({"ring_degree": 2}, 4),
        ({"ulysses_anything": True}, 4),
        ({}, 3),
    ):
        inner = parallel.context_parallel_config
        old = {key: getattr(inner, key) for key in config}
        for key, value in config.items():
            setattr(inner, key, value)
        try:
            Ulysses(parallel, heads)
        except ValueError as error:
            messages.append(str(error))
        for key, value in old.items():
            setattr(inner, key, value)
    return messages


def stage2(name: str, folder: Path, out: str = f"stage2_{RANKS}", limit: int | None = None) -> None:
    """Two steps of stage 2 on the pipeline of `folder`, on from the adapter of stage 1."""
    pipe = families.load_pipeline(name, folder / name / "pipeline")
    _, sample, _ = families.build(name)
    handle = apply_adapter(pipe.transformer, folder / name / "stage1_adapter")
    handle.configure(precision="int8")
    config = dataclasses.replace(SETTINGS, gradient_checkpointing=name in CHECKPOINTED)
    train_stage2(handle, families.Samples(sample, limit), config, folder / name / out)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    from diffusers.models._modeling_parallel import ParallelConfig

    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, also for gloo
    found: dict = {"exchange": {}, "models": {}}
    transformer, _, _ = families.build("wan")
    transformer.enable_parallelism(config=mesh_config())
    parallel = transformer.blocks[0].attn1.processor._parallel_config
    assert isinstance(parallel, ParallelConfig)
    for key, changes, text in (
        ("plain", {}, 0),
        ("text", {}, 6),
        ("mass per head", {"alpha": "mass", "per_head_router": True}, 6),
        ("low bit", {"precision": "int8"}, 0),
        ("sla", tiny_wan.SLA, 6),
    ):
        found["exchange"][key] = exchange(parallel, changes, text)
    found["models"] = {
        f"{name} {first}": model(name, first) for name in ("wan", "flux") for first in (True, False)
    }
    found["refusals"] = refusals(parallel)
    for name in families.PIPELINES:
        stage2(name, folder)
    with contextlib.suppress(KeyboardInterrupt):
        stage2("wan", folder, "interrupted", limit=3)  # in the second step
    assert not (folder / "wan" / "interrupted" / "checkpoint-00000002.safetensors").exists()
    stage2("wan", folder, "interrupted")
    (folder / f"rank{RANK}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
