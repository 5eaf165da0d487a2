"""Views of a router and a mixing ratio that hold some of the heads: for sampled heads and for heads
spread over ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn


def for_heads(module: nn.Module, heads: Sequence[int] | slice) -> nn.Module:
    """A Router or Mixing that acts on `heads` only; gradients reach the parameters of `module`.

    Parameters whose first dimension is 1 are shared by the heads and stay whole.
    """
    view = copy.copy(module)
    view.__dict__["_parameters"], view.__dict__["_buffers"] = {}, {}
    for name, value in [
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ]:
        view.__dict__[name] = value if value.shape[0] == 1 else value[heads]
    return view
