"""Training data encoded once: latents and text embeddings of each sample in its own safetensors
file, read when drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sla2_core.adapter import read_json, read_tensors, write_json, write_tensors

PLAN_NAME = "plan.json"
INDEX_NAME = "cache.json"
UNCONDITIONAL_NAME = "unconditional.safetensors"


class CachedData:
    """A folder of encoded samples, as encode_samples writes it: a data set for train_stage2.

    Attributes:
        names: what each sample is called.
        unconditional: the conditions of the empty caption, {name: tensor}; None if they were not
            encoded.

    Raises:
        FileNotFoundError, ValueError: no index in the folder; or, when a sample is read, one that
            is missing or damaged. The message names the file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        content = read_json(self.folder / INDEX_NAME)
        if content.get("format_version") != 1:
            raise ValueError(
                f"{self.folder / INDEX_NAME}: expected format_version 1, got"
                f" {content.get('format_version')!r}"
            )
        self.names: list[str] = content["names"]
        path = self.folder / UNCONDITIONAL_NAME
        self.unconditional = read_tensors(path) if path.exists() else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return read_tensors(self.folder / f"{index:06d}.safetensors")


def check_keys(folder: str | Path, names: Sequence[str], keys: Sequence[str]) -> None:
    """Check that a folder of encoded samples was made from samples of these names and keys, as
    encode_samples has them.

    Raises ValueError naming the folder's plan and what differs; FileNotFoundError without one.
    """
    plan = Path(folder) / PLAN_NAME
    found = read_json(plan)
    if found.get("names") != list(names):
        raise ValueError(f"{plan}: expected the names given, got others; encode into a new folder")
    for index in _changed(found, keys):
        raise ValueError(
            f"{plan}: expected {names[index]} as it was encoded, got another file or caption;"
            " encode into a new folder"
        )


def _changed(plan: Mapping[str, Any], keys: Sequence[str]) -> list[int]:
    before = plan.get("keys") or keys  # a folder of an older version has none
    return [i for i, (old, new) in enumerate(zip(before, keys)) if old != new]


def encode_samples(
    names: Sequence[str],
    encode: Callable[[int], Mapping[str, Tensor]],
    folder: str | Path,
    *,
    settings: Mapping[str, Any],
    keys: Sequence[str] = (),
    unconditional: Callable[[], Mapping[str, Tensor]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CachedData:
    """Encode samples that are not encoded yet; started again, it goes on where it was.

    Args:
        names: what each sample is called (its file), to notice another data set.
        encode: i -> {"latents": tensor, condition: tensor, ...} of sample i, without a batch
            dimension.
        folder: gets one file per sample, and the index when all are there.
        settings: JSON values that fix the encoding (model, size, frames); a folder with others is
            refused.
        keys: for each sample a hash of what it is made from, none to compare none. A sample of
            another key is encoded again; in a folder that is finished it is refused.
        unconditional: () -> the conditions of the empty caption.
        progress: called as progress(done, total).

    Raises:
        ValueError: the folder holds other samples or settings, or is finished and a sample has
            another key. OSError: a file cannot be
            written. What encode raises comes through; the samples done before it stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"names": list(names), "settings": dict(settings)}
    plan = folder / PLAN_NAME
    if plan.exists():
        found = read_json(plan)
        for key, value in wanted.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{plan}: expected the {key} given, got others; encode into a new folder"
                )
        if (folder / INDEX_NAME).exists():
            check_keys(folder, names, keys)
        for index in _changed(found, keys):
            (folder / f"{index:06d}.safetensors").unlink(missing_ok=True)
    write_json(plan, {**wanted, "keys": list(keys)})
    if unconditional is not None and not (folder / UNCONDITIONAL_NAME).exists():
        write_tensors(folder / UNCONDITIONAL_NAME, unconditional())
    for index in range(len(names)):
        path = folder / f"{index:06d}.safetensors"
        if not path.exists():
            write_tensors(path, encode(index))
        if progress:
            progress(index + 1, len(names))
    write_json(
        folder / INDEX_NAME, {"format_version": 1, "names": list(names), "settings": dict(settings)}
    )
    return CachedData(folder)
