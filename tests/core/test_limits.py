"""What a forward and backward may not do: hold an N x N matrix, or read a device's values."""

import dataclasses

import pytest
import torch
from sla2_core import SLA2Attention, SLA2Config
from sla2_core.backends.blocked import BlockedBackend
from sla2_core.registry import COMPLEMENTS, FORMATS, MIXINGS, ROUTERS
from torch.utils._python_dispatch import TorchDispatchMode

BASE = SLA2Config(head_dim=16, num_heads=1, topk=0.03, block_q=64, block_k=32)
HOST_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
}


def every_member():
    """Configurations in which each member of each axis is used once."""
    yield "base", BASE
    for axis in (ROUTERS, COMPLEMENTS, MIXINGS, FORMATS):
        for name in (n for n in axis.names() if not n.startswith("toy-")):
            changes = {axis.field: name}
            company = {"sum": ("complement", "projected"), "joint": ("complement", "pooled")}
            company |= {"pooled": ("alpha", "joint")}  # what goes with one another
            changes |= dict([company[name]] if name in company else [])
            yield f"{axis.field}-{name}", dataclasses.replace(BASE, **changes)
    matched = dataclasses.replace(BASE, precision="int8", qat_backward="matched")
    yield "matched", matched


CASES = dict(every_member())


class Largest(TorchDispatchMode):
    """Notes the largest number of elements that an operator's result has."""

    elements, name = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.numel() > self.elements:
                self.elements, self.name = x.numel(), str(func)
        return out


def watch_inside(monkeypatch, mode):
    """Let `mode` see what the plain torch of a backend does inside its custom operator."""
    for name in ("forward", "backward"):
        real = getattr(BlockedBackend, name)

        def watched(self, *args, real=real, **kwargs):
            with mode:
                return real(self, *args, **kwargs)

        monkeypatch.setattr(BlockedBackend, name, watched)


@pytest.mark.parametrize("backend", ["auto", "blocked"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_of_n_x_n_is_held(name, backend, monkeypatch):
    n = 4096
    attn = SLA2Attention(dataclasses.replace(CASES[name], backend=backend))
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
    watch_inside(monkeypatch, largest := Largest())
    with largest:
        out = attn(q, k, v)
        out.sum().backward()
    assert 0 < largest.elements <= n * n / 4, largest.name


def test_the_reference_holds_it_and_the_watch_sees_it():
    attn = SLA2Attention(dataclasses.replace(BASE, backend="reference"))
    q, k, v = (torch.randn(1, 1, 1024, 16) for _ in range(3))
    with Largest() as largest:
        attn(q, k, v)
    assert largest.elements >= 1024**2


class NoHostReads(TorchDispatchMode):
    """Fails where an operator would wait for a device, as reading a CUDA tensor's number does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in HOST_READS, f"{func} reads a value"
        return func(*args, **(kwargs or {}))


class Distant(torch.Tensor):
    """Lengths that say they are on a GPU."""

    @property
    def device(self):
        return torch.device("cuda")

    def to(self, *args, **kwargs):
        return self.as_subclass(torch.Tensor).to(torch.int64)


def distant(lengths):
    return torch.tensor(lengths).as_subclass(Distant)


@pytest.mark.parametrize("backend", ["cpu", "blocked", "emulator"])
@pytest.mark.parametrize(
    "name",
    [
        *("base", "router-heuristic", "router-topk_topp", "router-global_threshold"),
        *("complement-projected", "complement-coarse", "complement-pooled", "alpha-mass"),
    ],
)
@pytest.mark.parametrize("text", [0, 20])
def test_a_forward_and_backward_read_nothing_back(name, backend, text, monkeypatch):
    config = dataclasses.replace(CASES[name], topk=0.3, num_heads=2, head_dim=64, backend=backend)
    attn = SLA2Attention(config)
    dtype = torch.bfloat16 if backend == "emulator" else torch.float32
    q, k, v = (torch.randn(2, 2, 150, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    expected = attn(q, k, v, kv_lengths=[150, 141], text_tokens=text)
    watch_inside(monkeypatch, mode := NoHostReads())
    with mode:
        out = attn(q, k, v, kv_lengths=distant([150, 141]), text_tokens=text)
        out.float().sum().backward()
    assert torch.equal(out, expected)


def test_a_token_order_is_computed_where_the_tokens_are():
    attn = SLA2Attention(dataclasses.replace(BASE, head_dim=8))
    q, k, v = (torch.randn(1, 1, 105, 8, requires_grad=True) for _ in range(3))
    with NoHostReads():
        attn(q, k, v, grid=(5, 3, 7)).sum().backward()
    places = attn.order.places((5, 3, 7), torch.device("meta"))
    assert (places.device.type, tuple(places.shape)) == ("meta", (105,))


def test_the_watch_sees_a_host_read():
    with NoHostReads(), pytest.raises(AssertionError, match=r"_local_scalar_dense.* reads a value"):
        int(torch.tensor(3))
