"""torch.library custom ops over the CUDA kernels, on the GPU or on the emulator: pooling, routing,
attention, autograd.

16-bit tensors in and out, on the caller's stream, without waiting for the device. `target` is
"cuda" or "emulator".
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from sla2_core.backends.cpu import spread_means

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_EMULATED = "sm_90a"
_MADE = {"uint32": torch.int32}  # bit sets: torch has few operators on uint32


def _constant(function):
    """What torch.compiler.assume_constant_result does, without importing torch._dynamo, which makes
    folders.
    """
    function._dynamo_marked_constant = True
    return function


@_constant
def missing() -> str | None:
    """One line that says what this machine lacks for kernels on CUDA tensors, None if nothing."""
    return _missing()


@functools.cache
def _missing() -> str | None:
    from sla2_kernels.launch import missing_for_cuda

    return missing_for_cuda()


@_constant
def unfit(
    target: str,
    index: int | None,
    dtype: torch.dtype,
    head_dim: int,
    blocks: tuple[int, int],
    precision: str,
) -> str | None:
    """One line that says why the kernels cannot take a call with these settings, None
    if they can.
    """
    from sla2_kernels.kernels import supports
    from sla2_kernels.launch import device_architecture
    from sla2_kernels.problem import Problem

    if dtype not in DTYPES:
        return f"q: expected bfloat16 or float16 for the CUDA kernels, got {dtype}"
    sizes = dict(head_dim=head_dim, block_q=blocks[0], block_k=blocks[1])
    try:
        Problem(batch=1, heads=1, n_q=1, n_k=1, dtype=DTYPES[dtype], precision=precision, **sizes)
    except ValueError as error:
        return str(error)
    arch = _EMULATED if target == "emulator" else device_architecture(index or 0)
    if not supports(arch, precision):
        return (
            f"precision: expected 'full' or 'int8_int8' on {arch}, which has no FP8, got"
            f" {precision!r}"
        )
    return None


def _pointer(x: Tensor | None):
    from sla2_kernels.launch import Pointer

    return Pointer(0) if x is None else Pointer(x.data_ptr(), x)


def _device(x: Tensor, target: str):
    from sla2_kernels.launch import device_architecture
    from sla2_kernels.problem import Device

    def allocate(shape, dtype):
        return _pointer(
            torch.empty(shape, dtype=_MADE.get(dtype) or getattr(torch, dtype), device=x.device)
        )

    if target == "emulator":
        return Device(allocate=allocate, target=target, arch=_EMULATED)
    index = x.device.index
    stream = torch.cuda.current_stream(index).cuda_stream
    return Device(allocate=allocate, arch=device_architecture(index), index=index, stream=stream)


def _problem(
    q: Tensor,
    k: Tensor,
    lengths: Tensor | None,
    block_q: int,
    block_k: int,
    precision: str = "full",
):
    from sla2_kernels.problem import Problem

    lengths = None if lengths is None else lengths.to(torch.int32)
    return Problem(
        batch=q.shape[0],
        heads=q.shape[1],
        n_q=q.shape[2],
        n_k=k.shape[2],
        head_dim=q.shape[3],
        dtype=DTYPES[q.dtype],
        block_q=block_q,
        block_k=block_k,
        precision=precision,
        kv_lengths=_pointer(lengths),
    )


def _inputs(*tensors: Tensor):
    return [_pointer(x.contiguous()) for x in tensors]


def _strided(x: Tensor):
    """x (B, H, N, d) in the layout it has, copied only if its channels are not adjacent."""
    from sla2_kernels.problem import Strided

    x = x if x.stride(3) == 1 else x.contiguous()
    return Strided(
        _pointer(x), tuple(0 if size == 1 else step for size, step in zip(x.shape[:3], x.stride()))
    )


def _empty_out(q: Tensor) -> Tensor:
    """O for q: a transposed (B, N, H, d) if q is one, so that the model's own layout comes back
    without a copy.
    """
    b, h, n, d = q.shape
    if d == _width(d) and q.stride(1) < q.stride(2):
        return q.new_empty((b, n, h, d)).transpose(1, 2)
    return q.new_empty(q.shape)


def _map(indices: Tensor, counts: Tensor):
    from sla2_kernels.problem import Map

    return Map(*_inputs(indices, counts), indices.shape[3])


def _alpha(alpha: Tensor | None):
    from sla2_kernels.problem import Alpha

    if alpha is None:
        return None
    alpha = alpha.float()
    return Alpha(
        _pointer(alpha),
        tuple(0 if size == 1 else step for size, step in zip(alpha.shape, alpha.stride())),
    )


def _width(d: int) -> int:
    return 64 if d <= 64 else 128


def _blocks(n: int, block: int) -> int:
    return -(-n // block)


@torch.library.custom_op("sla2::cuda_pool", mutates_args=())
def pool(
    q: Tensor, k: Tensor, lengths: Tensor | None, block_q: int, block_k: int, target: str
) -> tuple[Tensor, Tensor]:
    """Block means of q (B, H, N_q, d) and of k's valid tokens (B, H, N_k, d): (B, H, T_m, d) and
    (B, H, T_n, d), fp32.
    """
    from sla2_kernels.forward import prologue

    device, problem = _device(q, target), _problem(q, k, lengths, block_q, block_k)
    queries, keys = _strided(q), _strided(k)
    made = prologue(device, problem, queries, keys, keys, smooth_k=False, linear=False, pool=True)
    b, h, _, d = q.shape
    pooled = (x.owner.view(b, h, -1, _width(d)) for x in (made.pooled_q, made.pooled_k))
    return tuple(x if d == _width(d) else x[..., :d].contiguous() for x in pooled)


@pool.register_fake
def _(q, k, lengths, block_q, block_k, target):
    pairs = ((q, block_q), (k, block_k))
    return tuple(
        x.new_empty((*x.shape[:2], _blocks(x.shape[2], b), x.shape[3]), dtype=torch.float32)
        for x, b in pairs
    )


def _save_pool(ctx, inputs, output) -> None:
    q, k, lengths, *ctx.blocks, _ = inputs
    ctx.sizes, ctx.dtype = (q.shape[2], k.shape[2]), q.dtype
    ctx.save_for_backward(lengths)


def _differentiate_pool(ctx, grad_q, grad_k):
    (lengths,) = ctx.saved_tensors
    d_q = spread_means(grad_q, ctx.blocks[0], ctx.sizes[0], None).to(ctx.dtype)
    return (
        d_q,
        spread_means(grad_k, ctx.blocks[1], ctx.sizes[1], lengths).to(ctx.dtype),
        None,
        None,
        None,
        None,
    )


pool.register_autograd(_differentiate_pool, setup_context=_save_pool)


@torch.library.custom_op("sla2::cuda_route", mutates_args=())
def route(
    pooled_q: Tensor,
    pooled_k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    lengths: Tensor | None,
    block_q: int,
    block_k: int,
    n_q: int,
    n_k: int,
    topk: float,
    target: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and the best key blocks of each row, in fp32 whatever torch's matmul precision is.

    pooled_q (B, H, T_m, d), pooled_k (B, H, T_n, d), weights (1|H, d, d): fp32. n_q and n_k:
    tokens.

    Returns:
        Scores fp32 (B, H, T_m, T_n), -inf for blocks without a valid token; indices int32 (B, H,
        T_m, K), ascending, -1 past counts int32 (B, H, T_m). Only the scores have gradients.
    """
    from sla2_kernels.forward import route as run
    from sla2_kernels.problem import Problem

    b, h, _, d = pooled_q.shape
    lengths = None if lengths is None else lengths.to(torch.int32)
    problem = Problem(
        batch=b,
        heads=h,
        n_q=n_q,
        n_k=n_k,
        head_dim=d,
        block_q=block_q,
        block_k=block_k,
        kv_lengths=_pointer(lengths),
    )
    if (lack := _width(d) - d) > 0:
        pooled_q, pooled_k = (torch.nn.functional.pad(x, (0, lack)) for x in (pooled_q, pooled_k))
    tensors = _inputs(pooled_q, pooled_k, weight_q.float(), weight_k.float())
    found, scores = run(_device(pooled_q, target), problem, *tensors, weight_q.shape[0], topk)
    return scores.owner, found.indices.owner, found.counts.owner


