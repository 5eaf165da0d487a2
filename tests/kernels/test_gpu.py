"""On a GPU: the whole operator on a side stream, without waiting for the device, in a CUDA graph, the same bits each time."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]

SHAPES = [(2, 200, 333, 64), (1, 1000, 1000, 128)]


class Operator:
    """Forward and backward of one problem through sla2_kernels.operator, with torch's memory."""

    def __init__(self, heads, n_q, n_k, d, dtype="bfloat16", precision="full"):
        from sla2_kernels.operator import Problem
        from sla2_kernels.specs import architecture_of

        torch.manual_seed(0)
        self.dtype = getattr(torch, dtype)
        self.arch = architecture_of(*torch.cuda.get_device_capability())
        self.tensors = [torch.randn(1, heads, n, d, device="cuda").to(self.dtype) for n in (n_q, n_k, n_k, n_q)]
        self.problem = Problem(batch=1, heads=heads, n_q=n_q, n_k=n_k, head_dim=d, dtype=dtype, precision=precision)
        self.weight = torch.eye(d, device="cuda")[None].contiguous()
        self.alpha = torch.full((1, heads, 1), 0.8, device="cuda")

    def run(self):
        """(O, L, dQ, dK, dV) and the map's indices, on the current stream."""
        from sla2_kernels.launch import Pointer
        from sla2_kernels.operator import Alpha, Device, forward, prologue, route
        from sla2_kernels.operator_backward import backward

        def pointer(tensor):
            return Pointer(tensor.data_ptr(), tensor)

        def allocate(shape, dtype):
            return pointer(torch.empty(shape, dtype=getattr(torch, dtype), device="cuda"))

        device = Device(allocate=allocate, arch=self.arch, stream=torch.cuda.current_stream().cuda_stream)
        q, k, v, grad = (pointer(x) for x in self.tensors)
        weight, alpha = pointer(self.weight), Alpha.of(pointer(self.alpha), tuple(self.alpha.shape))
        made = prologue(device, self.problem, q, k, v, pool=True)
        block_map, _ = route(device, self.problem, made.pooled_q, made.pooled_k, weight, weight, 1, 0.4)
        saved = forward(device, self.problem, q, k, v, block_map, alpha, made=made, save=True)
        found = backward(device, self.problem, saved, grad)
        tensors = [x.owner for x in (saved.out, saved.lse, found.d_q, found.d_k, found.d_v)]
        return tensors, block_map.indices.owner


def same(first, second):
    return all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in zip(first, second)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference_in_fp64(shape):
    from sla2_core import BlockMap
    from sla2_core.reference import sla2_reference

    operator = Operator(*shape)
    heads, n_q, n_k, _ = shape
    (out, *grads), indices = operator.run()
    grads = grads[1:]
    mask = torch.zeros(1, heads, -(-n_q // 128), -(-n_k // 64), dtype=torch.bool, device="cuda")
    mask.scatter_(-1, indices.long(), True)
    blocks = BlockMap.from_mask(mask.cpu(), block_q=128, block_k=64, n_q=n_q, n_k=n_k)

    def reference(dtype):
        q, k, v, grad = (x.cpu().to(dtype) for x in operator.tensors)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        result = sla2_reference(*leaves, blocks, operator.alpha.cpu().to(dtype))
        return [result, *torch.autograd.grad(result, leaves, grad)]

    exact, rounded = reference(torch.float64), reference(operator.dtype)
    for name, found, right, plain, slack in zip(("O", "dQ", "dK", "dV"), [out, *grads], exact, rounded, (2, 3, 3, 3)):
        error = (found.view(right.shape).cpu().double() - right).abs().max()
        allowed = slack * (plain.double() - right).abs().max() + 1e-5
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


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
