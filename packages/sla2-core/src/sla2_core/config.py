"""SLA2Config: one frozen dataclass that fixes an attention layer.

It names one member of each axis (see registry.py). Named variants are functions that change a base:
variants.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sla2_core.registry import AXES, BACKENDS, COMPLEMENTS, FORMATS, MIXINGS, ORDERS, Described

QAT_BACKWARDS = ("paper", "matched")
CHANGEABLE = ("topk", "tau", "precision", "qat_backward", "backend")
# What a finished stage 1 does not depend on. A field that is forgotten here costs a training; one
# too many would reuse a wrong one.
NOT_STAGE1 = ("topk", "precision", "qat_backward", "backend")
# Fields that fix parameters or their meaning, whichever members are chosen.
_BOUND = (
    *("head_dim", "num_heads", "block_q", "block_k", "smooth_k"),
    *("token_order", "router", "complement", "alpha"),
)


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
        token_order: the order in which the tokens of a grid are cut into blocks: "tiles" (its
            option `tile` is (frames, height, width) in tokens), "raster", or another of order/.
            apply_sla2 puts a model's tokens in it; a module that is called by hand takes tokens as
            they come unless it is given their grid.
        router: "learned" (W_q, W_k start as the identity), "heuristic" (nothing learned),
            "topk_topp" (also top-p), "global_threshold" (over all query blocks of a head), or
            another of routing/.
        per_head_router: one W_q, W_k per head instead of one per layer.
        complement: what the blocks that are not selected give: "linear" (linear attention over
            them), "pooled" (one key a block, their mean, in the softmax of the selected),
            "projected" (SLA's linear attention over all blocks with a learned projection), "coarse"
            (VSA's attention between block means), "none", or another of complement/.
        alpha: how both branches become one output: "mass" (alpha follows the share of the softmax
            mass that is routed), "position" (of the query block; the paper's is a case of it, see
            variants.paper_alpha), "joint" (one softmax over both), "one" (the sparse branch alone),
            "sum" (SLA's O_s + O_l), or another of mixing/. "auto" takes the one that the complement
            names, and the field then holds its name.
        alpha_knots: knots of "position" over the relative position of the query block; 1 is one
            value per head.
        alpha_per_head: False makes the heads of "position" share their knots (the paper's form with
            knots = T_m).
        alpha_init: initial value of "position", in (0, 1).
        tau: temperature of SoftTop-k (Eq. 17).
        smooth_k: subtract the mean over tokens from K first (Alg. 2).
        precision: number format of the sparse branch's forward, a member of formats/.
        qat_backward: "paper" (16-bit from the original Q, K, V) or "matched" (straight-through of
            the low-bit forward).
        backend: where it is computed: "auto", or a registered backend, see
            functional.block_sparse_attention.
        options: {name: value} of settings that the chosen members have of their own.
    """

    head_dim: int
    num_heads: int
    topk: float
    block_q: int = 128
    block_k: int = 64
    token_order: str = "tiles"
    router: str = "learned"
    per_head_router: bool = False
    complement: str = "linear"
    alpha: str = "auto"
    alpha_knots: int = 16
    alpha_per_head: bool = True
    alpha_init: float = 0.8
    tau: float = 0.1
    smooth_k: bool = True
    precision: str = "full"
    qat_backward: str = "paper"
    backend: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("head_dim", "num_heads", "block_q", "block_k", "alpha_knots"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
        if self.alpha == "auto":
            object.__setattr__(self, "alpha", COMPLEMENTS.get(self.complement).mixing)
        for axis in AXES:
            axis.get(getattr(self, axis.field))
        self._check_company()
        for name, allowed in (
            ("qat_backward", QAT_BACKWARDS),
            ("backend", ("auto", *BACKENDS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("per_head_router", "alpha_per_head", "smooth_k"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        _check_number("topk", self.topk, 1.0, closed=True)
        _check_number("alpha_init", self.alpha_init, 1.0)
        _check_number("tau", self.tau, float("inf"))
        object.__setattr__(self, "options", _Options(self._checked_options()))

    def _check_company(self) -> None:
        """A mixing that joins the softmax needs a complement that does, and the other way round."""
        complement, mixing = COMPLEMENTS.get(self.complement), MIXINGS.get(self.alpha)
        if complement.absent or complement.joins == mixing.joins:
            return
        what = f"{complement.mixing!r}" if complement.joins else "a mixing of separate branches"
        raise ValueError(
            f"alpha: expected {what} for complement={self.complement!r}, got {self.alpha!r}"
        )

    def _checked_options(self) -> dict[str, Any]:
        """`options` beside the defaults of the chosen members. Those of other members may be there
        with their defaults, as when one member of a configuration is replaced, and are left out.
        """
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options: expected names and values, got {self.options!r}")
        known = {name: value for m in self.members().values() for name, value in m.options.items()}
        given = {n: tuple(v) if isinstance(v, list) else v for n, v in self.options.items()}
        others = [(n, v) for axis in AXES for m in axis.all() for n, v in m.options.items()]
        given = {n: v for n, v in given.items() if n in known or (n, v) not in others}
        for name, value in given.items():
            if name not in known:
                chosen = ", ".join(sorted(known)) or "none, for these members have no options"
                raise ValueError(f"options: expected one of {chosen}, got {name!r}")
            default = known[name]
            right = isinstance(value, type(default))
            right = right or (isinstance(default, float) and isinstance(value, int))
            right = right and isinstance(value, bool) == isinstance(default, bool)
            if default is not None and not right:
                raise ValueError(
                    f"options.{name}: expected a {type(default).__name__}, got {value!r}"
                )
        whole = known | given
        for member in self.members().values():
            member.check_options(whole)
        return whole

    def members(self) -> dict[str, type[Described]]:
        """The class of the chosen member of each axis, by the field that names it."""
        return {axis.field: axis.get(getattr(self, axis.field)) for axis in AXES}

    @property
    def low_bit(self) -> bool:
        """Whether the sparse branch's forward is rounded to a low-bit format."""
        return FORMATS.get(self.precision).low

    def geometry(self) -> dict[str, Any]:
        """What fixes the parameters and their meaning: an adapter is bound to these values."""
        found = {name: getattr(self, name) for name in _BOUND}
        for member in self.members().values():
            found |= self._bound_by(member)
        return found

    def order_geometry(self) -> dict[str, Any]:
        """What fixes the order of tokens: captured tokens are bound to these values."""
        order = ORDERS.get(self.token_order)
        return {"token_order": self.token_order, **self._bound_by(order)}

    def _bound_by(self, member: type[Described]) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in member.settings}
        bound = [name for name in member.options if name not in member.adjustable]
        return found | {f"options.{name}": self.options[name] for name in bound}

    def changed(self, **changes: Any) -> SLA2Config:
        """This configuration with changes that leave the parameters and their meaning as they are.

        Raises ValueError naming the field for another one (those of CHANGEABLE may change, and
        `options` that a member calls adjustable), or for a bad value.
        """
        adjustable = {name for member in self.members().values() for name in member.adjustable}
        for name, value in changes.items():
            if name == "options":
                if not isinstance(value, Mapping):
                    raise ValueError(f"options: expected names and values, got {value!r}")
                for option in value:
                    if option not in adjustable:
                        allowed = ", ".join(sorted(adjustable)) or "none"
                        raise ValueError(
                            f"options.{option}: expected an option that may change ({allowed})"
                        )
            elif name not in CHANGEABLE:
                raise ValueError(
                    f"{name}: expected a field that may change, one of {', '.join(CHANGEABLE)}"
                )
        options = {**self.options, **changes.pop("options", {})}
        return self.replaced(**changes, options=options)

    def replaced(self, **changes: Any) -> SLA2Config:
        """dataclasses.replace without the options that no member of the new configuration has.

        Raises ValueError naming the field for a bad value.
        """
        options = changes.pop("options", self.options)
        bare = dataclasses.replace(self, **changes, options={})
        kept = {name: value for name, value in options.items() if name in bare.options}
        return dataclasses.replace(bare, options=kept)

    def stage1_settings(self) -> dict[str, Any]:
        """What a finished stage 1 depends on: all but k%, the number format and the backend."""
        found = {name: value for name, value in self.to_dict().items() if name not in NOT_STAGE1}
        formats = FORMATS.get(self.precision).options
        found["options"] = {n: v for n, v in found["options"].items() if n not in formats}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Fields and values that JSON can hold; from_dict reads them."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found["options"] = {
            name: list(v) if isinstance(v, tuple) else v for name, v in self.options.items()
        }
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SLA2Config:
        """Inverse of to_dict; also reads what was written before the axes had their names.

        Raises ValueError for an unknown or a missing field, naming it.
        """
        values = _upgraded(values)
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"{unknown[0]}: expected a field among {', '.join(known)}, got an unknown one"
            )
        missing = [
            n
            for n, f in known.items()
            if f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
            and n not in values
        ]
        if missing:
            raise ValueError(f"{missing[0]}: expected a value, got none")
        return cls(**values)


class _Options(dict):
    """Options of the members: a dictionary that can be hashed, as the frozen configuration is."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))

    def __reduce__(self) -> tuple[Any, ...]:  # for pickle and deepcopy
        return _Options, (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("options: expected no change; use SLA2Config.changed on the configuration")

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse


def _check_number(name: str, value: Any, high: float, closed: bool = False) -> None:
    """A number in (0, high), or (0, high] where `closed`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (0 < value and (value < high or (closed and value == high))):
        end = "]" if closed else ")"
        raise ValueError(f"{name}: expected a number in (0, {high:g}{end}, got {value!r}")


def _upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of version 0.1, where `method` chose between SLA2 and SLA, and what was not named had
    its defaults.
    """
    if "method" not in values:
        return dict(values)
    values = {"token_order": "raster", "alpha": "position", **values}
    method = values.pop("method")
    if method not in ("sla2", "sla"):
        raise ValueError(f"method: expected 'sla2' or 'sla', got {method!r}")
    if method == "sla":
        # SLA's operator did not smooth K, whatever the configuration said.
        values |= {"router": "heuristic", "complement": "projected", "alpha": "sum"}
        values["smooth_k"] = False
    return values
