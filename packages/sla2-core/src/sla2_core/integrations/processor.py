"""SLA2Processor: what every family's attention processor shares: the routed call, full attention,
recording.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core.attend import full_attention
from sla2_core.attention import SLA2Attention
from sla2_core.integrations.offload import bring
from sla2_core.integrations.ulysses import Ulysses
from sla2_core.order.base import with_text


@dataclass
class Switch:
    """State that the processors of one model share.

    Attributes:
        enabled: the user's choice.
        dense_step: True while one of the first `dense_steps` denoising steps runs.
        recorder: if set, called as recorder(layer, q, k, v, text_tokens, kv_lengths) at every call,
            with (B, H, N, d) tensors in the token order, after the rotary embedding.
        observer: if set, called as observer(layer, block_map) at every routed call.
        places: int64 (N,), which token stands at each place of the token order, where the
            processors are to put them in order; None where the whole model does it, see
            token_order.TokenOrder, or nobody.
    """

    enabled: bool = True
    dense_step: bool = False
    recorder: Callable[..., None] | None = None
    observer: Callable[..., None] | None = None
    places: Tensor | None = None

    @property
    def routed(self) -> bool:
        """Whether calls go through SLA2, not through full attention."""
        return self.enabled and not self.dense_step


class SLA2Processor(nn.Module):
    """Base of the families' processors: an nn.Module whose `attention` holds the trained
    parameters.

    A family implements `attend(attn, ...)`, the projections, norms and rotary embedding of its own
    layer, and calls `self.self_attention(q, k, v)` in the middle. When SLA2 is off the model's own
    processor runs instead.

    Args:
        attention: what computes this layer.
        original: the layer's own processor.
        layer: its number among the model's self-attention layers.
        switch: the state that it shares with the model's other layers.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, attention: SLA2Attention, original: Any, layer: int, switch: Switch):
        super().__init__()
        self.attention = attention
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
        """The layer's own processor."""
        return self._original[0]

    @property
    def routed(self) -> bool:
        """Whether the next call goes through SLA2, not through full attention."""
        return self.switch.routed

    def forward(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """What diffusers calls: attend(), or the layer's own processor where neither SLA2 nor a
        recorder is on. Arguments and result are those of the layer's own processor.
        """
        if not self.routed and self.switch.recorder is None:
            if (
                self._attention_backend is not None or self._parallel_config is not None
            ):  # set by diffusers on this object
                self.original._attention_backend = self._attention_backend
                self.original._parallel_config = self._parallel_config
            return self.original(attn, *args, **kwargs)
        return self.attend(attn, *args, **kwargs)

    @abstractmethod
    def attend(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer's own projections and norms around `self.self_attention`; `attn` is diffusers'
        attention module.
        """

    def self_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        text_tokens: int = 0,
        kv_lengths: Tensor | None = None,
    ) -> Tensor:
        """Routed attention, or full attention where routing is off: (B, N, H, d).

        Args:
            q, k, v: (B, N, H, d) after the rotary embedding. Under Ulysses the tokens are this
                rank's, of all heads.
            text_tokens: so many tokens at the end are text: their keys are always selected, their
                queries dense.
            kv_lengths: int64 (B,), valid keys of each item, or None.

        Raises:
            ValueError: a parallel configuration that SLA2 does not have, see ulysses.Ulysses, or
                one together with kv_lengths.
        """
        bring(self.attention, q.device)
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
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        places = self.switch.places
        if places is not None:
            places = with_text(places, q.shape[2], text_tokens)
            q, k, v = (x.index_select(2, places) for x in (q, k, v))
        if self.switch.recorder is not None:
            self.switch.recorder(self.layer, q, k, v, text_tokens, kv_lengths)
        if not self.routed:
            out = full_attention(q, k, v, kv_lengths)
        else:
            out, block_map, _ = self.attention.attend(
                q,
                k,
                v,
                lengths=kv_lengths,
                text_tokens=text_tokens,
                heads=None if ulysses is None else ulysses.heads,
            )
            if self.switch.observer is not None:
                self.switch.observer(self.layer, block_map)
        if places is not None:
            out = out.index_select(2, torch.argsort(places))
        out = out.transpose(1, 2)
        return out if ulysses is None else ulysses.scatter_tokens(out, local_text)
