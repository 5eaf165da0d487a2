"""Variants without trained parameters as attention backends of diffusers, registered from outside:
transformer.set_attention_backend("sla2-sparse-only").
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sla2_core.attention import SLA2Attention, build_attention
from sla2_core.config import SLA2Config
from sla2_core.registry import ORDERS
from sla2_core.variants import VARIANTS

PREFIX = "sla2-"
_ENUM_NAME = "SLA2_"


def parameter_free_variants() -> tuple[str, ...]:
    """The variants that a backend can be: without trained parameters, in raster order."""
    found: dict[SLA2Config, str] = {}
    for name in VARIANTS:
        config = _config(name, 16, 2, {"topk": 0.1})
        if _refusal(config) is None:
            found.setdefault(config, name)
    return tuple(found.values())


def register_attention_backends(**fields: Any) -> tuple[str, ...]:
    """Register every variant without trained parameters with diffusers, as "sla2-" and its name
    with hyphens; see register_attention_backend. Returns the names.
    """
    return tuple(
        register_attention_backend(PREFIX + name.replace("_", "-"), variant=name, **fields)
        for name in parameter_free_variants()
    )


def register_attention_backend(
    name: str, *, variant: str = "sparse_only", topk: float | None = None, **fields: Any
) -> str:
    """Register a variant with diffusers, for `transformer.set_attention_backend(name)`.

    `set_attention_backend("native")` or `reset_attention_backend()` undoes it. The backend is the
    model's alone: it does not become the default of other models, as diffusers' own do, and
    diffusers' context manager attention_backend(name) changes nothing. Attention with as many
    queries as keys is taken for self-attention; other attention, as that with text, is computed in
    full. In a model of joint attention the text is routed as the video is, and text with a mask
    refused: apply_sla2 knows these models. With other fields, register another name; the same name
    again replaces its settings.

    Args:
        name: begins with "sla2-", in lower case.
        variant: a name of variants.VARIANTS, of a variant without trained parameters.
        topk: k% in (0, 1]; None takes the variant's own, or 0.1.
        fields: others of SLA2Config that differ from the variant's.

    Returns:
        The name.

    Raises:
        ValueError: another name, an unknown variant, one with trained parameters or another token
            order than raster's, or a value outside its range.
        ModuleNotFoundError: a diffusers without attention backends.
    """
    if not name.startswith(PREFIX) or name != name.lower() or name == PREFIX:
        raise ValueError(f"name: expected one that begins with {PREFIX!r}, got {name!r}")
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    if topk is None:
        topk = VARIANTS[variant].defaults.get("topk", 0.1)
    fields = {"topk": topk, **fields}
    reason = _refusal(_config(variant, 16, 2, fields))
    if reason is not None:
        raise ValueError(f"variant: expected one {reason}, got {variant!r}; use apply_sla2")
    modules: dict[tuple[int, int], SLA2Attention] = {}

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """(B, N, H, d), as diffusers' backends."""
        heads, dim = query.shape[2:]
        if query.shape[1] != key.shape[1]:
            return _full(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        for field, given, expected in (
            ("attn_mask", attn_mask, None),
            ("is_causal", is_causal, False),
            ("dropout_p", dropout_p, 0.0),
        ):
            if isinstance(given, Tensor) or given != expected:
                raise ValueError(
                    f"{field}: expected {expected} for the self-attention of the backend {name},"
                    f" got {'a mask' if field == 'attn_mask' else given}; use apply_sla2"
                )
        if scale is not None and not math.isclose(scale, dim**-0.5):
            raise ValueError(f"scale: expected 1/sqrt({dim}) for the backend {name}, got {scale}")
        if key.shape[2] != heads:
            raise ValueError(
                f"key: expected {heads} heads as the queries have for the backend {name}, got"
                f" {key.shape[2]}"
            )
        if (heads, dim) not in modules:
            modules[heads, dim] = build_attention(_config(variant, dim, heads, fields))
        return modules[heads, dim](query, key, value, layout="bnhd")

    _register(name, attention)
    return name


def _config(variant: str, head_dim: int, num_heads: int, fields: dict[str, Any]) -> SLA2Config:
    """The variant on a base in which nothing is learned, and what the fields change."""
    base = SLA2Config(
        head_dim=head_dim,
        num_heads=num_heads,
        topk=fields["topk"],
        token_order="raster",
        router="heuristic",
        complement="none",
        alpha="one",
    )
    return VARIANTS[variant](base).replaced(**fields)


def _refusal(config: SLA2Config) -> str | None:
    """What a variant would have to be to be a backend; None if it is."""
    if not ORDERS.get(config.token_order).identity:
        return "in raster order"
    with torch.device("meta"):
        names = [name for name, _ in build_attention(config).named_parameters()]
    return f"without trained parameters such as {names[0]}" if names else None


def _full(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _register(name: str, attention: Any) -> None:
    """Make the name known to diffusers, whose backends are an enumeration and a registry."""
    try:
        from diffusers.models.attention_dispatch import (
            AttentionBackendName,
            _AttentionBackendRegistry,
        )
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "diffusers: expected 0.35 or later for attention backends, install sla2-core[diffusers]"
        ) from None
    member = AttentionBackendName._value2member_map_.get(name)
    if member is None:
        # What the enumeration's class body does for a member; it takes none afterwards.
        member = str.__new__(AttentionBackendName, name)
        member._name_ = _ENUM_NAME + name.removeprefix(PREFIX).upper().replace("-", "_")
        member._value_ = name
        AttentionBackendName._member_names_.append(member._name_)
        AttentionBackendName._member_map_[member._name_] = member
        AttentionBackendName._value2member_map_[name] = member
    _AttentionBackendRegistry.register(member)(attention)
    _keep_default(_AttentionBackendRegistry)


def _keep_default(registry: Any) -> None:
    """Let the default backend be one of diffusers' own: set_attention_backend on one model makes
    its backend that of every other model too, and reset_attention_backend leaves it there.
    """
    if getattr(registry.set_active_backend, "sla2", False):
        return
    plain = registry.set_active_backend

    def set_active_backend(backend: Any) -> None:
        if not str(getattr(backend, "value", backend)).startswith(PREFIX):
            plain(backend)

    set_active_backend.sla2 = True  # type: ignore[attr-defined]
    registry.set_active_backend = staticmethod(set_active_backend)
