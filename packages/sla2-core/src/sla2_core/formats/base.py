"""What a number format of the sparse branch is: the round trip of Q, K, V and P, plainly defined.

A format is a quantise-dequantise in floating point. That is its one definition: `blocked` computes
with it, the reference too, and kernels must match it.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import pad

from sla2_core.formats import elements
from sla2_core.registry import FORMATS, Described


class Format(Described, ABC):
    """A format of Q K^T and P V.

    Args:
        options: values of the format's own options, see Described.options.

    Attributes:
        low: whether anything is rounded at all.
        cpu: the elements of (Q K^T, P V) for the CPU kernels, None if they do not have it.
        cuda: its name for the CUDA kernels, None if they do not have it. On which architectures is
            for sla2_kernels to say.
    """

    low: ClassVar[bool] = True
    cpu: ClassVar[tuple[str, str] | None] = None
    cuda: ClassVar[str | None] = None

    def __init__(self, options: Mapping[str, Any] | None = None):
        self.chosen = {**self.options, **(options or {})}

    @abstractmethod
    def round_blocks(self, x: Tensor, block: int) -> Tensor:
        """x, Q or K (B, H, N, d), after the round trip, in its dtype; a block has `block`
        tokens.
        """

    @abstractmethod
    def round_values(self, v: Tensor, block_k: int) -> Tensor:
        """v (B, H, N_k, d) after the round trip, in its dtype."""

    @abstractmethod
    def round_probabilities(self, p: Tensor, block_k: int) -> Tensor:
        """p, P~ = exp(S - rowmax) in [0, 1], (..., keys), after the round trip, in its dtype; the
        keys are whole blocks of `block_k`, but for the last.
        """


class Scaled(Format):
    """One scale max|x| / limit per block of Q and K (per head), one per channel of V over the whole
    sequence, and the fixed scale 1 / limit for P~ (SageAttention2++, arXiv 2505.21136).

    Attributes:
        qk, pv: the elements of both products, "int8", "int4" (Q K^T alone) or "fp8".
    """

    qk: ClassVar[str]
    pv: ClassVar[str]

    def round_blocks(self, x: Tensor, block: int) -> Tensor:
        """With one scale for each block and head."""
        n = x.shape[2]
        blocks = pad(x, (0, 0, 0, -n % block)).unflatten(2, (-1, block))
        return elements.fake_quantize(blocks, self.qk, (3, 4)).flatten(2, 3)[:, :, :n]

    def round_values(self, v: Tensor, block_k: int) -> Tensor:
        """With one scale for each channel."""
        return elements.fake_quantize(v, self.pv, 2)

    def round_probabilities(self, p: Tensor, block_k: int) -> Tensor:
        """With the scale 1 / limit, which takes [0, 1] to the whole range."""
        if self.pv == "fp8":
            return elements.round_e4m3(p * elements.E4M3_MAX) / elements.E4M3_MAX
        return elements.round_integer(p * 127.0, 127) / 127.0


@functools.cache
def _made(member: Any, options: tuple[tuple[str, Any], ...]) -> Format:
    made: Format = member(dict(options))
    return made


def format_of(name: str, options: Mapping[str, Any] | None = None) -> Format:
    """The format of that name.

    Args:
        name: of a member of formats/. options: values of its options; others are left out.

    Raises:
        ValueError: an unknown name; the message names `precision` and the known ones.
    """
    member: Any = FORMATS.get(name)
    own = tuple((key, value) for key, value in (options or {}).items() if key in member.options)
    return _made(member, own)
