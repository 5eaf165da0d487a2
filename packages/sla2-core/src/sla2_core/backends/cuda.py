"""cuda and emulator: the CUDA kernels of sla2_kernels, on a GPU or, for tests, on the CPU.

16-bit tensors in and out, on the caller's stream, without waiting for the device.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sla2_core.backends.base import Backend, Grads, Inputs, Problem
from sla2_core.backends.cuda_routed import routed
from sla2_core.backends.means import spread_means
from sla2_core.backends.pointers import (
    DTYPES,
    EMULATED,
    alpha_of,
    device_of,
    empty_out,
    int32,
    map_of,
    pointer,
    problem_of,
    strided,
    width,
)
from sla2_core.backends.run_precision import to_run
from sla2_core.block_map import Geometry, num_blocks
from sla2_core.options import Options, constant

if TYPE_CHECKING:
    from sla2_kernels.problem import Strided


@constant
def missing() -> str | None:
    """One line that says what this machine lacks for kernels on CUDA tensors, None if nothing."""
    return _missing()


@functools.cache
def _missing() -> str | None:
    from sla2_kernels.launch import missing_for_cuda

    return missing_for_cuda()


@constant
def _unfit(
    target: str,
    index: int | None,
    dtype: torch.dtype,
    head_dim: int,
    block_q: int,
    block_k: int,
    precision: str,
) -> str | None:
    """Why the kernels cannot take a call with these settings, None if they can."""
    from sla2_kernels.kernels import supports
    from sla2_kernels.launch import device_architecture
    from sla2_kernels.problem import Problem as KernelProblem

    if dtype not in DTYPES:
        return f"q: expected bfloat16 or float16 for the CUDA kernels, got {dtype}"
    try:
        KernelProblem(
            batch=1,
            heads=1,
            n_q=1,
            n_k=1,
            head_dim=head_dim,
            block_q=block_q,
            block_k=block_k,
            dtype=DTYPES[dtype],
            precision=precision,
        )
    except ValueError as error:
        return str(error)
    arch = EMULATED if target == "emulator" else device_architecture(index or 0)
    if not supports(arch, precision):
        return (
            f"precision: expected 'full' or 'int8_int8' on {arch}, which has no FP8, got"
            f" {precision!r}"
        )
    return None


@torch.library.custom_op("sla2::cuda_pool", mutates_args=())
def pool(
    q: Tensor, k: Tensor, lengths: Tensor | None, block_q: int, block_k: int, target: str
) -> tuple[Tensor, Tensor]:
    """Block means of q (B, H, N_q, d) and of k's valid tokens (B, H, N_k, d): (B, H, T_m, d) and
    (B, H, T_n, d), fp32.
    """
    from sla2_kernels.prepare import pool as run

    nothing = q.new_empty(0)
    call = Inputs(q, k, k, nothing, nothing, None, lengths)
    problem = problem_of(call, Options(block_q=block_q, block_k=block_k))
    queries, keys = strided(q), strided(k)
    made = run(device_of(q, target), problem, queries, keys, keys, smooth_k=False, pooled=True)
    b, h, _, d = q.shape
    pooled = (x.owner.view(b, h, -1, width(d)) for x in (made.pooled_q, made.pooled_k))
    means_q, means_k = (x if d == width(d) else x[..., :d].contiguous() for x in pooled)
    return means_q, means_k


@pool.register_fake
def _(
    q: Tensor, k: Tensor, lengths: Tensor | None, block_q: int, block_k: int, target: str
) -> tuple[Tensor, Tensor]:
    def means(x: Tensor, block: int) -> Tensor:
        b, h, n, d = x.shape
        return x.new_empty((b, h, num_blocks(n, block), d), dtype=torch.float32)

    return means(q, block_q), means(k, block_k)


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, lengths, *ctx.blocks, _ = inputs
    ctx.sizes, ctx.dtype = (q.shape[2], k.shape[2]), q.dtype
    ctx.save_for_backward(lengths)


def _differentiate_pool(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    (lengths,) = ctx.saved_tensors
    d_q = spread_means(grad_q, ctx.blocks[0], ctx.sizes[0], None).to(ctx.dtype)
    d_k = spread_means(grad_k, ctx.blocks[1], ctx.sizes[1], lengths).to(ctx.dtype)
    return d_q, d_k, None, None, None, None


pool.register_autograd(_differentiate_pool, setup_context=_save_pool)


@torch.library.custom_op("sla2::cuda_route", mutates_args=())
def route(
    pooled_q: Tensor,
    pooled_k: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    lengths: Tensor | None,
    block_q: int,
    block_k: int,
    n_q: int,
    n_k: int,
    topk: float,
    routable: int,
    target: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and the best key blocks of each row, in fp32 whatever torch's matmul precision is: see
    Backend.route. pooled_q (B, H, T_m, d), pooled_k (B, H, T_n, d) fp32; no weights: the identity.
    """
    from sla2_kernels.forward import route as run
    from sla2_kernels.problem import Problem as KernelProblem

    b, h, _, d = pooled_q.shape
    problem = KernelProblem(
        batch=b,
        heads=h,
        n_q=n_q,
        n_k=n_k,
        head_dim=d,
        block_q=block_q,
        block_k=block_k,
        kv_lengths=int32(lengths),
    )
    if (lack := width(d) - d) > 0:
        pooled_q, pooled_k = (torch.nn.functional.pad(x, (0, lack)) for x in (pooled_q, pooled_k))
    found = run(
        device_of(pooled_q, target),
        problem,
        pointer(pooled_q.contiguous()),
        pointer(pooled_k.contiguous()),
        pointer(None if weight_q is None else weight_q.float().contiguous()),
        pointer(None if weight_k is None else weight_k.float().contiguous()),
        1 if weight_q is None else weight_q.shape[0],
        topk,
        routable=routable,
    )
    return found.scores.owner, found.block_map.indices.owner, found.block_map.counts.owner


