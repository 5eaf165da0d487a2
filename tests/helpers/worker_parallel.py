"""Run by two gloo processes (see test_parallel.py): SLA2Attention under DistributedDataParallel and
under FSDP2 with mixed precision.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sla2_core import SLA2Attention, SLA2Config
from sla2_core.training.sharding import shard_attention
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

CONFIG = SLA2Config(head_dim=8, num_heads=2, topk=0.3, block_q=16, block_k=8, alpha="mass")


class Model(nn.Module):
    """A linear layer, attention, and a sum."""

    def __init__(self, config: SLA2Config):
        super().__init__()
        self.qkv, self.attention = nn.Linear(16, 48), SLA2Attention(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return self.attention(q, k, v, layout="bnhd").flatten(2)


def steps(model: nn.Module, count: int) -> list[float]:
    """The losses of some steps of gradient descent, on this process's share of the batch."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for step in range(count):
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        loss = model(torch.randn(1, 61, 16, generator=generator)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for alpha in ("position", "mass"):
        torch.manual_seed(0)
        config = SLA2Config(**{**CONFIG.to_dict(), "alpha": alpha})
        found[f"ddp {alpha}"] = steps(DistributedDataParallel(Model(config)), 3)
    mesh = dist.init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for name, apart in (("fsdp2", False), ("fsdp2 apart", True)):
        torch.manual_seed(0)
        model = Model(CONFIG)
        if apart:
            assert shard_attention(model, mesh=mesh) == 1
        fully_shard(model, mesh=mesh, mp_policy=policy)
        seen: set[str] = set()
        scores = model.attention.router.scores

        def spy(*args, scores=scores, seen=seen, attention=model.attention, **kwargs):
            seen.update(str(p.dtype) for p in attention.parameters())
            out = scores(*args, **kwargs)
            seen.add(f"scores {out.dtype}")
            return out

        model.attention.router.scores = spy
        found[name] = steps(model, 3)
        found[f"{name} dtypes"] = sorted(seen)
    Path(sys.argv[1], f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
