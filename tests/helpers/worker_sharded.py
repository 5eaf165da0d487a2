"""Run by two gloo processes (see test_sharded.py): stage 2 under accelerate's FSDP2, whole,
interrupted and resumed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.training.stage2.train import Stage2Config, train_stage2

from helpers import tiny_wan

SETTINGS = Stage2Config(
    steps=4,
    batch_size=8,
    accumulate=2,
    learning_rate=1e-3,
    alpha_learning_rate=1e-2,
    checkpoint_every=2,
    warmup=1,
    ema=0.5,
)
VARIANTS = {
    "plain": {},
    "lora": {"lora_rank": 2},
    "distilled": {"loss": "distill", "gradient_checkpointing": True, "autocast": "bfloat16"},
}


class Data:
    """Seven samples; `fail_at` raises as that many samples have been drawn, in every
    process alike.
    """

    def __init__(self, fail_at: int | None = None):
        self.latents, self.text = tiny_wan.pairs()
        self.drawn, self.fail_at = 0, fail_at

    def __len__(self):
        return 7

    def __getitem__(self, index):
        if self.drawn == self.fail_at:
            raise KeyboardInterrupt
        self.drawn += 1
        return {"latents": self.latents[index], "encoder_hidden_states": self.text[index]}


def accelerator(lean: bool):
    """accelerate with FSDP2. On CPU it takes the plugin and shards nothing: FSDP is for
    accelerators there, so the kind
    of process group is named for it."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["WanTransformerBlock"],
        cpu_ram_efficient_loading=lean,
    )
    found = Accelerator(cpu=True, fsdp_plugin=plugin)
    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    assert found.is_fsdp2
    return found


def handle():
    return apply_sla2(tiny_wan.model(), tiny_wan.config(precision="int8"))


def run(folder: Path, fail_at: int | None = None, lean: bool = False, **changes) -> dict:
    """One run; what of the model was sharded, and whether requires_grad came back."""
    h = handle()
    flags = [p.requires_grad for p in h.transformer.parameters()]
    config = dataclasses.replace(SETTINGS, **changes)
    report = train_stage2(h, Data(fail_at), config, folder, accelerator=accelerator(lean))
    named = dict(h.transformer.named_parameters())
    return {
        "loss": report.loss,
        "sharded": all(hasattr(p, "to_local") for p in named.values()),
        "local": sum(p.to_local().numel() for p in named.values()),
        "whole": sum(p.numel() for p in named.values()),
        "flags": [p.requires_grad for p in named.values()] == flags,
    }


def main() -> None:
    torch.set_num_threads(1)
    folder, found = Path(sys.argv[1]), {}
    for name, changes in VARIANTS.items():
        found[name] = run(folder / f"{name}_two", **changes)
    try:
        run(folder / "resumed", fail_at=2 * 2 * 3 - 1)  # in the third step
    except KeyboardInterrupt:
        assert sorted(p.name for p in folder.glob("resumed/checkpoint*")) == [
            "checkpoint-00000002.safetensors"
        ]
    found["resumed"] = run(folder / "resumed")
    try:
        run(folder / "lean", lean=True)
    except ValueError as error:
        found["refused"] = str(error)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
