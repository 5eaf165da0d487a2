"""FSDP2 with mixed precision: router and alpha stay in fp32 while the rest of the model is bf16."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sla2_core.attention import SLA2Attention


def shard_attention(model: nn.Module, **options: Any) -> int:
    """Shard every SLA2Attention of a model by itself, without a cast; call it before
    `fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))`.

    Without it the policy hands the parameters of router and mixing over in bf16. They are computed
    with in fp32 all the same, but from rounded values.

    Args:
        model: a module with SLA2Attention modules anywhere inside.
        options: of torch.distributed.fsdp.fully_shard, such as `mesh`; not `mp_policy`.

    Returns:
        How many modules were sharded.
    """
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    policy = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
    found = [module for module in model.modules() if isinstance(module, SLA2Attention)]
    found = [module for module in found if any(True for _ in module.parameters())]
    for attention in found:
        fully_shard(attention, mp_policy=policy, **options)
        register_fsdp_forward_method(attention, "attend")
    return len(found)