@route.register_fake
def _(pooled_q, pooled_k, weight_q, weight_k, lengths, block_q, block_k, n_q, n_k, topk, target):
    rows, t_n = pooled_q.shape[:3], pooled_k.shape[2]
    indices = pooled_q.new_empty((*rows, max(1, round(topk * t_n))), dtype=torch.int32)
    return pooled_q.new_empty((*rows, t_n)), indices, indices.new_empty(rows)


def _save_route(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate_route(ctx, grad, _indices, _counts):
    if grad is None:
        return (None,) * 11
    q, k, weight_q, weight_k = ctx.saved_tensors
    grad = grad * q.shape[-1] ** -0.5
    found = []
    for x, weight, d_y in (
        (q, weight_q, grad @ (k @ weight_k)),
        (k, weight_k, grad.transpose(-1, -2) @ (q @ weight_q)),
    ):
        d_weight = (x.transpose(-1, -2) @ d_y).sum(0)
        d_weight = d_weight.sum(0, keepdim=True) if weight.shape[0] == 1 else d_weight
        found.append((d_y @ weight.transpose(-1, -2), d_weight.to(weight.dtype)))
    (d_q, d_weight_q), (d_k, d_weight_k) = found
    return d_q, d_k, d_weight_q, d_weight_k, *(None,) * 7


route.register_autograd(_differentiate_route, setup_context=_save_route)


@torch.library.custom_op("sla2::cuda_attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    alpha: Tensor | None,
    lengths: Tensor | None,
    block_q: int,
    block_k: int,
    precision: str,
    qat_backward: str,
    smooth_k: bool,
    save: bool,
    target: str,
) -> list[Tensor]:
    """The operator on a block map.

    Args:
        q (B, H, N_q, d), k, v (B, H, N_k, d): bfloat16 or float16.
        indices int32 (B, H, T_m, K), counts int32 (B, H, T_m): BlockMap's.
        alpha: (B, H, T_m), or None for the sparse branch alone.
        lengths: int64 (B,), valid keys, or None.
        precision: of the sparse branch's forward. qat_backward: "paper" or "matched", what the
            backward recomputes from.
        smooth_k: subtract K's mean over tokens first.
        save: keep what the backward needs.

    Returns:
        O (B, H, N_q, d), laid out as q if d is 64 or 128, L fp32 (B, H, N_q), then with `save` what
        the backward reads: the smoothed K, and with alpha O_s, phi(Q), phi(K), the map's bits, 1 /
        unselected blocks, H and Z. Only O has a gradient.
    """
    from sla2_kernels.forward import forward

    device, problem = _device(q, target), _problem(q, k, lengths, block_q, block_k, precision)
    out = _strided(_empty_out(q)) if problem.head_dim == problem.width else None
    saved = forward(
        device,
        problem,
        *map(_strided, (q, k, v)),
        _map(indices, counts),
        _alpha(alpha),
        smooth_k=smooth_k,
        save=save,
        out=out,
    )
    found = [saved.out.owner.view(q.shape), saved.lse.owner]
    if save and smooth_k:
        found.append(saved.prologue.k.owner)
    if save and saved.linear:
        made, linear = saved.prologue, saved.linear
        kept = (
            saved.out_sparse,
            made.phi_q,
            made.phi_k,
            linear.bits,
            linear.rest_inverse,
            linear.state,
            linear.norm,
        )
        found += [x.owner for x in kept]
    return found


@attention.register_fake
def _(
    q,
    k,
    v,
    indices,
    counts,
    alpha,
    lengths,
    block_q,
    block_k,
    precision,
    qat_backward,
    smooth_k,
    save,
    target,
):
    (b, h, n_q, d), n_k = q.shape, k.shape[2]
    pairs, width, t_m, t_n = b * h, _width(d), _blocks(n_q, block_q), _blocks(n_k, block_k)
    found = [_empty_out(q), q.new_empty(q.shape[:3], dtype=torch.float32)]
    if save and smooth_k:
        found.append(q.new_empty((pairs, n_k, width)))
    if save and alpha is not None:
        found += [q.new_empty((pairs, n, width)) for n in (n_q, n_q, n_k)]
        found.append(indices.new_empty((pairs, t_m, _blocks(t_n, 32))))
        found.append(q.new_empty((pairs, t_m), dtype=torch.float32))
        found.append(q.new_empty((pairs, t_m, width, width)))
        found.append(q.new_empty((pairs, t_m, width), dtype=torch.float32))
    return found


@torch.library.custom_op("sla2::cuda_attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    alpha: Tensor | None,
    lengths: Tensor | None,
    results: list[Tensor],
    block_q: int,
    block_k: int,
    precision: str,
    qat_backward: str,
    smooth_k: bool,
    target: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV in the inputs' dtype, and d alpha fp32 (B, H, T_m) (empty without).

    `results` is what the forward returned with save=True.
    """
    from sla2_kernels.backward import backward
    from sla2_kernels.forward import Forward, Linear, Prologue, prologue, widened
    from sla2_kernels.problem import ONE, Strided

    device, problem = _device(q, target), _problem(q, k, lengths, block_q, block_k, precision)
    out, lse, *kept = results
    keys = kept.pop(0).view(*k.shape[:3], -1) if smooth_k else k

    def wide(x):
        return (
            _strided(x)
            if x.shape[3] == problem.width
            else widened(device, problem, _strided(x), x.shape[2])
        )

    if qat_backward == "matched" and problem.low:  # needs the 8-bit copies again
        made = prologue(device, problem, *map(_strided, (q, k, v)), smooth_k=smooth_k, linear=False)
    else:
        made = Prologue(q=wide(q), k=wide(keys), v=wide(v))
    linear = None
    if alpha is None:
        out_sparse = wide(out)
    else:
        out_sparse, phi_q, phi_k, bits, rest_inverse, state, norm = map(_pointer, kept)
        out_sparse = Strided.of(out_sparse, problem.heads, problem.n_q, problem.width)
        made = replace(made, phi_q=phi_q, phi_k=phi_k)
        linear = Linear(bits=bits, rest_inverse=rest_inverse, state=state, norm=norm)
    saved = Forward(
        out=_strided(out),
        lse=_pointer(lse),
        prologue=made,
        block_map=_map(indices, counts),
        alpha=_alpha(alpha) or ONE,
        linear=linear,
        out_sparse=out_sparse,
        smooth_k=smooth_k,
    )
    found = backward(device, problem, saved, _strided(grad_out), qat_backward=qat_backward)
    grads = (p.owner.view(x.shape) for p, x in ((found.d_q, q), (found.d_k, k), (found.d_v, v)))
    return (*grads, q.new_empty(0, dtype=torch.float32) if alpha is None else found.d_alpha.owner)


@attention_backward.register_fake
def _(grad_out, q, k, v, indices, counts, alpha, lengths, results, block_q, block_k, *_options):
    d_alpha = q.new_empty(0 if alpha is None else counts.shape, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_alpha


def _save_attention(ctx, inputs, output) -> None:
    q, k, v, indices, counts, alpha, lengths, *options, save, target = inputs
    ctx.options = (*options, target)
    if not save:
        raise RuntimeError(
            "sla2::cuda_attention: expected save=True where a gradient is wanted, got False"
        )
    ctx.save_for_backward(q, k, v, indices, counts, alpha, lengths, *output)
    ctx.set_materialize_grads(False)


def _differentiate_attention(ctx, grads):
    if grads[0] is None:
        return (None,) * 14
    *inputs, alpha, lengths = ctx.saved_tensors[:7]
    d_q, d_k, d_v, d_alpha = attention_backward(
        grads[0], *inputs, alpha, lengths, list(ctx.saved_tensors[7:]), *ctx.options
    )
    d_alpha = None if alpha is None else d_alpha.to(alpha.dtype)
    return d_q, d_k, d_v, None, None, d_alpha, *(None,) * 8


attention.register_autograd(_differentiate_attention, setup_context=_save_attention)
