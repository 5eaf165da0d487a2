"""The routed call as a torch.library operator: one node of a torch.compile graph, with gradients,
instead of graph breaks.

The operator knows nothing of modules: it takes their configuration as text and their parameters as
tensors. Its backward runs the forward again, as gradient checkpointing does, so it works with every
backend of the operator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from sla2_core.attention import build_attention
from sla2_core.config import SLA2Config
from sla2_core.integrations.routed import routed_attention

_FIELDS = tuple((field.name, field.type) for field in dataclasses.fields(SLA2Config))
_TYPES = {"int": int, "float": float, "str": str, "bool": lambda text: text == "True"}


class _Call(nn.Module):
    """routed_attention as a module on (B, N, H, d), for functional_call."""

    def __init__(self, config: SLA2Config):
        super().__init__()
        self.attention = build_attention(config)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None, text_tokens: int
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, _, _ = routed_attention(
            self.attention, q, k, v, text_tokens=text_tokens, kv_lengths=kv_lengths
        )
        return out.transpose(1, 2).contiguous()


@cache
def _module(config: str, device: torch.device) -> _Call:
    values = zip(_FIELDS, config.split("\n"), strict=True)
    return _Call(SLA2Config(**{name: _TYPES[kind](text) for (name, kind), text in values})).to(
        device
    )


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parameters: Sequence[Tensor],
    kv_lengths,
    config: str,
    text_tokens: int,
):
    module = _module(config, q.device)
    given = {
        name: value for (name, _), value in zip(module.named_parameters(), parameters, strict=True)
    }
    return torch.func.functional_call(module, given, (q, k, v, kv_lengths, text_tokens))


def _forward(q, k, v, parameters, kv_lengths, config: str, text_tokens: int) -> Tensor:
    with torch.no_grad():
        return _call(q, k, v, parameters, kv_lengths, config, text_tokens)


def _backward(grad, q, k, v, parameters, kv_lengths, config: str, text_tokens: int) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v, *parameters)]
        out = _call(*leaves[:3], leaves[3:], kv_lengths, config, text_tokens)
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.contiguous() for g, x in zip(found, leaves)]


def _fake_forward(q, k, v, parameters, kv_lengths, config, text_tokens):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _fake_backward(grad, q, k, v, parameters, kv_lengths, config, text_tokens):
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, *parameters)
    ]


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, parameters, kv_lengths, ctx.config, ctx.text_tokens = inputs
    ctx.lengths = kv_lengths is not None
    ctx.save_for_backward(q, k, v, *parameters, *([kv_lengths] if ctx.lengths else []))


def _autograd(ctx, grad):
    q, k, v, *rest = ctx.saved_tensors
    kv_lengths = rest.pop() if ctx.lengths else None
    operator = torch.ops.sla2.routed_attention_backward
    dq, dk, dv, *others = operator(grad, q, k, v, rest, kv_lengths, ctx.config, ctx.text_tokens)
    return dq, dk, dv, others, None, None, None


@cache
def register() -> None:
    """Define torch.ops.sla2.routed_attention; called when SLA2 is applied to a model."""
    arguments = (
        "Tensor q, Tensor k, Tensor v, Tensor[] parameters, Tensor? kv_lengths, str config, int"
        " text_tokens"
    )
    torch.library.define("sla2::routed_attention", f"({arguments}) -> Tensor")
    torch.library.define(
        "sla2::routed_attention_backward", f"(Tensor grad, {arguments}) -> Tensor[]"
    )
    for name, run, fake in (
        ("sla2::routed_attention", _forward, _fake_forward),
        ("sla2::routed_attention_backward", _backward, _fake_backward),
    ):
        torch.library.impl(name, ("cpu", "cuda"), run)
        torch.library.register_fake(name, fake)
    torch.library.register_autograd(
        "sla2::routed_attention", _autograd, setup_context=_setup_context
    )


def config_text(config: SLA2Config) -> str:
    """The operator's form of a configuration. Made outside the graph: torch.compile would turn its
    numbers into symbols.
    """
    return "\n".join(str(getattr(config, name)) for name, _ in _FIELDS)


def routed_operator(
    attention: nn.Module,
    config: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_tokens: int,
    kv_lengths: Tensor | None,
) -> Tensor:
    """routed_attention of (B, N, H, d) tensors as one operator, for use while
    torch.compile traces.
    """
    return torch.ops.sla2.routed_attention(
        q, k, v, list(attention.parameters()), kv_lengths, config, text_tokens
    )
