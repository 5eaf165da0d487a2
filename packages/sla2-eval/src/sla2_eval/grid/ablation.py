"""A grid of variants over seeds: each trained, generated from the same noise as full attention,
scored and compared.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from sla2_eval.generation import sampling as generation
from sla2_eval.grid import steps as pipeline
from sla2_eval.parallel.cluster import check_address
from sla2_eval.parallel.pool import open_pool
from sla2_eval.parallel.tasks import Task, TasksLost
from sla2_eval.runs.progress import Report, silent
from sla2_eval.runs.settings import (
    AblationSettings,
    AttentionSettings,
    SettingsError,
    VariantSettings,
    validate,
)
from sla2_eval.runs.store import digest, write_atomic

REFERENCE = "full"
UNPAIRED = ("temporal_flickering", "motion_smoothness_linear", "caption_accuracy")
_SHAPES = (
    "method",
    "router",
    "per_head_router",
    "alpha",
    "alpha_knots",
    "alpha_per_head",
    "alpha_init",
)
_ROUTING = (*_SHAPES, "tau", "smooth_k", "block_q", "block_k")


@dataclass(frozen=True)
class Cell:
    """One variant at one seed: a row of the grid, with the keys of the training it shares with
    others.
    """

    name: str
    variant: VariantSettings
    attention: AttentionSettings
    trained: AttentionSettings  # the same in the precision of its training
    seed: int
    router: str | None  # folder of stage 1 below work/, None where there is nothing to learn
    tuned: str | None  # folder of stage 2 below work/, None if the variant is not fine-tuned

    @property
    def sparsity(self) -> float:
        return 1 - self.attention.topk


@dataclass(frozen=True)
class GridResult:
    """Where the report is, its rows (one a variant, means over videos and seeds), how many videos
    failed to score, and
    the tasks over which workers died, with the reasons.
    """

    report: Path
    rows: list[dict]
    failed: int
    lost: dict[str, str]


def cells(settings: AblationSettings) -> list[Cell]:
    """Variants x seeds, a whole seed before the next.

    Raises SettingsError naming the variant for a repeated name or an unknown attention field, or
    the key for another kind of model or seeds that are not different whole numbers.
    """
    model, seeds = generation.find_model(settings.model), settings.seeds
    if not isinstance(model, Path) or (model / "model_index.json").exists():
        raise SettingsError(
            f"model: expected 'tiny' or a folder of a model of its form, got {settings.model!r};"
            " pipelines are trained with sla2_core.training and compared with sla2 generate and"
            " sla2 score"
        )
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise SettingsError(
            f"seeds: expected different integers >= 0, at least one, got {list(seeds)}"
        )
    names = [variant.name for variant in settings.variants]
    if repeated := next((n for n in names if names.count(n) > 1 or n == REFERENCE), None):
        raise SettingsError(
            f"variants: expected each name once and none called {REFERENCE!r}, got {repeated!r}"
        )
    found = []
    for number, variant in enumerate(settings.variants):
        merged = settings.attention.model_dump() | variant.attention
        attention = validate(
            merged, AttentionSettings, f"variants.{number} ({variant.name}): attention"
        )
        trained = attention.model_copy(
            update={"precision": variant.train_precision or attention.precision}
        )
        for seed in settings.seeds:
            learns = attention.method == "sla2" and not (
                attention.router == "heuristic" and attention.alpha == "one"
            )
            router = tuned = None
            if learns:
                what = {key: getattr(attention, key) for key in _ROUTING}
                what |= {"stage1": settings.stage1.model_dump(), "data": _data_key(settings)}
                router = f"stage1/{digest(what)[:10]}-s{seed}"
            if variant.finetune:
                what = {"attention": trained.model_dump(exclude={"backend"}), "router": router}
                what |= {"stage2": settings.stage2.model_dump(), "data": _data_key(settings)}
                tuned = f"stage2/{digest(what)[:10]}-s{seed}"
            name = variant.name if len(settings.seeds) == 1 else f"{variant.name}-s{seed}"
            found.append(Cell(name, variant, attention, trained, seed, router, tuned))
    return sorted(found, key=lambda cell: settings.seeds.index(cell.seed))


def _data_key(settings: AblationSettings) -> str:
    data, capture = settings.data.model_dump(mode="json"), settings.capture.model_dump()
    return digest(
        {"model": generation.model_fingerprint(settings.model), "data": data, "capture": capture}
    )[:10]


def sampling(settings: AblationSettings) -> generation.SamplingConfig:
    """How every video of the grid is sampled."""
    values = settings.generate.model_dump(exclude={"prompts", "num_prompts"})
    return generation.SamplingConfig(**values)


def prompts_of(settings: AblationSettings) -> list[str]:
    """The prompts of the grid. Raises ValueError if the file has fewer than `num_prompts`."""
    count = settings.generate.num_prompts
    if settings.generate.prompts is None:
        return pipeline.builtin_prompts(count)
    found = generation.read_prompts(settings.generate.prompts)
    if len(found) < count:
        raise ValueError(f"{settings.generate.prompts}: expected {count} prompts, got {len(found)}")
    return found[:count]


def metrics_of(settings: AblationSettings) -> list[str]:
    """The metrics asked for; by default all that suit small videos (MS-SSIM needs 160 pixels)."""
    from sla2_eval.scoring import metrics

    if settings.metrics is None:
        return [name for name in metrics.specs() if name != "ms_ssim"]
    return list(metrics.select(settings.metrics))


def task_data(settings: AblationSettings, work: Path, *, report: Report = silent) -> None:
    """Training videos, then Q, K, V."""
    data = pipeline.write_data(settings.data, _data(settings, work), report=report)
    if pipeline.is_captured(settings.capture, _captures(settings, work)):
        return
    generator = generation.load_generator(settings.model)
    pipeline.capture_qkv(
        generator, data, settings.capture, _captures(settings, work), report=report
    )


def task_router(
    settings: AblationSettings, cell: Cell, work: Path, *, report: Report = silent
) -> dict:
    """Stage 1, shared by every variant of the same routing and seed; it does not depend on the
    precision.
    """
    assert cell.router is not None  # a cell without stage 1 has no such task
    if (work / cell.router / "adapter" / "sla2_config.json").exists():
        return json.loads((work / cell.router / "report.json").read_text())
    generator = generation.load_generator(settings.model)
    attention = cell.attention.model_copy(
        update={"precision": "full", "topk": max(settings.stage1.topk)}
    )
    return pipeline.stage1(
        generator,
        attention,
        _captures(settings, work),
        settings.stage1,
        cell.seed,
        work / cell.router,
        stage=f"stage 1 of {cell.name}",
        report=report,
    )


def task_tune(
    settings: AblationSettings, cell: Cell, work: Path, *, report: Report = silent
) -> dict:
    """Stage 2, shared by every variant that is trained the same way."""
    assert cell.tuned is not None  # a cell without stage 2 has no such task
    if (done := work / cell.tuned / "finished.json").exists():
        return json.loads(done.read_text())
    generator = generation.load_generator(settings.model)
    data = settings.data.videos or _data(settings, work)
    router = work / cell.router if cell.router else None
    return pipeline.stage2(
        generator,
        cell.trained,
        router,
        data,
        settings.stage2,
        cell.seed,
        work / cell.tuned,
        stage=f"stage 2 of {cell.name}",
        report=report,
    )


def task_full(
    settings: AblationSettings, out: Path, seed: int, share: int, *, report: Report = silent
) -> None:
    """The videos number `seed` of full attention, every second prompt from `share` on."""
    config, folder = sampling(settings), out / "videos" / REFERENCE
    requests = generation.plan(prompts_of(settings), [seed], config.seed)[share::2]
    stage = f"videos of {REFERENCE}, seed {seed}, half {share + 1}"
    if all((folder / request.file_name).exists() for request in requests):
        return
    generator = generation.load_generator(settings.model)
    generation.write_videos(generator, requests, folder, config, stage=stage, report=report)


def task_videos(
    settings: AblationSettings, cell: Cell, out: Path, *, report: Report = silent
) -> None:
    """The videos and block maps of one variant at one seed."""
    from sla2_core.training.stage1.train import load_stage1

    prompts, folder, config = prompts_of(settings), out / "videos" / cell.name, sampling(settings)
    maps = out / "block_maps" / f"{cell.name}.json"
    if maps.exists() and generation.is_complete(
        generation.plan(prompts, [cell.seed], config.seed), folder
    ):
        return
    generator = generation.load_generator(settings.model)
    handle = pipeline.apply(generator, cell.attention)
    if cell.tuned:
        handle.load(out / "work" / cell.tuned / "adapter", keep_settings=True)
    elif cell.router:
        load_stage1(handle, out / "work" / cell.router)
    generator.transformer.eval()
    generation.generate(
        generator,
        prompts,
        folder,
        config=config,
        indices=[cell.seed],
        fingerprint=_fingerprint(cell),
        stage=f"videos of {cell.name}",
        report=report,
    )
    if not maps.exists():
        video = folder / generation.video_name(prompts[0], cell.seed)
        found = pipeline.block_maps(generator, handle, video, prompts[0])
        write_atomic(maps, json.dumps(found) + "\n")


def _fingerprint(cell: Cell) -> dict:
    """What the folder of a variant's videos is bound to, beside the sampling."""
    return {"attention": cell.attention.model_dump(), "trained": cell.tuned or cell.router}


