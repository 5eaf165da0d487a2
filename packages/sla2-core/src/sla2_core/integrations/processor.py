"""SLA2Processor: what every family's attention processor shares: the routed call, full attention, recording."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Switch:
    """State that the processors of one model share.

    `enabled` is the user's choice, `dense_step` is set while one of the first `dense_steps` steps runs. `recorder`, if
    set, is called as recorder(layer, q, k, v, context) with (B, N, H, d) tensors after the rotary embedding, and `observer` as
    observer(layer, info) with the AttentionInfo of each routed call.
    """

    enabled: bool = True
    dense_step: bool = False
    recorder: Callable[..., None] | None = None
    observer: Callable[..., None] | None = None


def full_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V on (B, N, H, d); `mask` is bool and broadcasts to (B, H, N_q, N_k)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class SLA2Processor(nn.Module):
    """Base of the families' processors: an nn.Module whose `attention` holds the trained parameters.

    A family implements `attend(attn, ...)`, the projections, norms and rotary embedding of its own layer, and calls
    `self.self_attention(q, k, v)` in the middle. When SLA2 is off the model's own processor runs instead.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, attention: nn.Module, original: Any, layer: int, switch: Switch):
        super().__init__()
        self.attention = attention
        self.layer = layer
        self.switch = switch
        self._original = (original,)  # in a tuple, so that a processor that is a module is not registered twice

    @property
    def original(self) -> Any:
        return self._original[0]

    @property
    def routed(self) -> bool:
        return self.switch.enabled and not self.switch.dense_step

    def forward(self, attn: nn.Module, *args, **kwargs):
        if not self.routed and self.switch.recorder is None:
            if (
                self._attention_backend is not None or self._parallel_config is not None
            ):  # set by diffusers on this object
                self.original._attention_backend = self._attention_backend
                self.original._parallel_config = self._parallel_config
            return self.original(attn, *args, **kwargs)
        return self.attend(attn, *args, **kwargs)

    def attend(self, attn: nn.Module, *args, **kwargs):
        raise NotImplementedError

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Routed or full attention of (B, N, H, d) queries, keys and values after the rotary embedding."""
        if self._parallel_config is not None:
            raise NotImplementedError("transformer: expected a model without context parallelism, got _parallel_config")
        if self.switch.recorder is not None:
            self.switch.recorder(self.layer, q, k, v)
        if not self.routed:
            return full_attention(q, k, v)
        if self.switch.observer is None:
            return self.attention(q, k, v, layout="bnhd")
        out, info = self.attention(q, k, v, layout="bnhd", return_info=True)
        self.switch.observer(self.layer, info)
        return out
