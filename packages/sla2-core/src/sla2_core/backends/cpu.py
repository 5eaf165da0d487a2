"""cpu: the numba kernels of sla2_kernels.cpu, for CPU tensors of any dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sla2_core.backends.base import Grads, Inputs, to_work, work_dtype
from sla2_core.backends.blocked import BlockedBackend
from sla2_core.backends.kernels import block_means, heads_of
from sla2_core.options import Options, constant

if TYPE_CHECKING:
    from sla2_kernels.cpu.build import Array
    from sla2_kernels.cpu.operator import Map

# Multiply-adds of a product over all selected pairs below which one thread does it.
_ALONE = 1 << 22
# What the kernels' rounding of P~ is called there, by the format's element of P V.
_ROUNDING = {"none": "none", "fp8": "fp8", "int8": "int8"}


def _map(call: Inputs, options: Options) -> Map:
    from sla2_kernels.cpu.operator import Map

    b, h = call.counts.shape[:2]
    n_k = call.k.shape[2]
    lengths = torch.full((b,), n_k) if call.lengths is None else call.lengths
    valid = lengths.repeat_interleave(h).to(torch.int64).numpy()
    indices, counts = heads_of(call.indices), heads_of(call.counts)
    return Map(indices, counts, valid, options.block_q, options.block_k, n_k)


def _threads(call: Inputs, options: Options) -> int:
    b, h, n_q, d = call.q.shape
    pairs = b * h * n_q * call.indices.shape[3] * options.block_k
    return 1 if pairs * d < _ALONE else torch.get_num_threads()


def _low(
    arrays: tuple[Array, Array, Array], blocks: Map, qk: str, pv: str, threads: int
) -> tuple[Array, Array, Array]:
    """Q, K and V (numpy arrays of heads) as the sparse branch of a low-bit forward sees them;
    padding counts in no scale.
    """
    import numpy as np
    from sla2_kernels.cpu.quantize import quantize_blocks, quantize_channels

    q, k, v = arrays
    whole = np.full(len(q), q.shape[1])
    return (
        quantize_blocks(q, whole, blocks.block_q, qk, threads),
        quantize_blocks(k, blocks.lengths, blocks.block_k, qk, threads),
        quantize_channels(v, blocks.lengths, pv, threads),
    )


def stages() -> AbstractContextManager[dict[str, float]]:
    """A context manager that gives a dict. The dict receives the seconds of each CPU kernel that
    runs inside, by the kernel's name.
    """
    from sla2_kernels.cpu.build import stages as seconds

    return seconds()


def compile_seconds() -> dict[str, float]:
    """By the kernel's name: the seconds that this process spent on compiling it, or on loading it
    from the cache.
    """
    from sla2_kernels.cpu.build import compile_seconds as seconds

    return seconds()


_COMPLEMENTS = ("linear", "pooled")


def _pooled(call: Inputs, options: Options) -> bool:
    """Whether pooled keys join the softmax: O is then that of the one softmax, as without alpha."""
    return call.alpha is not None and options.complement == "pooled"


@constant
def _has_kernel(options: str) -> bool:
    """Whether numba kernels do all of it, forward and backward."""
    read = Options.read(options)
    matched = read.format.low and read.qat_backward == "matched"
    return read.format.cpu is not None and not matched


class CpuBackend(BlockedBackend):
    """numba on the CPU; inputs of 16 bits are computed in fp32, fp64 in fp64.

    Formats for study (nvfp4) and the backward that rounds again ("matched") have no kernel: their
    sparse branch is computed as in `blocked`.
    """

    name = "cpu"
    device = "cpu"
    log_sum_exp_gradient = False

    def fuses(self, options: Options) -> bool:
        """Whether numba kernels have this format, its backward and this complement."""
        return _has_kernel(options.text) and options.complement in _COMPLEMENTS

    def pool(
        self, q: Tensor, k: Tensor, lengths: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        """By the CPU kernel, in fp32 (fp64 stays)."""
        means_q = block_means(q, None, options.block_q)
        return means_q, block_means(k, lengths, options.block_k)

    def forward(self, call: Inputs, options: Options, save: bool) -> list[Tensor]:
        """As Backend.forward. Saved: O_s (B, H, N_q, d) in fp32 (fp64 for fp64 inputs) where a
        linear branch is mixed in; without one O is what the backward needs.
        """
        from sla2_kernels.cpu.operator import forward

        if not self.fuses(options):
            return super().forward(call, options, save)
        q, work, threads = call.q, work_dtype(call.q), _threads(call, options)
        arrays = (heads_of(to_work(q)), heads_of(to_work(call.k)), heads_of(to_work(call.v)))
        blocks = _map(call, options)
        qk, pv = options.format.cpu or ("none", "none")
        low = _low(arrays, blocks, qk, pv, threads) if options.format.low else None
        alpha = None if call.alpha is None else heads_of(call.alpha.to(work))
        out, o_s, lse = forward(
            *arrays, blocks, alpha, low, _ROUNDING[pv], threads, options.complement
        )
        found = [torch.from_numpy(out).view(q.shape).to(q.dtype)]
        found.append(torch.from_numpy(lse).view(q.shape[:3]))
        if save and alpha is not None and not _pooled(call, options):
            found.append(torch.from_numpy(o_s).view(q.shape))
        return found

    def saved(self, call: Inputs, options: Options) -> list[Tensor]:
        """An empty O_s, where a linear branch is mixed in."""
        if not self.fuses(options):
            return super().saved(call, options)
        q = call.q
        if call.alpha is None or _pooled(call, options):
            return []
        return [q.new_empty(q.shape, dtype=work_dtype(q))]

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        call: Inputs,
        results: list[Tensor],
        options: Options,
    ) -> Grads:
        """Alg. 3 from the saved O_s and L; see sla2_kernels.cpu.operator.backward."""
        from sla2_kernels.cpu.operator import backward

        if not self.fuses(options):
            return super().backward(grad_out, grad_lse, call, results, options)
        work = work_dtype(call.q)
        alpha = None if call.alpha is None else heads_of(call.alpha.to(work))
        o_s = results[2] if len(results) > 2 else results[0]
        *found, found_alpha = backward(
            heads_of(grad_out.to(work)),
            heads_of(call.q.to(work)),
            heads_of(call.k.to(work)),
            heads_of(call.v.to(work)),
            _map(call, options),
            alpha,
            heads_of(o_s.to(work)),
            heads_of(results[1]),
            _threads(call, options),
            options.complement,
        )
        d_q, d_k, d_v = (
            torch.from_numpy(d).view(x.shape).to(x.dtype)
            for d, x in zip(found, (call.q, call.k, call.v))
        )
        if call.alpha is None:
            return Grads(d_q, d_k, d_v, None)
        d_alpha = torch.from_numpy(found_alpha).view(call.counts.shape)
        return Grads(d_q, d_k, d_v, d_alpha.to(call.alpha.dtype))
