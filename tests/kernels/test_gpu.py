"""On a GPU: the whole operator on a side stream, without waiting for the device, in a CUDA graph,
the same bits each time.

Its memory is the device's, unlike that of test_kernels_*.py, which run there on pinned memory.
"""

import pytest
import torch
from helpers import problems

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]

TARGET, WHERE = "cuda", "cuda"
SHAPES = [(2, 200, 333, 64), (1, 1000, 1000, 128)]
PAPER = (12, 32760, 32760, 128)
ALPHA = 0.8


class Operator:
    """Forward and backward of one problem through sla2_kernels.forward, with torch's memory."""

    def __init__(self, heads, n_q, n_k, d, dtype="bfloat16", precision="full", topk=0.4):
        from sla2_kernels.problem import Problem
        from sla2_kernels.specs import architecture_of

        torch.manual_seed(0)
        self.dtype, self.topk = getattr(torch, dtype), topk
        self.arch = (
            architecture_of(*torch.cuda.get_device_capability()) if TARGET == "cuda" else "sm_90a"
        )
        self.tensors = [
            torch.randn(1, heads, n, d, device=WHERE).to(self.dtype) for n in (n_q, n_k, n_k, n_q)
        ]
        self.problem = Problem(
            batch=1, heads=heads, n_q=n_q, n_k=n_k, head_dim=d, dtype=dtype, precision=precision
        )
        self.weight = torch.eye(d, device=WHERE)[None].contiguous()
        self.alpha = torch.full((1, heads, 1), ALPHA, device=WHERE)

    def run(self):
        """(O, L, dQ, dK, dV) and the map's indices, on the current stream."""
        from sla2_kernels.backward import backward
        from sla2_kernels.forward import forward, route
        from sla2_kernels.launch import Pointer
        from sla2_kernels.prepare import pool
        from sla2_kernels.problem import Alpha, Device, Strided

        def pointer(tensor):
            return Pointer(tensor.data_ptr(), tensor)

        def allocate(shape, dtype):
            return pointer(torch.empty(shape, dtype=getattr(torch, dtype), device=WHERE))

        stream = torch.cuda.current_stream().cuda_stream if TARGET == "cuda" else None
        device = Device(allocate=allocate, target=TARGET, arch=self.arch, stream=stream)
        q, k, v, grad = (Strided(pointer(x), x.stride()[:3]) for x in self.tensors)
        weight, alpha = pointer(self.weight), Alpha.of(pointer(self.alpha), tuple(self.alpha.shape))
        made = pool(device, self.problem, q, k, v, pooled=True)
        block_map, _, _ = route(
            device, self.problem, made.pooled_q, made.pooled_k, weight, weight, 1, self.topk
        )
        saved = forward(device, self.problem, q, k, v, block_map, alpha, made=made, save=True)
        found = backward(device, self.problem, saved, grad)
        out, lse, *grads = (
            x.owner for x in (saved.out, saved.lse, found.d_q, found.d_k, found.d_v)
        )
        shaped = [
            x.view(like.shape)
            for x, like in zip((out, *grads), (self.tensors[0], *self.tensors[:3]))
        ]
        return [shaped[0], lse, *shaped[1:]], block_map.indices.owner

    def case(self, indices):
        """The same call for the references, on the CPU."""
        from sla2_core import BlockMap

        p = self.problem
        mask = torch.zeros(1, p.heads, p.t_m, p.t_n, dtype=torch.bool).scatter_(
            -1, indices.cpu().long(), True
        )
        blocks = BlockMap.from_mask(
            mask, block_q=p.block_q, block_k=p.block_k, n_q=p.n_q, n_k=p.n_k
        )
        return problems.Case(*(x.cpu() for x in self.tensors), blocks, self.alpha.cpu(), None, p)


def same(first, second):
    return all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(first, second)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference_in_fp64(shape, dtype):
    operator = Operator(*shape, dtype=dtype)
    (out, _, *grads), indices = operator.run()
    case = operator.case(indices)
    (exact, exact_grads), (plain, plain_grads) = (
        f(case, gradients=True) for f in (problems.oracle, problems.same_dtype)
    )
    problems.assert_as_good(out.cpu(), exact, plain, 2.0)
    for name, found, right, dense in zip(("dQ", "dK", "dV"), grads, exact_grads, plain_grads):
        problems.assert_as_good(found.cpu(), right, dense, 3.0, name)


@pytest.mark.parametrize("precision", ["full", "int8", "int8_int8", "fp8"])
def test_rows_of_the_paper_shape(precision):
    from sla2_kernels.kernels import supports

    operator = Operator(*PAPER, precision=precision, topk=0.03)
    if not supports(operator.arch, precision):
        pytest.skip(f"{operator.arch} has no FP8")
    (out, *_, d_q, d_k, d_v), indices = operator.run()
    assert all(bool(x.isfinite().all()) for x in (out, d_q, d_k, d_v))
    heads, t_m = operator.problem.heads, operator.problem.t_m
    for head, block in ((0, 0), (heads // 2, t_m // 2), (heads - 1, t_m - 1)):
        rows = slice(128 * block, 128 * block + 128)
        q, k, v = (x[0, head].double() for x in operator.tensors[:3])
        q, k = q[rows], k - k.mean(0)
        chosen = torch.zeros(len(k), dtype=torch.bool, device=k.device)
        for j in indices[0, head, block].tolist():
            chosen[64 * j : 64 * j + 64] = True
        o_s = torch.softmax(q @ k[chosen].T * q.shape[1] ** -0.5, -1) @ v[chosen]
        phi_q, phi_k = torch.softmax(q, -1), torch.softmax(k[~chosen], -1)
        o_l = phi_q @ (phi_k.T @ v[~chosen]) / (phi_q @ phi_k.sum(0))[:, None]
        right = ALPHA * o_s + (1 - ALPHA) * o_l
        error = (out[0, head, rows].double() - right).norm() / right.norm()
        assert error < (0.02 if precision == "full" else 0.1), (
            f"head {head}, row block {block}: {error:.3g}"
        )


@pytest.mark.parametrize("precision", ["full", "int8_int8"])
def test_never_waits_for_the_device(precision):
    operator = Operator(*SHAPES[0], precision=precision)
    operator.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeats_to_the_bit_on_any_stream():
    operator = Operator(*SHAPES[1])
    first, _ = operator.run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second, _ = operator.run()
    torch.cuda.synchronize()
    assert same(first, second)


def test_a_cuda_graph_captures_it():
    operator = Operator(*SHAPES[0])
    expected, _ = operator.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, _ = operator.run()
    for tensor in found:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same(expected, found)
