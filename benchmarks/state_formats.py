"""How much 8-bit formats of the linear branch's states cost: `python -m benchmarks.state_formats`.

Prints, as Markdown, the error of H (the mean of h_j = phi(K_j)^T V_j over the blocks that a row
does not select) and of O_l = phi(Q) H / (phi(Q) . Z), for inputs that are hard in different ways.
Errors are RMS, relative to each channel's own RMS, and averaged over channels. Everything but the
rounding of h_j is that of the kernels in bfloat16. Runs on the CPU in a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TOKENS, CHANNELS, BLOCK_Q, BLOCK_K, ROWS, SPARSITY = 32760, 128, 128, 64, 512, 0.97


def e4m3(x: Tensor) -> Tensor:
    """The nearest values of the format."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).double()


def int8(x: Tensor) -> Tensor:
    """The nearest integers of 8 bit."""
    return x.round().clamp(-127, 127)


def formats(h: Tensor, z: Tensor, top: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every format's name, and h (T_n, d, d) rounded to it.

    Args:
        z: the column sums of phi over each block, of which h is a mean too (T_n, d).
        top: the largest |V| of each channel (d,).
    """

    def scaled(to: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
        return to(h / scale) * scale

    weight = torch.exp2(z.amax(1).log2().ceil())[:, None, None]
    over = (h / top).abs()
    yield "bfloat16", h.bfloat16().double()
    yield "E4M3, V", scaled(e4m3, top / 448)
    yield "E4M3, V, 2^n", scaled(e4m3, top / 448 * weight)
    yield "int8, V, 2^n", scaled(int8, top / 127 * weight)
    yield "int8, largest of a channel", scaled(int8, top / 127 * over.amax((0, 1), keepdim=True))
    yield "int8, largest of a block", scaled(int8, top / 127 * over.amax((1, 2), keepdim=True))
    yield "int8, largest of a row", scaled(int8, top / 127 * over.amax(2, keepdim=True))


def inputs() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Names, Q, K and V."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    q, k, v = draw(ROWS, CHANNELS), draw(TOKENS, CHANNELS), draw(TOKENS, CHANNELS)
    yield "Gaussian", q, k, v
    yield "200 keys", q, k[:200], v[:200]
    yield "Q and K x 4", 4 * q, 4 * k, v
    spread = torch.ones(CHANNELS, dtype=torch.double)
    spread[::16] = 30
    yield "channels of V x 30", q, k, v * spread
    for factor in (30, 300):
        outlier = v.clone()
        outlier[1000] *= factor
        yield f"a token of V x {factor}", q, k, outlier
    alike = [
        draw(TOKENS // 64 + 1, CHANNELS).repeat_interleave(64, 0)[:TOKENS] + 0.3 * x for x in (k, v)
    ]
    yield "tokens of a block alike", q, *alike


def errors(q: Tensor, k: Tensor, v: Tensor) -> dict[str, tuple[float, float]]:
    """Of H and of O_l, by format."""
    q, k, v = (x.bfloat16().double() for x in (q, k, v))
    k = (k - k.mean(0)).bfloat16().double()

    def blocks(x: Tensor) -> Tensor:
        padding = -len(x) % BLOCK_K
        return torch.nn.functional.pad(x, (0, 0, 0, padding)).unflatten(0, (-1, BLOCK_K))

    def states(phi: Tensor) -> tuple[Tensor, Tensor]:
        phi = blocks(phi)
        return phi.transpose(1, 2) @ blocks(v) / BLOCK_K, phi.sum(1) / BLOCK_K

    def branch(h: Tensor, z: Tensor, phi: Tensor, rounded: bool) -> tuple[Tensor, Tensor]:
        means = torch.einsum("ij,jce->ice", weights, h)
        means = means.bfloat16().double() if rounded else means
        phi = phi.unflatten(0, (-1, BLOCK_Q))
        return means, (phi @ means) / (phi @ (weights @ z)[..., None])

    exact_h, exact_z = states(k.softmax(-1))
    h, z = states(k.softmax(-1).bfloat16().double())
    generator = torch.Generator().manual_seed(0)
    chosen = max(1, round((1 - SPARSITY) * len(h)))
    order = torch.rand(len(q) // BLOCK_Q, len(h), generator=generator).argsort(1)
    rest = (order >= chosen).double()
    weights = rest / rest.sum(1, keepdim=True)
    phi = q.softmax(-1)
    exact = branch(exact_h, exact_z, phi, rounded=False)

    def error(found: Tensor, right: Tensor) -> float:
        by_channel = [x.square().mean((0, 1)).sqrt() for x in (found - right, right)]
        return float((by_channel[0] / by_channel[1]).mean())

    result = {}
    for name, rounded in formats(h, z, v.abs().amax(0)):
        means, out = branch(rounded, z, phi.bfloat16().double(), rounded=True)
        result[name] = error(means, exact[0]), error(out.bfloat16().double(), exact[1])
    return result


def main() -> None:
    """Print the table, errors in percent."""
    rows = {name: errors(q, k, v) for name, q, k, v in inputs()}
    names = list(next(iter(rows.values())))
    print("| H, O_l, % |", " | ".join(names), "|")
    print("|---" * (len(names) + 1) + "|")
    for name, found in rows.items():
        cells = (f"{100 * h:.1f}, {100 * out:.1f}" for h, out in found.values())
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
