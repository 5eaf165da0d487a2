"""Named variants: functions that change a base configuration, and `variant: NAME` in settings.

docs/baselines.md says what the baselines take from their papers and how they are trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, overload

from sla2_core.config import SLA2Config
from sla2_core.registry import AXES, MIXINGS

Change = Callable[[SLA2Config], SLA2Config]


class Variant:
    """A named variant, called in one of two ways.

    `sla(base)` is the configuration `base` changed to the variant. `sla(topk=0.1)` is a dictionary
    of settings, {"variant": "sla", "topk": 0.1}: what a settings file would say, for a model of any
    size. apply_sla2 and build_config make a configuration of it.

    Attributes:
        name: as settings files have it.
        defaults: fields of SLA2Config that its settings have where they do not say otherwise.
    """

    def __init__(self, name: str, change: Change, defaults: Mapping[str, Any]):
        functools.update_wrapper(self, change)
        self.name, self.defaults, self._change = name, dict(defaults), change

    @overload
    def __call__(self, base: SLA2Config, /) -> SLA2Config: ...

    @overload
    def __call__(self, /, **settings: Any) -> dict[str, Any]: ...

    def __call__(self, base: SLA2Config | None = None, /, **settings: Any) -> Any:
        if base is None:
            return {"variant": self.name, **self.defaults, **settings}
        if settings:
            fields = ", ".join(settings)
            raise ValueError(f"{fields}: expected a configuration or settings, got both")
        return self._change(base)


VARIANTS: dict[str, Variant] = {}


def variant(name: str, **defaults: Any) -> Callable[[Change], Variant]:
    """Register a function that changes a base configuration, as settings files name it.

    `defaults` are fields of SLA2Config that its settings have where they do not say otherwise.
    """

    def add(change: Change) -> Variant:
        VARIANTS[name] = Variant(name, change, defaults)
        return VARIANTS[name]

    return add


@variant("sla2")
def sla2(base: SLA2Config) -> SLA2Config:
    """SLA2 (arXiv 2602.12675): a learned router, linear attention over the complement, a learned
    alpha of the base's kind, K smoothed.
    """
    alpha = "auto" if base.alpha == "sum" or MIXINGS.get(base.alpha).joins else base.alpha
    return base.replaced(router="learned", complement="linear", alpha=alpha, smooth_k=True)


@variant("pooled")
def pooled(base: SLA2Config) -> SLA2Config:
    """A learned router, and one pooled key for each block that it does not select, in the same
    softmax; see complement.pooled.
    """
    options = {**base.options, "pooled_bias": True}
    members = dict(router="learned", complement="pooled", alpha="joint")
    return base.replaced(**members, options=options, smooth_k=True)


@variant("training_free", topk=0.15)
def training_free(base: SLA2Config) -> SLA2Config:
    """Nothing is learned: top-k of the pooled scores, and one pooled key for each other block in
    the same softmax, b = 0. For a model as it is: apply_sla2(pipe.transformer, training_free()).
    """
    options = {**base.options, "pooled_bias": False}
    members = dict(router="heuristic", complement="pooled", alpha="joint")
    return base.replaced(**members, options=options, smooth_k=True)


@variant("sla")
def sla(base: SLA2Config) -> SLA2Config:
    """SLA as published (arXiv 2509.24006), the baseline: top-k of pooled scores, linear attention
    over all blocks with a learned projection, the sum of both, K not smoothed in the operator.
    """
    return base.replaced(router="heuristic", complement="projected", alpha="sum", smooth_k=False)


@variant("sla_published")
def sla_published(base: SLA2Config) -> SLA2Config:
    """SLA as its published code computes it, to the number of blocks: what the checkpoints of
    TurboDiffusion were trained with.
    """
    return sla(base).replaced(router="truncated")


@variant("sparse_only")
def sparse_only(base: SLA2Config) -> SLA2Config:
    """The sparse branch alone: nothing stands in for the blocks that are not selected."""
    return base.replaced(complement="none", alpha="one")


@variant("vsa")
def vsa(base: SLA2Config) -> SLA2Config:
    """VSA (arXiv 2505.13389) as it adapts a trained model, a baseline: top-k of pooled scores, and
    full attention between block means through a gate that starts at zero, O = O_f + G O_c.
    """
    return base.replaced(router="heuristic", complement="coarse", alpha="sum", smooth_k=False)


@variant("vmoba")
def vmoba(base: SLA2Config) -> SLA2Config:
    """VMoBA (arXiv 2506.23858), a baseline: block pairs chosen over all query blocks of a head
    until they hold the share k% of its similarity, the sparse branch alone.
    """
    return base.replaced(router="global_threshold", complement="none", alpha="one", smooth_k=False)


@variant("sparge_attention2")
def sparge_attention2(base: SLA2Config) -> SLA2Config:
    """SpargeAttention2 (arXiv 2602.13515), a baseline: top-k united with top-p of the pooled
    softmax, the sparse branch alone. Its training rule is stage 2 with loss="distill".
    """
    return base.replaced(router="topk_topp", complement="none", alpha="one")


@variant("heuristic_router")
def heuristic_router(base: SLA2Config) -> SLA2Config:
    """The same layer with SLA's router: top-k of the pooled scores, nothing learned."""
    return base.replaced(router="heuristic")


def paper_alpha(base: SLA2Config, num_query_blocks: int) -> SLA2Config:
    """alpha as in the paper: one value per query block, shared by the heads; ties the layer to one
    length.
    """
    return base.replaced(alpha="position", alpha_knots=num_query_blocks, alpha_per_head=False)


def build_config(values: Mapping[str, Any], *, head_dim: int, num_heads: int) -> SLA2Config:
    """The configuration that a settings file describes: `variant: NAME` and what overrides it.

    Args:
        values: fields of SLA2Config, and optionally "variant".
        head_dim, num_heads: the model's.

    Raises:
        ValueError: an unknown variant or field, a missing k%, a value outside its range.
    """
    values = dict(values)
    name = values.pop("variant", None)
    if name in VARIANTS:
        values = {**VARIANTS[name].defaults, **values}
    for field, own in (("head_dim", head_dim), ("num_heads", num_heads)):
        if values.get(field, own) != own:
            raise ValueError(f"{field}: expected {own} as in the model, got {values[field]}")
    values |= {"head_dim": head_dim, "num_heads": num_heads}
    if name is None:
        return SLA2Config.from_dict(values)
    if name not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {name!r}")
    # What the variant makes of the base, then what the settings say, checked together.
    chosen = {axis.field for axis in AXES} | {"options"}
    base = SLA2Config.from_dict({n: v for n, v in values.items() if n not in chosen})
    varied = VARIANTS[name](base)
    given = SLA2Config.from_dict(varied.to_dict() | {"options": {}} | values)
    options = {**varied.options, **values.get("options", {})}
    return given.replaced(options=options)
