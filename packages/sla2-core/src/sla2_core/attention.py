"""SLA2Attention and SLAAttention: modules that hold the parameters and map q, k, v to the attention
output.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sla2_core.attend import Parts, attend, full_attention
from sla2_core.backends import Backend, backend_for
from sla2_core.block_map import BlockMap, Geometry, Rows, num_blocks
from sla2_core.checks import (
    autocast_qkv,
    check_choice,
    check_kv_lengths,
    check_qkv,
    without_autocast,
)
from sla2_core.complement import Complement
from sla2_core.config import SLA2Config
from sla2_core.mixing import Mixing
from sla2_core.options import Options
from sla2_core.order import Grid, Order
from sla2_core.order.base import with_text
from sla2_core.registry import COMPLEMENTS, MIXINGS, ORDERS, ROUTERS, Heads, Member
from sla2_core.routing import Router, route
from sla2_core.variants import sla

LAYOUTS = ("bhnd", "bnhd")


@dataclass(frozen=True)
class AttentionInfo:
    """What a call did.

    Attributes:
        block_map: of the routed queries.
        alpha: (B|1, H|1, T_m|1) in [0, 1], without a gradient; None for a mixing without one.
        sparsity: share of the map's block pairs that are not attended exactly, in [0, 1].
    """

    block_map: BlockMap
    alpha: Tensor | None
    sparsity: float


class Result(NamedTuple):
    """What SLA2Attention.attend returns: the output (B, H, N, d) in q's dtype, the block map of the
    routed queries, and alpha (B|1, H|1, T_m|1), None for a mixing without one.
    """

    out: Tensor
    block_map: BlockMap
    alpha: Tensor | None


class SLA2Attention(nn.Module):
    """Sparse-linear attention as a module: SLA2 (arXiv 2602.12675), or the variant that the
    configuration names.

    Its members are `router`, `complement` and `mixing`; their parameters (`router.weight_q`,
    `mixing.logit`, ...) are made here and stay in fp32 under `.to(bfloat16)`. Code that calls
    torch's scaled_dot_product_attention can call sdpa.ScaledDotProductSLA2 instead.

    Args:
        config: fixes the layer. Anything else raises TypeError.

    Attributes:
        config: may be replaced by one that leaves the parameters and their meaning as they are.
        order, router, complement, mixing: the members that the configuration names.
        recorder: if set, called as recorder(q, k, v, text_tokens, lengths) with (B, H, N, d)
            tensors at each call, which then computes full attention.
    """

    router: Router
    complement: Complement
    mixing: Mixing
    options: Options

    def __init__(self, config: SLA2Config):
        if not isinstance(config, SLA2Config):
            raise TypeError(
                f"config: expected an SLA2Config, got {type(config).__name__}; a variant is made"
                " from one, as training_free(SLA2Config(...))"
            )
        super().__init__()
        self._config = config
        self.order: Order = ORDERS.make(config)
        self.router = ROUTERS.make(config)
        self.complement = COMPLEMENTS.make(config)
        self.mixing = MIXINGS.make(config)
        self.options = Options.of(config)
        self.recorder: Callable[..., None] | None = None

    @property
    def config(self) -> SLA2Config:
        """The configuration in force. Setting one that changes the shape or the meaning of a
        parameter raises ValueError, which names the field.
        """
        return self._config

    @config.setter
    def config(self, new: SLA2Config) -> None:
        old, given = self._config.to_dict(), new.to_dict()
        changes = {name: value for name, value in given.items() if value != old[name]}
        if "options" in changes:
            known = self._config.options
            changes["options"] = {k: v for k, v in new.options.items() if v != known.get(k)}
        self._config = self._config.changed(**changes)
        self.options = Options.of(self._config)
        self.order.configure(self._config)
        for member in self.members().values():
            member.configure(self._config)

    def members(self) -> dict[str, Member]:
        """The members with parameters by attribute name: router, complement, mixing."""
        return {"router": self.router, "complement": self.complement, "mixing": self.mixing}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by group ("router", "alpha", "proj", ...), as the members name them."""
        found: dict[str, list[nn.Parameter]] = {}
        for member in self.members().values():
            if own := list(member.parameters()):
                found.setdefault(member.group, []).extend(own)
        return found

    def reset_parameters(self) -> None:
        """Put the initial values back, for instance after `to_empty`."""
        for member in self.members().values():
            member.reset_parameters()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layout: str = "bhnd",
        kv_lengths: Tensor | Sequence[int] | None = None,
        text_tokens: int = 0,
        grid: Grid | None = None,
        return_info: bool = False,
    ) -> Any:
        """Attention output in q's layout and dtype (autocast's under autocast); with `return_info`
        a tuple of it and an AttentionInfo.

        Args:
            q: (B, H, N_q, d), or (B, N_q, H, d) with layout="bnhd", in float64, float32, bfloat16
                or float16. k, v: the same with N_k. Under autocast they are taken in its dtype, as
                by scaled_dot_product_attention.
            kv_lengths: None, or one integer in [1, N_k] per batch item, with text in
                [N_k - text_tokens, N_k]. On a GPU the values are not read and not checked.
            text_tokens: so many tokens at the end are text, of queries and of keys: their keys are
                always selected, their queries see every key.
            grid: (frames, height, width) of the other tokens, which then come in raster order and
                are put into the configured one for this call. None: they come in the order in which
                they are to be cut into blocks, as from a model that orders them once for all its
                layers.

        Raises:
            TypeError, ValueError: an argument of another shape, dtype or device than the
                configuration's or q's. RuntimeError: the configured backend is missing here.
        """
        check_choice("layout", layout, LAYOUTS)
        if layout == "bnhd":
            # check_qkv names what is no tensor
            shapes = [tuple(x.shape) for x in (q, k, v) if isinstance(x, Tensor)]
            if any(len(shape) != 4 for shape in shapes):
                raise ValueError(
                    f"q, k, v: expected 4 dimensions (B, N, H, d), got shapes {shapes}"
                )
            q, k, v = (x.transpose(1, 2) if isinstance(x, Tensor) else x for x in (q, k, v))
        q, k, v = autocast_qkv(q, k, v)
        check_qkv(q, k, v)
        self._check_sizes(q, k, layout, text_tokens, grid)
        lengths = check_kv_lengths(kv_lengths, q, k, text_tokens)
        (q, k, v), restore = self.in_order((q, k, v), text_tokens, grid, lengths)
        if self.recorder is not None:
            self.recorder(q, k, v, text_tokens, lengths)
            out = full_attention(q, k, v, lengths)
        else:
            out, block_map, alpha = self.attend(q, k, v, lengths=lengths, text_tokens=text_tokens)
        out = restore(out)
        out = out.transpose(1, 2) if layout == "bnhd" else out
        if not return_info:
            return out
        if self.recorder is not None:
            raise ValueError("return_info: expected False while Q, K, V are captured")
        alpha = None if alpha is None else alpha.detach()
        return out, AttentionInfo(block_map, alpha, block_map.sparsity)

    def _check_sizes(
        self, q: Tensor, k: Tensor, layout: str, text_tokens: int, grid: Grid | None
    ) -> None:
        config, (n_q, n_k) = self._config, (q.shape[2], k.shape[2])
        for name, index, expected in (
            ("num_heads", 1, config.num_heads),
            ("head_dim", 3, config.head_dim),
        ):
            if q.shape[index] != expected:
                raise ValueError(
                    f"q: expected {name}={expected} as in the configuration, got {q.shape[index]}"
                )
        if n_q == config.num_heads and layout == "bhnd" and n_q > 1:
            _warn_layout(n_q)
        whole = isinstance(text_tokens, int) and not isinstance(text_tokens, bool)
        if not whole or not 0 <= text_tokens < min(n_q, n_k):
            raise ValueError(
                f"text_tokens: expected an integer in [0, {min(n_q, n_k)}), got {text_tokens!r}"
            )
        three = isinstance(grid, tuple | list) and len(grid) == 3
        if grid is not None and not (three and math.prod(grid) == n_q - text_tokens):
            tokens = f"{n_q - text_tokens} tokens"
            raise ValueError(f"grid: expected (frames, height, width) of {tokens}, got {grid!r}")

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        lengths: Tensor | None = None,
        text_tokens: int = 0,
        heads: Heads = None,
    ) -> Result:
        """forward() without checks, for model integrations.

        Args:
            q: (B, H, N_q, d). k, v: (B, H, N_k, d). Tokens stand in the token order, text last.
            lengths: int64 (B,), valid keys, or None.
            text_tokens: so many tokens at the end are text.
            heads: which of the module's heads these are, as under Ulysses; None means all.
        """
        q, k, v = autocast_qkv(q, k, v)
        backend = backend_for(q, self.options, self._config.backend)
        n_routed = q.shape[2] - text_tokens
        routed = q[:, :, :n_routed]
        if not backend.any_layout:  # pooling and attention would both copy
            routed, k, v = (x.contiguous() for x in (routed, k, v))
        with without_autocast(q):
            call = (routed, k, v, lengths, text_tokens, backend, heads)
            found = self._in_one_go(*call)
            if found is None:
                found = self._in_steps(*call)
            if not text_tokens:
                return found
            text = full_attention(q[:, :, n_routed:], k, v, lengths)
            return found._replace(out=torch.cat([found.out, text], dim=2))

    def _in_one_go(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        text_tokens: int,
        backend: Backend,
        heads: Heads,
    ) -> Result | None:
        """attend() of the routed queries by Backend.routed, where no gradient is wanted and the
        members are those that it knows; None elsewhere.
        """
        router, complement, mixing, options = (
            self.router,
            self.complement,
            self.mixing,
            self.options,
        )
        kernel = None if complement.everywhere else complement.kernel
        fused = kernel is not None and kernel == mixing.kernel
        if not (fused and router.projects and router.by_row and backend.fuses(options)):
            return None
        rule = mixing.rule(heads)
        if mixing.joins and (bias := complement.fused(None, q, heads)) is not None:
            rule = bias.flatten(), None
        leaves = (q, k, v, *router.parameters(), *complement.parameters(), *mixing.parameters())
        if rule is None or (torch.is_grad_enabled() and any(x.requires_grad for x in leaves)):
            return None
        geometry = Geometry(options.block_q, options.block_k, q.shape[2], k.shape[2])
        routable = num_blocks(k.shape[2], options.block_k)
        if text_tokens:  # a key block with any text is always selected
            routable = (k.shape[2] - text_tokens) // options.block_k
        found = backend.routed(
            q,
            k,
            v,
            lengths,
            router.weights(heads),
            rule,
            self._config.topk,
            routable,
            options,
        )
        if found is None:
            return None
        out, indices, counts, alpha = found
        block_map = BlockMap._trusted(Rows(indices, counts), **geometry._asdict())
        return Result(out, block_map, None if mixing.joins else alpha)

    def _in_steps(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        text_tokens: int,
        backend: Backend,
        heads: Heads,
    ) -> Result:
        """attend() of the routed queries by route(), the mixing's alpha and attend.attend."""
        options, mixing = self.options, self.mixing
        # A hard block map has no gradient; only an alpha that reads the scores gives them one.
        with torch.set_grad_enabled(torch.is_grad_enabled() and mixing.reads_map):
            scores, block_map = route(
                self.router,
                q,
                k,
                self._config.topk,
                options=options,
                backend=backend,
                lengths=lengths,
                text_tokens=text_tokens,
                heads=heads,
            )
        mask = block_map.mask() if mixing.reads_map else None
        alpha = mixing.alpha(scores, mask, heads=heads)
        out = attend(
            q,
            k,
            v,
            block_map,
            alpha,
            Parts(self.complement, mixing),
            heads=heads,
            lengths=lengths,
            options=options,
            backend=backend,
        )
        return Result(out, block_map, alpha)

    def in_order(
        self,
        tensors: tuple[Tensor, Tensor, Tensor],
        text_tokens: int,
        grid: Grid | None,
        lengths: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Callable[[Tensor], Tensor]]:
        """Q, K, V (B, H, N, d) in the token order, and what puts an output back into the raster
        order. Text keeps its place at the end. Without a grid they stay as they are.

        Raises ValueError, for an order that is not the raster's on a grid, for other keys than the
        queries' tokens, and for lengths that would cut tokens of the grid.
        """
        q, k, _ = tensors
        if grid is None or self.order.identity:
            return tensors, lambda out: out
        name = f"token_order={self.order.name!r}"
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"k: expected q's {q.shape[2]} tokens for {name}, got {k.shape[2]}")
        if lengths is not None and not text_tokens:
            raise ValueError(f"kv_lengths: expected None for {name}, got lengths without text")
        order = self.order.places(grid, q.device)
        if order is None:
            return tensors, lambda out: out
        places = with_text(order, q.shape[2], text_tokens)
        q, k, v = (x.index_select(2, places) for x in tensors)
        return (q, k, v), lambda out: out.index_select(2, torch.argsort(places))

    def extra_repr(self) -> str:
        """What print() shows beside the members: k%, block sizes and the members' names."""
        c = self._config
        return (
            f"topk={c.topk}, blocks={c.block_q}x{c.block_k}, router={c.router},"
            f" complement={c.complement}, alpha={c.alpha}, precision={c.precision}"
        )


class SLAAttention(SLA2Attention):
    """SLA as published (arXiv 2509.24006), the baseline: heuristic router, O = O_s + proj(O_l over
    all blocks).

    Args:
        config: any SLA2Config; the variant `sla` of it is taken.
    """

    def __init__(self, config: SLA2Config):
        super().__init__(sla(config))


def build_attention(config: SLA2Config) -> SLA2Attention:
    """The attention module of a configuration, whichever variant it is."""
    return SLA2Attention(config)


@functools.cache
def _warn_once(heads: int) -> None:
    warnings.warn(
        f"q: {heads} tokens and {heads} heads: its layout cannot be told from its shape and is"
        ' taken as (B, H, N, d); give layout="bnhd" for (B, N, H, d)',
        RuntimeWarning,
        stacklevel=5,
    )


def _warn_layout(heads: int) -> None:
    if not torch.compiler.is_compiling():
        _warn_once(heads)