def task_scores(
    settings: AblationSettings, out: Path, name: str, *, report: Report = silent
) -> int:
    """Score one variant against full attention, or full attention alone; returns how many videos
    failed.
    """
    from sla2_eval.scoring import metrics
    from sla2_eval.scoring.score import score

    names = metrics_of(settings)
    reference: Path | None = out / "videos" / REFERENCE
    if name == REFERENCE:
        reference = None
        names = [metric for metric in names if metrics.specs()[metric].kind == "unpaired"] or list(
            UNPAIRED
        )
    results = score(
        out / "videos" / name,
        reference,
        names,
        out / "scores" / name,
        allow_failures=True,
        store=out / "scores" / "store",
        device="cpu",
    )
    report(f"scores of {name}", 1, 1)
    return len(results["failed"])


def _data(settings: AblationSettings, work: Path) -> Path:
    return work / f"data-{_data_key(settings)}"


def _captures(settings: AblationSettings, work: Path) -> Path:
    return work / f"captures-{_data_key(settings)}"


def graph(settings: AblationSettings, out: Path) -> dict[str, Task]:
    """Every task of the grid with what it needs, variant by variant, so that a half-finished grid
    has whole rows.

    Shared trainings appear once.
    """
    here, work, tasks = "sla2_eval.grid.ablation", out / "work", {}

    def add(task: str, function: str, needs: Sequence[str | None], **arguments) -> str:
        if task not in tasks:
            known = tuple(need for need in needs if need)
            tasks[task] = Task(f"{here}:{function}", {"settings": settings, **arguments}, known)
        return task

    grid = cells(settings)
    data = add("data", "task_data", [], work=work)
    full = [
        add(f"{REFERENCE} {seed}.{share}", "task_full", [], out=out, seed=seed, share=share)
        for seed in settings.seeds
        for share in range(2)
    ]
    add(f"scores {REFERENCE}", "task_scores", full, out=out, name=REFERENCE)
    for cell in grid:
        router = cell.router and add(cell.router, "task_router", [data], cell=cell, work=work)
        tuned = cell.tuned and add(cell.tuned, "task_tune", [data, router], cell=cell, work=work)
        videos = add(f"videos {cell.name}", "task_videos", [router, tuned], cell=cell, out=out)
        add(f"scores {cell.name}", "task_scores", [videos, *full], out=out, name=cell.name)
    return tasks


