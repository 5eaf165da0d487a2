"""Configuration of the operator and its modules: one frozen dataclass; variants are functions that
change a base.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

METHODS = ("sla2", "sla")
ROUTERS = ("learned", "heuristic")
ALPHAS = ("position", "mass", "one")
PRECISIONS = ("full", "int8", "int8_int8", "fp8", "int4", "nvfp4")
QAT_BACKWARDS = ("paper", "matched")
BACKENDS = ("auto", "reference", "cpu", "cuda", "emulator")


@dataclass(frozen=True, kw_only=True)
class SLA2Config:
    """Everything that fixes an attention layer. Raises ValueError naming the field for a value
    outside its range.

    Args:
        head_dim: channels of a head, d.
        num_heads: heads of the layer, H.
        topk: k%, the fraction of key blocks each query block attends to exactly, in (0, 1];
            sparsity is 1 - topk.
        block_q, block_k: tokens in a query block and in a key block (paper: 128 and 64).
        method: "sla2", or "sla" for the published baseline (heuristic router, linear branch over
            all blocks, a zero-initialised projection instead of alpha).
        router: "learned" (W_q, W_k start as the identity) or "heuristic" (they stay the identity).
        per_head_router: one W_q, W_k per head instead of one per layer.
        alpha: "position", "mass", or "one" (the sparse branch alone).
        alpha_knots: knots of "position" over the relative position of the query block; 1 is one
            value per head.
        alpha_per_head: False makes the heads of "position" share their knots (the paper's form with
            knots = T_m).
        alpha_init: initial value of "position", in (0, 1).
        tau: temperature of SoftTop-k (Eq. 17).
        smooth_k: subtract the mean over tokens from K first (Alg. 2).
        precision: of the sparse branch's forward, see quantize.PRECISIONS.
        qat_backward: "paper" (16-bit from the original Q, K, V) or "matched" (straight-through of
            the low-bit forward).
        backend: see functional.sla2_attention.
    """

    head_dim: int
    num_heads: int
    topk: float
    block_q: int = 128
    block_k: int = 64
    method: str = "sla2"
    router: str = "learned"
    per_head_router: bool = False
    alpha: str = "position"
    alpha_knots: int = 16
    alpha_per_head: bool = True
    alpha_init: float = 0.8
    tau: float = 0.1
    smooth_k: bool = True
    precision: str = "full"
    qat_backward: str = "paper"
    backend: str = "auto"

    def __post_init__(self):
        for name in ("head_dim", "num_heads", "block_q", "block_k", "alpha_knots"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        for name, allowed in (
            ("method", METHODS),
            ("router", ROUTERS),
            ("alpha", ALPHAS),
            ("precision", PRECISIONS),
            ("qat_backward", QAT_BACKWARDS),
            ("backend", BACKENDS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("per_head_router", "alpha_per_head", "smooth_k"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name, low_open, high, high_open in (
            ("topk", 0.0, 1.0, False),
            ("alpha_init", 0.0, 1.0, True),
            ("tau", 0.0, float("inf"), True),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (
                low_open < value and (value < high or (not high_open and value == high))
            ):
                raise ValueError(
                    f"{name}: expected a number in ({low_open:g},"
                    f" {high:g}{')' if high_open else ']'}, got {value!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SLA2Config:
        """Inverse of to_dict. Raises ValueError for an unknown or a missing field, naming it."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"{unknown[0]}: expected a field among {', '.join(known)}, got an unknown one"
            )
        missing = [
            n for n, f in known.items() if f.default is dataclasses.MISSING and n not in values
        ]
        if missing:
            raise ValueError(f"{missing[0]}: expected a value, got none")
        return cls(**values)


def with_topk(base: SLA2Config, topk: float) -> SLA2Config:
    """The same layer at another k%."""
    return dataclasses.replace(base, topk=topk)


def heuristic_router(base: SLA2Config) -> SLA2Config:
    """The same layer with SLA's router: top-k of the pooled scores, nothing learned."""
    return dataclasses.replace(base, router="heuristic")


def sparse_branch_alone(base: SLA2Config) -> SLA2Config:
    """The same layer without the linear branch: alpha is 1."""
    return dataclasses.replace(base, alpha="one")


def paper_alpha(base: SLA2Config, num_query_blocks: int) -> SLA2Config:
    """alpha as in the paper: one value per query block, shared by the heads; ties the layer to one
    length.
    """
    return dataclasses.replace(
        base, alpha="position", alpha_knots=num_query_blocks, alpha_per_head=False
    )


def published_sla(base: SLA2Config) -> SLA2Config:
    """The SLA baseline (arXiv 2509.24006) at the same sparsity and geometry."""
    return dataclasses.replace(base, method="sla", router="heuristic", alpha="one", smooth_k=False)
