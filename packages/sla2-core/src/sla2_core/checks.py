"""The public boundary: each check raises one line that names the argument, what was expected and
what came.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from sla2_core.block_map import BlockMap
from sla2_core.registry import BACKENDS, FORMATS

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`; `name` is the argument's."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which operators on tensors like x keep their dtypes."""
    if x.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def autocast_qkv(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Under autocast q, k and v in its dtype, as scaled_dot_product_attention has it; float64
    stays. Without autocast they come back as they are, and so does what is no tensor.
    """
    if not isinstance(q, Tensor) or q.device.type == "meta":
        return q, k, v
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in FLOATS[1:] else x for x in (q, k, v)
    )
    return q, k, v


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that q is (B, H, N_q, d) and k and v are (B, H, N_k, d), of one floating dtype, on one
    device, with no empty dimension.

    Raises:
        TypeError: no tensor, or another dtype. ValueError: another shape or device.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions (B, H, N, d), got shape {tuple(x.shape)}"
            )
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{name}: expected float64, float32, bfloat16 or float16, got {x.dtype}"
            )
        if 0 in x.shape:
            raise ValueError(f"{name}: expected no empty dimension, got shape {tuple(x.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
    expected = (q.shape[0], q.shape[1], k.shape[2], q.shape[3])
    if tuple(k.shape) != expected:
        raise ValueError(
            f"k: expected shape {(*expected[:2], 'N_k', expected[3])} to fit q, got"
            f" {tuple(k.shape)}"
        )
    if tuple(v.shape) != expected:
        raise ValueError(f"v: expected shape {expected} to fit k, got {tuple(v.shape)}")


def check_block_map(block_map: Any, q: Tensor, k: Tensor) -> None:
    """Check that the map was made for the batch, heads, lengths and device of q (B, H, N_q, d) and
    k (B, H, N_k, d). Raises TypeError for no BlockMap, ValueError for another one.
    """
    if not isinstance(block_map, BlockMap):
        raise TypeError(f"block_map: expected a sla2_core.BlockMap, got {type(block_map).__name__}")
    found = tuple(block_map.shape[:2])
    if found != tuple(q.shape[:2]):
        raise ValueError(f"block_map: expected (B, H) = {tuple(q.shape[:2])}, got {found}")
    if (block_map.n_q, block_map.n_k) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"block_map: expected a map for N_q={q.shape[2]}, N_k={k.shape[2]}, "
            f"got one for N_q={block_map.n_q}, N_k={block_map.n_k}"
        )
    if block_map.indices.device != q.device:
        raise ValueError(
            f"block_map: expected q's device {q.device}, got {block_map.indices.device}"
        )


def check_alpha(alpha: Any, q: Tensor, num_rows: int) -> Tensor:
    """alpha as a tensor (B|1, H|1, T_m|1) on q's device, of a floating dtype.

    Args:
        alpha: a number in [0, 1], or such a tensor, whose values are not checked.
        num_rows: T_m.

    Raises:
        TypeError: neither, or a tensor of integers. ValueError: a number outside [0, 1], another
            shape or device.
    """
    if isinstance(alpha, (int, float)):
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a value in [0, 1], got {alpha}")
        kind = torch.float64 if q.dtype == torch.float64 else torch.float32
        return torch.full((1, 1, 1), float(alpha), dtype=kind, device=q.device)
    if not isinstance(alpha, Tensor):
        raise TypeError(f"alpha: expected a torch.Tensor or a number, got {type(alpha).__name__}")
    full = (q.shape[0], q.shape[1], num_rows)
    if alpha.ndim != 3 or any(a not in (1, f) for a, f in zip(alpha.shape, full)):
        raise ValueError(
            f"alpha: expected shape (B|1, H|1, T_m|1) of {full}, got {tuple(alpha.shape)}"
        )
    if not alpha.dtype.is_floating_point:
        raise TypeError(f"alpha: expected a floating dtype, got {alpha.dtype}")
    if alpha.device != q.device:
        raise ValueError(f"alpha: expected q's device {q.device}, got {alpha.device}")
    return alpha


@torch.library.custom_op("sla2::kv_lengths", mutates_args=())
def _within(lengths: Tensor, least: int, n_k: int) -> Tensor:
    """int64 lengths, their values checked: an operator, because torch.compile does not
    know them.
    """
    if int(lengths.min()) < least or int(lengths.max()) > n_k:
        why = " (padding is at the end of the text)" if least > 1 else ""
        raise ValueError(
            f"kv_lengths: expected values in [{least}, {n_k}]{why}, got {lengths.tolist()}"
        )
    return lengths.to(torch.int64, copy=True)


@_within.register_fake
def _(lengths: Tensor, least: int, n_k: int) -> Tensor:
    return lengths.new_empty(lengths.shape, dtype=torch.int64)


def check_kv_lengths(kv_lengths: Any, q: Tensor, k: Tensor, text_tokens: int = 0) -> Tensor | None:
    """The lengths as int64 (B,) on q's device, or None.

    Args:
        kv_lengths: None, or one integer in [1, N_k] per batch item, as a sequence or an integer
            tensor. Values on a GPU are not checked, for reading them would wait for the device.
        text_tokens: so many keys at the end are text, of which alone may be padding.

    Raises:
        TypeError: no integers. ValueError: another shape, or a value outside [1, N_k], or below
            N_k - text_tokens.
    """
    if kv_lengths is None:
        return None
    if not isinstance(kv_lengths, Tensor):
        try:
            kv_lengths = torch.as_tensor(kv_lengths, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"kv_lengths: expected integers, got {kv_lengths!r}") from None
    if kv_lengths.dtype.is_floating_point or kv_lengths.dtype == torch.bool:
        raise TypeError(f"kv_lengths: expected integers, got {kv_lengths.dtype}")
    found = tuple(kv_lengths.shape)
    if found != (q.shape[0],):
        raise ValueError(
            f"kv_lengths: expected shape ({q.shape[0]},), one per batch item, got {found}"
        )
    if kv_lengths.device.type != "cpu":
        return kv_lengths.to(q.device, torch.int64)
    least = k.shape[2] - text_tokens if text_tokens else 1
    return _within(kv_lengths, least, k.shape[2]).to(q.device)


def check_precision(precision: str) -> None:
    """Raise ValueError unless `precision` names a member of formats/."""
    check_choice("precision", precision, FORMATS.names())


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or a registered backend's name."""
    check_choice("backend", backend, ("auto", *BACKENDS))