def run_grid(
    settings: AblationSettings,
    out: str | Path,
    *,
    ray_address: str | None = None,
    notes: tuple[str, ...] = (),
    report: Report = silent,
) -> GridResult:
    """Train, generate, score and report every variant of the grid into `out`; run again, finished
    parts are kept.

    It runs in `settings.workers` processes, or as Ray tasks of one GPU each: where this machine has
    several, or on the cluster at `ray_address` ("auto" finds one), whose nodes must see `out` and
    the model under the same paths. A task whose worker dies is tried twice; what cannot be done
    without it is listed in the result and in the report.

    Raises ValueError for settings that do not fit the model or what `out` holds already, or for an
    address of no cluster, OSError if `out` cannot be written, RuntimeError if Ray cannot be started
    or joined.
    """
    out, config, started = Path(out), sampling(settings), time.time()
    if ray_address is not None:
        check_address(ray_address)
    grid, prompts = cells(settings), prompts_of(settings)
    tasks = graph(settings, out)
    metrics_of(settings)
    full = out / "videos" / REFERENCE
    generation.open_folder(full, config, {"model": generation.model_fingerprint(settings.model)})
    for cell in grid:
        generation.open_folder(out / "videos" / cell.name, config, _fingerprint(cell))
    generation.write_manifest(generation.plan(prompts, settings.seeds, config.seed), full)
    write_run(settings, grid, out, notes)
    with open_pool(settings.workers, ray_address, report=report) as pool:
        try:
            results, lost = pool.run(tasks), {}
        except TasksLost as error:
            results, lost = error.results, error.lost
    failed = sum(results[name] for name in tasks if name.startswith("scores ") and name in results)
    seconds = round(time.time() - started)
    notes = (*notes, f"this pass took {seconds} s in {pool.about}")
    write_run(settings, grid, out, notes, lost)
    from sla2_eval.report.page import write_report

    return GridResult(report=write_report(out), rows=table(out), failed=failed, lost=lost)


