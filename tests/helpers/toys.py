"""Ideas from outside the packages: a toy member of each axis and a toy metric, in one file.

`imports: [helpers.toys]` in a grid's settings makes the members known, and
`--metrics helpers.toys:toy-brightness` the metric.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from sla2_core.complement import Branch, Complement
from sla2_core.formats import Scaled
from sla2_core.mixing import Mixing
from sla2_core.order import Order
from sla2_core.registry import COMPLEMENTS, FORMATS, MIXINGS, ORDERS, ROUTERS, of_heads
from sla2_core.routing import Router
from sla2_eval.scoring.metrics.base import MetricSpec


@ORDERS.register("toy-order")
class Backwards(Order):
    """The last token first."""

    def permutation(self, grid):
        return torch.arange(grid[0] * grid[1] * grid[2]).flip(0)


@ROUTERS.register("toy-router")
class Scaling(Router):
    """Channels of the pooled K weighed by a learned vector per head."""

    def __init__(self, config):
        super().__init__(config)
        self.make_parameters()

    def start(self):
        return {"gain": torch.ones(self.num_heads, 1, self.head_dim)}

    def scores(self, pooled_q, pooled_k, heads=None):
        return super().scores(pooled_q, pooled_k * of_heads(self.gain, heads))


@COMPLEMENTS.register("toy-means")
class Means(Complement):
    """Softmax over the unselected blocks' means of K and V; joins the softmax of the others."""

    stages = ("stage1", "stage2")
    mixing = "toy-joint"
    joins = True

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.make_parameters()

    def start(self):
        return {"bias": torch.zeros(self.num_heads)}

    def states(self, k, v, valid, options, heads=None):
        count = -(-k.shape[2] // options.block_k)
        tokens = valid.expand(k.shape[0], 1, 1, -1).transpose(-1, -2).to(k.dtype)

        def sums(x):
            lack = count * options.block_k - x.shape[2]
            padded = torch.nn.functional.pad(x, (0, 0, 0, lack))
            return padded.unflatten(2, (count, options.block_k)).sum(3)

        number = sums(tokens)
        means = (sums(x) / number.clamp_min(1) for x in (k, v))
        return *means, number.squeeze(-1), of_heads(self.bias, heads)

    def rows(self, q, states, weights, options):
        means_k, means_v, number, bias = states
        logits = q @ means_k.transpose(-1, -2) * q.shape[3] ** -0.5
        logits = logits + number.log()[:, :, None] + bias[:, None, None]
        shares = weights.log().repeat_interleave(options.block_q, 2)[:, :, : q.shape[2]]
        return joined(logits + shares, means_v)

    def dense(self, q, k, v, weights, options, heads=None):
        valid = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool)
        first = weights[:, :, :: options.block_q, :: options.block_k]
        return self.rows(q, self.states(k, v, valid, options, heads), first, options)

    @classmethod
    def flops(cls, *, n_q, n_k, t_n, head_dim):
        return 4.0 * n_q * t_n * head_dim


def joined(logits, values):
    lse = logits.logsumexp(-1)
    empty = (lse == -torch.inf)[..., None]
    share = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return Branch(share @ values, empty, lse)


@MIXINGS.register("toy-joint")
class Joint(Mixing):
    """One softmax over both branches."""

    kernel = None
    joins = True

    def combine(self, sparse, rest, alpha, block_q):
        share = torch.sigmoid(sparse.lse - rest.lse)[..., None]
        share = torch.where(rest.empty, 1.0, torch.where(sparse.empty, 0.0, share))
        return share * sparse.out + (1 - share) * rest.out


@MIXINGS.register("toy-constant")
class Constant(Mixing):
    """alpha is one learned number a head, which starts where an option says."""

    options: ClassVar = {"first": 0.5}

    def __init__(self, config):
        super().__init__(config)
        self.first = config.options["first"]
        self.make_parameters()

    def start(self):
        return {"value": torch.full((self.num_heads,), self.first)}

    def alpha(self, scores, mask, *, rows=None, num_rows=None, heads=None):
        return of_heads(self.value, heads)[None, :, None]


@FORMATS.register("toy-int4")
class Coarse(Scaled):
    """INT4 for both products."""

    qk, pv = "int4", "int8"


@ROUTERS.register("toy-cosine")
class Cosine(Router):
    """Scores by the angle between the means: a shift of K matters to it."""

    def scores(self, pooled_q, pooled_k, heads=None):
        unit = torch.nn.functional.normalize
        return unit(pooled_q, dim=-1) @ unit(pooled_k, dim=-1).transpose(-1, -2)


@ROUTERS.register("toy-limit")
class Limit(Router):
    """The heuristic router, with an option that may change and one that may not."""

    options: ClassVar = {"most": 1.0, "pair": (0, 0)}
    adjustable = ("most",)

    def configure(self, config):
        super().configure(config)
        self.most = config.options["most"]


SPECS = (
    MetricSpec(
        name="toy-brightness",
        kind="unpaired",
        title="Brightness",
        definition="the mean of all pixels, from 0 to 1",
        source="none",
        value_range=(0.0, 1.0),
        higher_is_better=True,
    ),
)


def load(name, settings, device):
    return lambda sample: float(sample.frames.mean()) / 255
