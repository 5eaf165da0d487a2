"""import_turbodiffusion: a checkpoint of TurboDiffusion as a folder that diffusers and this package
load.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from sla2_core.adapter import read_json, write_json
from sla2_core.integrations.loading import local_folder
from sla2_core.integrations.turbodiffusion.loading import load_turbodiffusion

_TRANSFORMERS = ("transformer", "transformer_2")
# Sizes of a transformer that the other parts of its pipeline know.
_SHARED = ("in_channels", "out_channels", "text_dim", "image_dim")


def import_turbodiffusion(
    path: str | Path,
    folder: str | Path,
    *,
    low_noise: str | Path | None = None,
    base: str | Path | None = None,
    **geometry: Any,
) -> Path:
    """Write a checkpoint as `folder`, whole or not at all.

    `folder`/transformer holds diffusers' files and SLA as an adapter beside them:
    loading.from_pretrained(folder, subfolder="transformer") gives the handle, and diffusers alone
    the model without SLA. `folder`/scheduler is rCM's sampler. With `base` the other parts of that
    pipeline are there too: diffusers loads the folder as a pipeline.

    Args:
        path: the checkpoint; of a pair of Wan2.2, the one for high noise.
        folder: to be made; it must not exist, or be empty.
        low_noise: the other one of the pair, which becomes transformer_2.
        base: the pipeline of the same model, a folder or a hub id, whose VAE, text encoder and
            tokenizer are linked where both lie on one disk, else copied.
        geometry: topk, block_q, block_k and torch_dtype, as of load_turbodiffusion.

    Returns:
        The folder.

    Raises:
        FileNotFoundError, ValueError: as load_turbodiffusion; a folder that holds something, a pair
            of different sizes, a base with another number of transformers or with others.
        OSError: a file cannot be written.
    """
    from sla2_core.integrations.rcm import SIGMA_MAX, RCMScheduler

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new folder, got one that holds something")
    paths = [path] if low_noise is None else [path, low_noise]
    index = None if base is None else _index(base, len(paths))
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        sizes: list[Any] = []
        for name, source in zip(_TRANSFORMERS, paths):
            handle = load_turbodiffusion(source, **geometry)
            transformer = handle.transformer
            sizes.append({k: v for k, v in transformer.config.items() if not k.startswith("_")})
            if sizes[-1] != sizes[0]:
                raise ValueError(
                    f"{source}: expected the sizes of {path}, its pair, got others: {sizes[-1]}"
                )
            if index is not None:
                _check_base(index[0], source, sizes[0])
            handle.save(partial / name)
            handle.remove()
            transformer.save_pretrained(partial / name)
            del handle, transformer
        image = sizes[0]["in_channels"] > sizes[0]["out_channels"]
        sampler = RCMScheduler(sigma_max=SIGMA_MAX["i2v" if image else "t2v"])
        sampler.save_pretrained(partial / "scheduler")
        if index is not None:
            origin, content = index
            _link(origin, partial, content)
            content["scheduler"] = [RCMScheduler.__module__, RCMScheduler.__name__]
            write_json(partial / "model_index.json", content)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _index(base: str | Path, count: int) -> tuple[Path, dict[str, Any]]:
    """The folder of a pipeline, without its transformers where it comes from the hub, and the
    content of its model_index.json.
    """
    names = ["model_index.json", "transformer/config.json"]
    content = read_json(local_folder(base, names) / "model_index.json")
    folder = local_folder(base, [*names, *(f"{name}/*" for name in _parts(content))])
    has = sum(bool((content.get(name) or [None])[0]) for name in _TRANSFORMERS)
    if has != count:
        raise ValueError(
            f"base: expected a pipeline with {count} transformers as there are checkpoints, got"
            f" {has} in {folder}"
        )
    return folder, content


def _check_base(folder: Path, source: str | Path, sizes: dict[str, Any]) -> None:
    """Raise ValueError if the transformer of the pipeline in `folder` is of another kind than that
    of the checkpoint, such as one of image to video.
    """
    path = folder / "transformer" / "config.json"
    config = read_json(path)
    for name in _SHARED:
        if config.get(name) != sizes[name]:
            raise ValueError(
                f"base: expected a pipeline of {name}={sizes[name]} as {source} has, got"
                f" {config.get(name)} in {path}"
            )


def _parts(content: dict[str, Any]) -> list[str]:
    """The folders of a pipeline's parts but transformers and scheduler."""
    return [
        name
        for name, value in content.items()
        if isinstance(value, list) and len(value) == 2 and value[0] is not None
        if name not in (*_TRANSFORMERS, "scheduler")
    ]


def _link(origin: Path, target: Path, content: dict[str, Any]) -> None:
    """The parts of a pipeline but transformers and scheduler, linked into `target` or copied."""
    for name in _parts(content):
        if not (origin / name).is_dir():
            raise ValueError(f"base: expected {name} in {origin}, found none")
        shutil.copytree(origin / name, target / name, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
