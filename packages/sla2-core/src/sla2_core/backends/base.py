"""What a backend is: the operator's heavy parts on tensors, without autograd and without checks.

The custom operators of ops.py give them gradients and shapes for torch.compile. A backend takes its
settings whole, as Options, and says in one line what it cannot do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sla2_core.block_map import Geometry
from sla2_core.options import Options


@dataclass(frozen=True)
class Problem:
    """What a backend is asked about before a call: q's dtype, device and head dimension, and the
    options.
    """

    dtype: torch.dtype
    device: torch.device
    head_dim: int
    options: Options

    @classmethod
    def of(cls, q: Tensor, options: Options) -> Problem:
        """Of a call with q (B, H, N, d)."""
        return cls(q.dtype, q.device, q.shape[3], options)


class Inputs(NamedTuple):
    """The tensors of a call of the operator.

    Attributes:
        q: (B, H, N_q, d). k, v: (B, H, N_k, d), of q's dtype.
        indices: int32 (B, H, T_m, K) and counts: int32 (B, H, T_m), the rows of a BlockMap.
        alpha: (B, H, T_m), fp32 or fp64, what the complement of the options reads for each query
            block: alpha of "linear", b of "pooled". None for the sparse branch alone.
        lengths: int64 (B,), valid keys of each item, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    counts: Tensor
    alpha: Tensor | None
    lengths: Tensor | None


class Grads(NamedTuple):
    """Gradients of a call.

    Attributes:
        q, k, v: in the shapes and dtypes of the inputs.
        alpha: (B, H, T_m) in alpha's dtype, None where there is no alpha.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor | None


class Backend(ABC):
    """One way to compute the operator.

    Attributes:
        name: as SLA2Config.backend and `sla2 doctor` name it.
        device: the type of the tensors it takes, None for any.
        smooths: whether it subtracts K's mean itself, where options.smooth_k says so.
        log_sum_exp_gradient: whether backward() takes the gradient of L.
        by_autograd: forward() is torch code whose gradients torch finds; backward() is not called.
        takes_wide: whether it takes fp32 and fp64 tensors, beside 16-bit ones.
        any_layout: whether it reads transposed (B, N, H, d) tensors without a copy.
    """

    name: ClassVar[str]
    device: ClassVar[str | None] = None
    smooths: ClassVar[bool] = False
    log_sum_exp_gradient: ClassVar[bool] = False
    by_autograd: ClassVar[bool] = False
    takes_wide: ClassVar[bool] = True
    any_layout: ClassVar[bool] = False

    def missing(self) -> str | None:
        """One line that says what this machine lacks for it, None if nothing."""
        return None

    def fuses(self, options: Options) -> bool:
        """Whether forward() takes an alpha with these options, and computes their complement in
        the same call: "linear", linear attention over the unselected blocks (phi = softmax) mixed
        in per query block, or "pooled", one key for each of them in the same softmax.
        """
        return False

    @abstractmethod
    def unfit(self, problem: Problem) -> str | None:
        """One line that says why it cannot take a call, None if it can."""

    @abstractmethod
    def pool(
        self, q: Tensor, k: Tensor, lengths: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor]:
        """Block means of q (B, H, T_m, d) and of the valid tokens of K (B, H, T_n, d), fp32 (fp64
        stays), with gradients.
        """

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
        """Scores and top-k of a router that projects, in one go; None where it has no kernel.

        Args:
            pooled_q, pooled_k: block means (B, H, T_m, d) and (B, H, T_n, d), fp32 (fp64 stays).
            weights: W_q and W_k, each fp32 (1|H, d, d), None for the identity.
            lengths: int64 (B,), valid keys, or None.
            geometry: sizes of the map. topk: k% in (0, 1].
            routable: the first so many key blocks are chosen from; the others are always selected
                where they hold a valid token.

        Returns:
            scores fp32 (B, H, T_m, T_n) with a gradient, -inf for blocks without a valid token;
            indices int32 (B, H, T_m, width), ascending, -1 past counts int32 (B, H, T_m).
        """
        return None

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
        """Routing, alpha and the operator in one go, without gradients, for a router that projects
        and a complement that the backend fuses; None where it has no kernels for that.

        Args:
            q, k, v, lengths: as of Inputs. weights, topk, routable: as of route().
            rule: Mixing.rule of the mixing; for the pooled complement b (1|H,) and None.

        Returns:
            O (B, H, N_q, d) in q's dtype; indices int32 (B, H, T_m, width) and counts int32
            (B, H, T_m) as of route(); alpha fp32 (B, H, T_m), empty for the pooled complement.
        """
        return None

    @abstractmethod
    def forward(self, call: Inputs, options: Options, save: bool) -> list[Tensor]:
        """O (B, H, N_q, d) in q's dtype; the natural log-sum-exp L (B, H, N_q) of the selected
        scores, and of the pooled keys' logits where those join, fp32 (fp64 for fp64 inputs); then
        what backward() wants, if `save`.
        """

    @abstractmethod
    def saved(self, call: Inputs, options: Options) -> list[Tensor]:
        """Empty tensors of the shapes and dtypes that forward() saves, for torch.compile."""

    def empty_out(self, q: Tensor) -> Tensor:
        """An empty O for q, laid out as forward() lays it out."""
        return q.new_empty(q.shape)

    @abstractmethod
    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        call: Inputs,
        results: list[Tensor],
        options: Options,
    ) -> Grads:
        """Gradients of a call.

        Args:
            grad_out: dO (B, H, N_q, d). grad_lse: dL (B, H, N_q), or None.
            call: the forward's. results: what forward() returned with `save`.
        """


def work_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, fp32 for the others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_work(x: Tensor) -> Tensor:
    """x in fp32, or as it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()
