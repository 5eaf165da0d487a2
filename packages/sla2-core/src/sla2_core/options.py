"""Options: the settings of the operator, as one object for all layers of the package, and as the
text that custom operators take.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sla2_core.config import SLA2Config
from sla2_core.formats import Format, format_of
from sla2_core.registry import COMPLEMENTS, FORMATS

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the operator computes on a block map. No signature grows when an axis gains a member.

    Args:
        block_q, block_k: tokens in a query block and in a key block.
        precision: number format of the sparse branch's forward, a member of formats/.
        qat_backward: "paper" or "matched", what the backward of a low-bit forward recomputes from.
        smooth_k: subtract the mean over tokens from K first.
        complement: what a call with an alpha computes beside the sparse branch, as
            Complement.kernel names it.
        more: the options of the members, see SLA2Config.options.

    Attributes:
        text: JSON that Options.read takes back. format: the number format.
        unsmoothed: the same options with smooth_k=False, for a K that is smoothed already.
        unrounded: those at full precision.
    """

    block_q: int
    block_k: int
    precision: str = "full"
    qat_backward: str = "paper"
    smooth_k: bool = True
    complement: str = "linear"
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    text: str = field(init=False, repr=False, compare=False)
    format: Format = field(init=False, repr=False, compare=False)
    unsmoothed: Options = field(init=False, repr=False, compare=False)
    unrounded: Options = field(init=False, repr=False, compare=False)

    @classmethod
    def of(cls, config: SLA2Config) -> Options:
        """The options of a configuration."""
        return cls(
            block_q=config.block_q,
            block_k=config.block_k,
            precision=config.precision,
            qat_backward=config.qat_backward,
            smooth_k=config.smooth_k,
            complement=COMPLEMENTS.get(config.complement).kernel or "linear",
            more=config.options,
        )

    def __post_init__(self) -> None:
        # Made here, outside of what torch.compile traces.
        plain = {name: getattr(self, name) for name in ("block_q", "block_k", "precision")}
        plain |= {n: getattr(self, n) for n in ("qat_backward", "smooth_k", "complement")}
        text = json.dumps({**plain, "more": dict(self.more)}, sort_keys=True)
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "format", format_of(self.precision, self.more))
        raw = dataclasses.replace(self, smooth_k=False) if self.smooth_k else self
        object.__setattr__(self, "unsmoothed", raw)
        whole = dataclasses.replace(raw, precision="full") if self.format.low else raw
        object.__setattr__(self, "unrounded", whole)

    @staticmethod
    def read(text: str) -> Options:
        """The options that `text` was made of."""
        return _read(text, FORMATS.version)


@functools.cache
def _read(text: str, version: int) -> Options:
    values = json.loads(text)
    more = {k: tuple(v) if isinstance(v, list) else v for k, v in values.pop("more").items()}
    return Options(**values, more=more)


def constant(function: F) -> F:
    """Mark a function whose result torch.compile may take as a constant.

    torch.compiler.assume_constant_result does the same, but imports torch._dynamo, which makes
    folders.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def make_options(
    block_q: int,
    block_k: int,
    precision: str,
    qat_backward: str,
    smooth_k: bool,
    complement: str = "linear",
) -> Options:
    """Options(...) that also works while torch.compile traces; arguments as of Options."""
    return Options(
        block_q=block_q,
        block_k=block_k,
        precision=precision,
        qat_backward=qat_backward,
        smooth_k=smooth_k,
        complement=complement,
    )