def write_run(
    settings: AblationSettings,
    grid: list[Cell],
    out: Path,
    notes: tuple[str, ...],
    lost: dict[str, str] | None = None,
) -> None:
    """run.json: what the report says about the run beside its scores."""
    variants = [
        {"name": REFERENCE, "label": "full attention", "family": "full attention", "sparsity": 0.0}
    ]
    for cell in grid:
        row = {"name": cell.name, "label": cell.variant.label, "family": cell.variant.family}
        variants.append({**row, "sparsity": _measured_sparsity(out, cell), "seed": cell.seed})
    document = {
        "title": settings.title,
        "settings": settings.model_dump(mode="json"),
        "versions": (
            {name: version(name) for name in ("sla2-eval", "sla2-core", "torch", "diffusers", "av")}
            | {"python": platform.python_version()}
        ),
        "hardware": (
            hardware()
            | {"dtype": str(generation.autocast_dtype(settings.generate.dtype) or "torch.float32")}
        ),
        "variants": variants,
        "reference": REFERENCE,
        "notes": list(notes),
        "lost": lost or {},
    }
    write_atomic(out / "run.json", json.dumps(document, indent=1) + "\n")


def _measured_sparsity(out: Path, cell: Cell) -> float:
    maps = out / "block_maps" / f"{cell.name}.json"
    return json.loads(maps.read_text())["sparsity"] if maps.exists() else cell.sparsity


def hardware() -> dict:
    """Processor, cores and memory of this machine."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":")[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = models[0] if models else name
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    )
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 2**30, 1),
        "system": platform.system(),
    }


def table(out: Path) -> list[dict]:
    """One row a variant: means over videos and seeds of every metric, in the order of
    the report.
    """
    from sla2_eval.report.data import gather

    rows = []
    for group in gather(out)["groups"]:
        row = {
            "variant": group["label"],
            "sparsity": round(group["sparsity"], 4),
            "seeds": len(group["names"]),
        }
        rows.append(row | {metric: cell["mean"] for metric, cell in group["metrics"].items()})
    return rows
