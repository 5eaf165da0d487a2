"""SLA2's own parameters under the offloading of diffusers and accelerate."""

from __future__ import annotations

import torch

from sla2_core.attention import SLA2Attention

_GROUP = "group_offloading"  # the name of diffusers' hook


def bring(attention: SLA2Attention, device: torch.device) -> None:
    """Have the parameters of an attention on a device before they are read.

    Group offloading fetches a module's parameters when its forward is called. The operator reads
    those of the members directly, so their groups are fetched here. They are small, and stay.
    Parameters on another device, as of an attention that was put into a model after its offloading
    was set up, are moved.

    Args:
        attention: of one layer. device: of its Q, K and V.
    """
    for member in attention.members().values():
        registry = getattr(member, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(_GROUP)
        if hook is not None:
            hook.group.onload_()
    first = next(attention.parameters(), None)
    if first is not None and first.device != device:
        attention.to(device)
