"""Routing, alpha and the operator by the CUDA kernels in one call, without gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sla2_core.backends.pointers import DTYPES, device_of, empty_out, steps, width
from sla2_core.backends.run_precision import to_run
from sla2_core.block_map import num_blocks
from sla2_core.options import Options

if TYPE_CHECKING:
    from sla2_kernels.launch import Pointer
    from sla2_kernels.plan import Plan
    from sla2_kernels.problem import Device

_PLANS = 128  # kept: a model has a few shapes, for each of its layers' kinds


class _Layout(NamedTuple):
    """How a tensor (B, H, N, d) lies: its shape, the strides of the first three axes in elements,
    and by how many bytes its address is off a multiple of 16.
    """

    shape: tuple[int, ...]
    steps: tuple[int, int, int]
    off: int


class _Call(NamedTuple):
    """What the launches of a call depend on. `heads` of the router's weights, 0 without; `rule`:
    heads and knots of alpha's (of b: heads and 1), and whether it has a slope, or None; `device`:
    target, architecture, number, and whether wgmma may be used.
    """

    q: _Layout
    k: _Layout
    v: _Layout
    out: _Layout | None
    dtype: torch.dtype
    lengths: bool
    heads: int
    rule: tuple[int, int, bool] | None
    topk: float
    routable: int
    options: str
    device: tuple[str, str, int, bool]


def _layout(x: Tensor) -> _Layout:
    return _Layout(tuple(x.shape), steps(x), x.data_ptr() % 16)


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


@functools.lru_cache(maxsize=_PLANS)
def plan_of(call: _Call) -> Plan:
    """The launches of such calls; see `sla2_kernels.plan`."""
    from sla2_kernels.forward import routed_forward
    from sla2_kernels.plan import make_plan
    from sla2_kernels.problem import NULL, Alpha, AlphaRule, Problem, Strided
    from sla2_kernels.problem import Device as KernelDevice

    options, (target, arch, index, wgmma) = Options.read(call.options), call.device
    (b, h, n_q, d), n_k = call.q.shape, call.k.shape[2]

    def launches(device: Device, given: Sequence[Pointer]) -> list[Pointer]:
        q, k, v, out, weight_q, weight_k, lengths, offset, slope = given
        problem = Problem(
            batch=b,
            heads=h,
            n_q=n_q,
            n_k=n_k,
            head_dim=d,
            dtype=DTYPES[call.dtype],
            block_q=options.block_q,
            block_k=options.block_k,
            precision=options.format.cuda or options.precision,
            kv_lengths=lengths,
        )
        joins = options.complement == "pooled"
        alpha: AlphaRule | Alpha = AlphaRule()
        if call.rule:
            heads, knots = call.rule[:2]
            rule = AlphaRule(offset, slope, heads, knots)
            alpha = Alpha.of(offset, (1, heads, 1)) if joins else rule
        found = routed_forward(
            device,
            to_run(device, problem),
            Strided(q, call.q.steps),
            Strided(k, call.k.steps),
            Strided(v, call.v.steps),
            weight_q,
            weight_k,
            call.heads or 1,
            call.topk,
            call.routable,
            alpha,
            smooth_k=options.smooth_k,
            out=Strided(out, call.out.steps) if call.out else None,
        )
        block_map = found.block_map
        made = [block_map.indices, block_map.counts]
        if not call.out:
            made.insert(0, found.out.pointer)
        return made if joins else [*made, found.alpha.values]

    weights, rule = (0 if call.heads else None), call.rule
    inputs = [
        *(layout.off for layout in (call.q, call.k, call.v)),
        call.out.off if call.out else None,
        *(weights, weights),
        0 if call.lengths else None,
        0 if rule else None,
        0 if rule and rule[2] else None,
    ]
    device = KernelDevice(
        allocate=lambda shape, dtype: NULL, target=target, arch=arch, index=index, wgmma=wgmma
    )
    return make_plan(device, inputs, launches)


@torch.library.custom_op("sla2::cuda_routed", mutates_args=())
def routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    lengths: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    topk: float,
    routable: int,
    options: str,
    target: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Routing, alpha and the operator, without gradients: see Backend.routed. `options` is
    Options.text.

    The launches of each shape are planned once: see plan_of.
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    weight_q, weight_k, offset, slope = map(_fp32, (weight_q, weight_k, offset, slope))
    lengths = None if lengths is None else lengths.to(torch.int32)
    out = empty_out(q) if q.shape[3] == width(q.shape[3]) else None
    device = device_of(q, target)
    rule = None
    if offset is not None:
        rule = offset.shape[0], offset[0].numel(), slope is not None
    plan = plan_of(
        _Call(
            _layout(q),
            _layout(k),
            _layout(v),
            None if out is None else _layout(out),
            q.dtype,
            lengths is not None,
            0 if weight_q is None else weight_q.shape[0],
            rule,
            topk,
            routable,
            options,
            (target, device.arch, device.index, device.wgmma),
        )
    )
    tensors = (q, k, v, out, weight_q, weight_k, lengths, offset, slope)
    made = plan.run(device, [0 if x is None else x.data_ptr() for x in tensors])
    results = [x.owner for x in made]
    if out is None:
        out = results.pop(0).view(q.shape)
    indices, counts, *made_alpha = results
    alpha = made_alpha[0] if made_alpha else q.new_empty(0, dtype=torch.float32)
    return out, indices, counts, alpha


@routed.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    lengths: Tensor | None,
    offset: Tensor | None,
    slope: Tensor | None,
    topk: float,
    routable: int,
    options: str,
    target: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = Options.read(options)
    t_m, t_n = num_blocks(q.shape[2], settings.block_q), num_blocks(k.shape[2], settings.block_k)
    chosen = max(1, round(topk * routable)) if routable else 0
    indices = q.new_empty((*q.shape[:2], t_m, chosen + t_n - routable), dtype=torch.int32)
    per_row = (*q.shape[:2], t_m)
    none = settings.complement == "pooled"
    alpha = q.new_empty(0 if none else per_row, dtype=torch.float32)
    return empty_out(q), indices, indices.new_empty(per_row), alpha