@route.register_fake
def _(
    pooled_q: Tensor,
    pooled_k: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    lengths: Tensor | None,
    block_q: int,
    block_k: int,
    n_q: int,
    n_k: int,
    topk: float,
    routable: int,
    target: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, t_n = pooled_q.shape[:3], pooled_k.shape[2]
    chosen = max(1, round(topk * routable)) if routable else 0
    indices = pooled_q.new_empty((*rows, chosen + t_n - routable), dtype=torch.int32)
    return pooled_q.new_empty((*rows, t_n)), indices, indices.new_empty(rows)


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_route(
    ctx: Any, grad: Tensor | None, _indices: None, _counts: None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 12
    q, k, weight_q, weight_k = ctx.saved_tensors
    grad = grad * q.shape[-1] ** -0.5
    if weight_q is None:
        return grad @ k, grad.transpose(-1, -2) @ q, *(None,) * 10
    found = []
    for x, weight, d_y in (
        (q, weight_q, grad @ (k @ weight_k)),
        (k, weight_k, grad.transpose(-1, -2) @ (q @ weight_q)),
    ):
        d_weight = (x.transpose(-1, -2) @ d_y).sum(0)
        d_weight = d_weight.sum(0, keepdim=True) if weight.shape[0] == 1 else d_weight
        found.append((d_y @ weight.transpose(-1, -2), d_weight.to(weight.dtype)))
    (d_q, d_weight_q), (d_k, d_weight_k) = found
    return d_q, d_k, d_weight_q, d_weight_k, *(None,) * 8


route.register_autograd(_differentiate_route, setup_context=_save_route)


def _joins(call: Inputs, options: Options) -> bool:
    """Whether pooled keys join the softmax."""
    return call.alpha is not None and options.complement == "pooled"


class CudaBackend(Backend):
    """The kernels of sla2_kernels.csrc on a GPU."""

    name: ClassVar[str] = "cuda"
    device: ClassVar[str | None] = "cuda"
    smooths = True
    takes_wide = False
    any_layout = True

    def missing(self) -> str | None:
        """One line that says what this machine lacks: a GPU, its driver, cupy or NVRTC."""
        return missing()

    def fuses(self, options: Options) -> bool:
        """Whether the kernels have this complement: the linear one, and the pooled one but for the
        gradients of a low-bit forward by qat_backward="matched".
        """
        if options.complement == "pooled":
            matched = options.format.low and options.qat_backward == "matched"
            return not (matched and torch.is_grad_enabled())
        return options.complement == "linear"

    def unfit(self, problem: Problem) -> str | None:
        """Why the kernels cannot take a call: its dtype, head dimension, block sizes, or its
        precision on this GPU.
        """
        options = problem.options
        if options.format.cuda is None:
            return f"precision: the CUDA kernels do not have {options.precision!r}"
        return _unfit(
            self.name,
            problem.device.index,
            problem.dtype,
            problem.head_dim,
            options.block_q,
            options.block_k,
            options.format.cuda,
        )

    def pool(
        self, q: Tensor, k: Tensor, lengths: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        """By the CUDA kernels, in fp32."""
        return pool(q, k, lengths, options.block_q, options.block_k, self.name)

    def route(
        self,
        pooled_q: Tensor,
        pooled_k: Tensor,
        weights: tuple[Tensor, Tensor] | None,
        lengths: Tensor | None,
        geometry: Geometry,
        topk: float,
        routable: int,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """As Backend.route, never None."""
        pair = weights or (None, None)
        return route(pooled_q, pooled_k, *pair, lengths, *geometry, topk, routable, self.name)

    def empty_out(self, q: Tensor) -> Tensor:
        """A transposed (B, N, H, d) if q is one, so that the model's own layout comes back without
        a copy.
        """
        return empty_out(q)

    def routed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        weights: tuple[Tensor, Tensor] | None,
        rule: tuple[Tensor | None, Tensor | None],
        topk: float,
        routable: int,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """As Backend.routed, never None."""
        pair = weights or (None, None)
        return routed(q, k, v, *pair, lengths, *rule, topk, routable, options.text, self.name)

    def forward(self, call: Inputs, options: Options, save: bool) -> list[Tensor]:
        """As Backend.forward. Without `save`, FP8 runs in 16 bit on GPUs that would emulate it:
        see `run_precision`. Hopper's own kernels have it.

        Saved: the smoothed K if K is smoothed; with alpha also O_s, the map as bits, 1 / unselected
        blocks, H and Z (see sla2_kernels.forward.Linear), or of the pooled complement its keys, its
        values and the map as bits (Pooled).
        """
        from sla2_kernels.forward import forward

        q, smooth_k = call.q, options.smooth_k
        device, problem = device_of(q, self.name), problem_of(call, options)
        if not save:
            problem = to_run(device, problem)
        out = strided(self.empty_out(q)) if problem.head_dim == problem.width else None
        made = forward(
            device,
            problem,
            strided(q),
            strided(call.k),
            strided(call.v),
            map_of(call),
            alpha_of(call.alpha),
            smooth_k=smooth_k,
            save=save,
            out=out,
            complement=options.complement,
        )
        found = [made.out.owner.view(q.shape), made.lse.owner]
        if save and smooth_k:
            found.append(made.made.k.owner)
        if save and made.linear:
            linear = made.linear
            kept = (made.out_sparse, linear.bits, linear.rest_inverse)
            found += [x.owner for x in (*kept, linear.state, linear.norm)]
        if save and made.pooled:
            found += [x.owner for x in (made.pooled.k, made.pooled.v, made.pooled.bits)]
        return found

    def saved(self, call: Inputs, options: Options) -> list[Tensor]:
        """Empty tensors of what forward() saves, in its order; width is 64 or 128 channels."""
        q, indices = call.q, call.indices
        (b, h, n_q, d), n_k = q.shape, call.k.shape[2]
        pairs, wide = b * h, width(d)
        t_m, t_n = num_blocks(n_q, options.block_q), num_blocks(n_k, options.block_k)
        found = []
        if options.smooth_k:
            found.append(q.new_empty((pairs, n_k, wide)))
        bits = (pairs, t_m, num_blocks(t_n, 32))
        if _joins(call, options):
            found += [q.new_empty((pairs, t_n, wide)) for _ in range(2)]
            found.append(indices.new_empty(bits))
        elif call.alpha is not None:
            found.append(q.new_empty((pairs, n_q, wide)))
            found.append(indices.new_empty(bits))
            found.append(q.new_empty((pairs, t_m), dtype=torch.float32))
            found.append(q.new_empty((pairs, t_m, wide, wide)))
            found.append(q.new_empty((pairs, t_m, wide), dtype=torch.float32))
        return found

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        call: Inputs,
        results: list[Tensor],
        options: Options,
    ) -> Grads:
        """Alg. 3, or the gradient of the low-bit forward ("matched"); see
        sla2_kernels.backward.backward.
        """
        from sla2_kernels.backward import backward
        from sla2_kernels.forward import Forward, Linear, Pooled
        from sla2_kernels.prepare import Prepared, widened
        from sla2_kernels.prepare import keys as prepare
        from sla2_kernels.prepare import pool as run_pool
        from sla2_kernels.problem import ONE, Strided

        q, k, v, alpha = call.q, call.k, call.v, call.alpha
        smooth_k = options.smooth_k
        device, problem = device_of(q, self.name), problem_of(call, options)
        out, lse, *kept = results
        keys = kept.pop(0).view(*k.shape[:3], -1) if smooth_k else k

        def wide(x: Tensor) -> Strided:
            if x.shape[3] == problem.width:
                return strided(x)
            return widened(device, problem, strided(x), x.shape[2])

        if options.qat_backward == "matched" and problem.low:  # needs the 8-bit copies again
            made = run_pool(device, problem, *map(strided, (q, k, v)), smooth_k=smooth_k)
            made = prepare(device, problem, made, linear=False)._replace(k=wide(keys))
        else:
            made = Prepared(q=wide(q), k=wide(keys), v=wide(v))
        linear, pooled = None, None
        if alpha is None or _joins(call, options):
            out_sparse = wide(out)
        else:
            own, bits, rest_inverse, state, norm = map(pointer, kept)
            out_sparse = Strided.of(own, problem.heads, problem.n_q, problem.width)
            linear = Linear(bits=bits, rest_inverse=rest_inverse, state=state, norm=norm)
        ratio = alpha_of(alpha) or ONE
        if _joins(call, options):
            means_k, means_v, bits = map(pointer, kept)
            pooled, ratio = Pooled(k=means_k, v=means_v, bits=bits, bias=ratio), ONE
        saved = Forward(
            out=strided(out),
            lse=pointer(lse),
            made=made,
            block_map=map_of(call),
            alpha=ratio,
            linear=linear,
            out_sparse=out_sparse,
            smooth_k=smooth_k,
            pooled=pooled,
        )
        found = backward(
            device, problem, saved, strided(grad_out), qat_backward=options.qat_backward
        )
        d_q, d_k, d_v = (
            pointer.owner.view(x.shape)
            for pointer, x in ((found.d_q, q), (found.d_k, k), (found.d_v, v))
        )
        d_alpha = None if alpha is None else found.d_alpha.owner.to(alpha.dtype)
        return Grads(d_q, d_k, d_v, d_alpha)


class EmulatorBackend(CudaBackend):
    """The same sources on the CPU, for tests: see sla2_kernels.emulator."""

    name = "emulator"
    device = "cpu"

    def missing(self) -> str | None:
        """None: the emulator comes with sla2_kernels."""
        return None
