"""SLA2Processor: what every family's attention processor shares: the routed call, full attention,
recording.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core.config import SLA2Config
from sla2_core.integrations.compiled import config_text, routed_operator
from sla2_core.integrations.routed import full_attention, routed_attention
from sla2_core.integrations.ulysses import Ulysses


@dataclass
class Switch:
    """State that the processors of one model share.

    `enabled` is the user's choice, `dense_step` is set while one of the first `dense_steps` steps
    runs. `recorder`, if set, is called as recorder(layer, q, k, v, text_tokens, kv_lengths) with
    (B, N, H, d) tensors after the rotary embedding, and `observer` as observer(layer, block_map) at
    each routed call.
    """

    enabled: bool = True
    dense_step: bool = False
    recorder: Callable[..., None] | None = None
    observer: Callable[..., None] | None = None


class SLA2Processor(nn.Module):
    """Base of the families' processors: an nn.Module whose `attention` holds the trained
    parameters.

    A family implements `attend(attn, ...)`, the projections, norms and rotary embedding of its own
    layer, and calls `self.self_attention(q, k, v)` in the middle. When SLA2 is off the model's own
    processor runs instead.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, attention: nn.Module, original: Any, layer: int, switch: Switch):
        super().__init__()
        self.attention = attention
        self.config_text = config_text(attention.config)
        self.layer = layer
        self.switch = switch
        for name in (
            "_attention_backend",
            "_parallel_config",
        ):  # diffusers may have set them before
            setattr(self, name, getattr(original, name, None))
        self._original = (
            original,
        )  # in a tuple, so that a processor that is a module is not registered twice

    @property
    def original(self) -> Any:
        return self._original[0]

    def configure(self, config: SLA2Config) -> None:
        """Replace the configuration of the attention, also for compiled graphs."""
        self.attention.config = config
        self.config_text = config_text(config)

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

    def self_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        text_tokens: int = 0,
        kv_lengths: Tensor | None = None,
    ) -> Tensor:
        """Routed or full attention of (B, N, H, d) queries, keys and values after the rotary
        embedding.

        The last `text_tokens` tokens are text: their keys are always selected, their queries dense.
        `kv_lengths`, int64 (B,), counts the valid keys of each item. Under Ulysses the tokens are
        this rank's.
        """
        ulysses = None
        if self._parallel_config is not None:
            if kv_lengths is not None:
                raise ValueError(
                    "_parallel_config: expected a model without masked text for SLA2 (Wan, Flux), "
                    f"got {type(self).__name__}, whose padded text Ulysses cannot exchange"
                )
            ulysses = Ulysses(self._parallel_config, q.shape[2])
            q, k, v = (ulysses.gather_tokens(x, text_tokens) for x in (q, k, v))
            local_text, text_tokens = text_tokens, text_tokens * ulysses.ranks
        if self.switch.recorder is not None:
            self.switch.recorder(self.layer, q, k, v, text_tokens, kv_lengths)
        if not self.routed:
            out = full_attention(*(x.transpose(1, 2) for x in (q, k, v)), kv_lengths).transpose(
                1, 2
            )
        elif torch.compiler.is_compiling() and ulysses is None:
            out = routed_operator(
                self.attention, self.config_text, q, k, v, text_tokens, kv_lengths
            )
        elif (
            ulysses is None
            and not text_tokens
            and kv_lengths is None
            and self.switch.observer is None
        ):
            out = self.attention(q, k, v, layout="bnhd")
        else:
            out, block_map, _ = routed_attention(
                self.attention,
                *(x.transpose(1, 2) for x in (q, k, v)),
                text_tokens=text_tokens,
                kv_lengths=kv_lengths,
                heads=slice(None) if ulysses is None else ulysses.heads,
            )
            out = out.transpose(1, 2)
            if self.switch.observer is not None:
                self.switch.observer(self.layer, block_map)
        return out if ulysses is None else ulysses.scatter_tokens(out, local_text)
