"""A teacher that remembers: its predictions are kept in a folder, by what it was given.

What is random in a step of stage 2 follows from (seed, step), so runs of one seed ask the same
teacher the same questions. With full attention over many tokens the answers are most of the cost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core.adapter import read_tensors, write_tensors


class KeptTargets(nn.Module):
    """A frozen transformer of diffusers, called as train_stage2 calls its teacher.

    A file holds one prediction, in the dtype in which it was made. Several processes may share the
    folder: files are written whole.

    Args:
        teacher: the transformer. Runs that share a folder must have the same one.
        folder: made if need be; a file takes as much as the prediction of one micro-batch.

    Raises:
        OSError: a prediction cannot be written. ValueError: a damaged file. Both name the file.
    """

    def __init__(self, teacher: nn.Module, folder: str | Path):
        super().__init__()
        self.teacher, self.folder = teacher, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = teacher.config

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """(prediction,), as of the transformer with return_dict=False."""
        path = self.folder / f"{self._question(args, kwargs)}.safetensors"
        device = next(self.teacher.parameters()).device
        if path.exists():
            return (read_tensors(path)["prediction"].to(device),)
        found: Tensor = self.teacher(*args, **kwargs)[0]
        write_tensors(path, {"prediction": found})
        return (found,)

    def _question(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """A digest of everything that the prediction depends on, beside the weights."""
        first = next(self.teacher.parameters())
        kind = first.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        digest = hashlib.sha256(f"{kind} {autocast} {first.dtype}".encode())
        for name, value in _leaves(args, kwargs):
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
                raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(raw.numpy().tobytes())
            else:
                digest.update(repr(value).encode())
        return digest.hexdigest()[:32]


def _leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of every argument, and of every part of one that is a tuple."""
    named = [(str(n), x) for n, x in enumerate(args)] + sorted(kwargs.items())
    for name, value in named:
        if isinstance(value, tuple | list):
            yield from ((f"{name}.{n}", part) for n, part in enumerate(value))
        else:
            yield name, value
