"""Variants of a model from the same noise: an adapter each, the videos spread over processes or
over GPUs with Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sla2_eval.generation.prompts import Prompt, Request, plan
from sla2_eval.generation.sampling import (
    SamplingConfig,
    folder_digest,
    load_generator,
    model_fingerprint,
    open_folder,
    resolved,
    suffix_of,
    write_manifest,
    write_videos,
)
from sla2_eval.parallel.cluster import check_address
from sla2_eval.parallel.pool import open_pool
from sla2_eval.parallel.tasks import Task
from sla2_eval.runs.progress import Report, silent
from sla2_eval.runs.settings import import_modules


def generate_part(
    model: str,
    adapter: str | None,
    requests: Sequence[Request],
    folder: Path,
    config: SamplingConfig,
    *,
    imports: Sequence[str] = (),
    stage: str = "generate",
    report: Report = silent,
) -> None:
    """Load the model and write the videos of these requests that are not there yet: the work of one
    process, which imports `imports` first.
    """
    import_modules(imports)
    if all((folder / request.file_name).exists() for request in requests):
        report(stage, len(requests), len(requests))
        return
    write_videos(
        load_generator(model, adapter), requests, folder, config, stage=stage, report=report
    )


def read_variants(given: Sequence[str], out: Path) -> dict[Path, str | None]:
    """NAME=ADAPTER, or NAME=full for full attention -> {folder below `out`: adapter or None}.
    Raises ValueError.
    """
    found: dict[Path, str | None] = {}
    for text in given:
        name, _, adapter = text.partition("=")
        if not name or not adapter or "/" in name or name.startswith("."):
            raise ValueError(f"--variant: expected NAME=ADAPTER or NAME=full, got {text!r}")
        if out / name in found:
            raise ValueError(f"--variant: expected each name once, got {name!r} again")
        found[out / name] = None if adapter == "full" else adapter
    return found


def generate_variants(
    model: str,
    variants: Mapping[Path, str | None],
    prompts: Sequence[str | Prompt],
    config: SamplingConfig,
    *,
    indices: Sequence[int] | None = (0,),
    imports: Sequence[str] = (),
    workers: int = 1,
    ray_address: str | None = None,
    report: Report = silent,
) -> list[Path]:
    """Write `{prompt}-{index}.mp4` and a manifest into the folder of each variant; finished files
    are not done twice.

    Every variant starts from the same noise. On a machine with several GPUs, or the Ray cluster at
    `ray_address` ("auto" finds one), each variant's videos are shared by all GPUs, one Ray task
    each; else by `workers` processes of one thread, or done here. The nodes of a cluster must see
    model, adapters and folders under the same paths.

    Args:
        variants: {folder: adapter, or None for full attention}. indices: numbers of the videos of
            each prompt; None: as many as its benchmark asks for.
        imports: modules that register members of their own, which adapters name; every process
            imports them.

    Returns:
        The manifests, in the order of `variants`.

    Raises:
        ValueError: as generate and resolved; an adapter that is no folder, an address of no
            cluster. OSError: a folder that cannot be written, a hub id that cannot be fetched.
            RuntimeError: Ray cannot be started or joined, or workers died over some videos every
            time.
    """
    import_modules(imports)
    if ray_address is not None:
        check_address(ray_address)
    for adapter in variants.values():
        if adapter is not None and not Path(adapter).is_dir():
            raise ValueError(f"adapter: expected a folder with sla2_config.json, got {adapter}")
    requests = plan(prompts, indices, config.seed, suffix=suffix_of(model))
    config, weights = resolved(model, config), model_fingerprint(model)
    for folder, adapter in variants.items():
        trained = None if adapter is None else folder_digest(Path(adapter))
        open_folder(folder, config, {"model": weights, "adapter": trained})
    with open_pool(workers if workers > 1 else 0, ray_address, report=report) as pool:
        parts = min(pool.free(), len(requests))
        tasks = {}
        for folder, adapter in variants.items():
            name = f"videos in {folder}" if len(variants) > 1 else "generate"
            for number in range(parts):
                stage = f"{name}, part {number + 1} of {parts}" if parts > 1 else name
                arguments: dict[str, object] = {
                    "model": model,
                    "adapter": adapter,
                    "requests": requests[number::parts],
                }
                arguments |= {"folder": folder, "config": config, "stage": stage}
                arguments |= {"imports": tuple(imports)}
                tasks[stage] = Task("sla2_eval.generation.variants:generate_part", arguments)
        pool.run(tasks)
    return [write_manifest(requests, folder, config) for folder in variants]
