"""Models whose weights torchao or bitsandbytes holds in few bits: attention works on them as on any
other, but such weights are neither written to an adapter, nor overwritten by one, nor trained.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

LIBRARIES = ("torchao", "bitsandbytes")


def check_plain(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for a tensor of one of these libraries; the message begins with `what`."""
    for name, value in tensors.items():
        kind = type(value)
        if kind.__module__.partition(".")[0] in LIBRARIES:
            raise ValueError(
                f"{what}: expected a model whose weights are not quantised, got a {kind.__name__}"
                f" at {name.removeprefix('model.')}"
            )
