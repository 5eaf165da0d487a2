"""A grid of variants over seeds: each trained, generated from the same noise as full attention,
scored and compared.
"""

from __future__ import annotations

import functools
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sla2_core.config import NOT_STAGE1, SLA2Config

from sla2_eval.generation import sampling as generation
from sla2_eval.generation.prompts import Prompt, Request, plan, read_prompts
from sla2_eval.grid import steps
from sla2_eval.grid.settings import AblationSettings, Attention, VariantSettings
from sla2_eval.grid.source import TrainSource, open_source, source_of, with_shift
from sla2_eval.parallel.cluster import check_address
from sla2_eval.parallel.pool import open_pool
from sla2_eval.parallel.tasks import Task, TasksLost
from sla2_eval.runs.hardware import hardware
from sla2_eval.runs.progress import Report, silent
from sla2_eval.runs.settings import SettingsError, import_modules
from sla2_eval.runs.store import digest, write_atomic

REFERENCE = "full"
SHARES = 2  # tasks that the videos of a variant are divided into
UNPAIRED = ("temporal_flickering", "motion_smoothness_linear", "caption_accuracy")
_NOT_STAGE2 = ("backend",)  # as config.NOT_STAGE1, of stage 2


@dataclass(frozen=True)
class Cell:
    """One variant at one seed: a row of the grid, with the keys of the training it shares with
    others.
    """

    name: str
    variant: VariantSettings
    attention: Attention
    trained: Attention  # the same in the precision of its training
    seed: int
    router: str | None  # folder of stage 1 below work/, None where there is nothing to learn
    tuned: str | None  # folder of stage 2 below work/, None if the variant is not fine-tuned

    @property
    def sparsity(self) -> float:
        return 1 - self.attention["topk"]


@dataclass(frozen=True)
class GridResult:
    """Where the report is, its rows (one a variant, means over videos and seeds), how many videos
    failed to score, and the tasks over which workers died, with the reasons.
    """

    report: Path
    rows: list[dict[str, Any]]
    failed: int
    lost: dict[str, str]


def cells(settings: AblationSettings) -> list[Cell]:
    """Variants x seeds, a whole seed before the next.

    Raises SettingsError naming the variant for a repeated name, or the key for seeds that are not
    different whole numbers.
    """
    seeds = settings.seeds
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise SettingsError(
            f"seeds: expected different integers >= 0, at least one, got {list(seeds)}"
        )
    names = [variant.name for variant in settings.variants]
    if repeated := next((n for n in names if names.count(n) > 1 or n == REFERENCE), None):
        raise SettingsError(
            f"variants: expected each name once and none called {REFERENCE!r}, got {repeated!r}"
        )
    data = _data_key(settings)
    found = []
    for variant in settings.variants:
        attention = settings.attention_of(variant)
        trained = attention
        if variant.train_precision is not None:
            trained = attention.in_precision(variant.train_precision)
        given = variant.adapter is not None
        learns = attention.learns_in_stage1() and not given and variant.start is None
        for seed in seeds:
            router = tuned = None
            if learns:
                what = _without(_for_stage1(settings, attention), NOT_STAGE1)
                what |= {"stage1": asdict(settings.stage1)}
                what |= {"captures": _captures_key(settings, attention)}
                router = f"stage1/{digest(what)[:10]}-s{seed}"
            if variant.finetune and not given:
                what = {"attention": _without(trained, _NOT_STAGE2), "router": router}
                what |= {"stage2": variant.own_stage2(settings.stage2).to_dict(), "data": data}
                if variant.start is not None:
                    what |= {"start": generation.folder_digest(variant.start)}
                tuned = f"stage2/{digest(what)[:10]}-s{seed}"
            name = variant.name if len(seeds) == 1 else f"{variant.name}-s{seed}"
            found.append(Cell(name, variant, attention, trained, seed, router, tuned))
    return sorted(found, key=lambda cell: seeds.index(cell.seed))


def _without(attention: Attention, names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in attention.fields().items() if name not in names}


def _for_stage1(settings: AblationSettings, attention: Attention) -> Attention:
    """What stage 1 runs with, alike for all that share it. A format with options of its own may
    bind an adapter to them, so it keeps its own stage 1.
    """
    config: SLA2Config = attention.config()
    options = config.members()["precision"].options
    same = attention if options else attention.in_precision("full")
    return same.changed({"topk": max(settings.stage1.topk)})


def _data_key(settings: AblationSettings) -> str:
    what = settings.model_dump(mode="json", include={"data", "video"})
    return digest({"model": generation.model_fingerprint(settings.model), **what})[:10]


def _captures_key(settings: AblationSettings, attention: Attention) -> str:
    what: dict[str, Any] = {"data": _data_key(settings), "capture": asdict(settings.capture)}
    what |= {"shift": settings.stage2.shift, **attention.order()}
    return digest(what)[:10]


def sampling(settings: AblationSettings) -> generation.SamplingConfig:
    """How every video of the grid is sampled, the model's own values written out."""
    config = settings.generate.config(settings.video)
    return generation.resolved(settings.model, config)


def prompts_of(settings: AblationSettings, source: TrainSource) -> list[Prompt]:
    """The prompts of the grid. Raises ValueError if the file has fewer than `num_prompts`, or for
    a pipeline without a file.
    """
    count, path = settings.generate.num_prompts, settings.generate.prompts
    if path is None:
        if not source.tiny:
            raise SettingsError(
                f"generate.prompts: expected a text file of one prompt a line for {source.name},"
                " got none"
            )
        return [Prompt(caption) for caption in steps.builtin_prompts(count)]
    given = settings.generate
    found = read_prompts(path, names=given.names, info=given.info)
    if len(found) < count:
        raise ValueError(f"{path}: expected {count} prompts, got {len(found)}")
    return found[:count]


def requests_of(
    settings: AblationSettings, source: TrainSource, seeds: Sequence[int]
) -> list[Request]:
    """A video of every prompt for each of the seeds."""
    suffix = generation.suffix_of(settings.model)
    return plan(prompts_of(settings, source), seeds, settings.generate.seed, suffix=suffix)


def metrics_of(settings: AblationSettings, source: TrainSource) -> list[str]:
    """The metrics asked for; by default all that suit the model: MS-SSIM needs 176 pixels, and the
    exact detector of captions knows the tiny model's scenes.
    """
    from sla2_eval.scoring import metrics

    if settings.metrics is None:
        unfit = "ms_ssim" if source.tiny else "caption_accuracy"
        return [name for name in metrics.specs() if name != unfit]
    return list(metrics.select(settings.metrics))


def run_task(step: str, settings: AblationSettings, *, report: Report, **arguments: Any) -> Any:
    """Do one task of the grid: `step` names one of the functions below. Members that are registered
    outside the package are known first, in whichever process this is.
    """
    import_modules(settings.imports)
    return globals()[f"task_{step}"](settings, report=report, **arguments)


def task_data(settings: AblationSettings, work: Path, *, report: Report = silent) -> None:
    """Training videos, encoded where the model has a VAE."""
    open_source(settings).encode(settings.data, _data(settings, work), report=report)


def task_capture(
    settings: AblationSettings, cell: Cell, work: Path, *, report: Report = silent
) -> None:
    """Q, K, V in the token order of this cell."""
    folder = _captures(settings, cell, work)
    if steps.is_captured(settings.capture, folder):
        return
    source = open_source(settings)
    steps.capture_qkv(
        source,
        source.encode(settings.data, _data(settings, work), report=report),
        settings.capture,
        folder,
        shift=settings.stage2.shift,
        order=cell.attention.order(),
        report=report,
    )


def task_router(
    settings: AblationSettings, cell: Cell, work: Path, *, report: Report = silent
) -> dict[str, Any]:
    """Stage 1, shared by every variant of the same routing and seed; it does not depend on the
    precision.
    """
    assert cell.router is not None  # a cell without stage 1 has no such task
    if (work / cell.router / "adapter" / "sla2_config.json").exists():
        return json.loads((work / cell.router / "report.json").read_text())
    return steps.stage1(
        open_source(settings),
        _for_stage1(settings, cell.attention),
        _captures(settings, cell, work),
        replace(settings.stage1, seed=cell.seed),
        work / cell.router,
        stage=f"stage 1 of {cell.name}",
        report=report,
    )


def task_tune(
    settings: AblationSettings, cell: Cell, work: Path, *, report: Report = silent
) -> dict[str, Any]:
    """Stage 2, shared by every variant that is trained the same way."""
    assert cell.tuned is not None  # a cell without stage 2 has no such task
    if (done := work / cell.tuned / "finished.json").exists():
        return json.loads(done.read_text())
    source = open_source(settings)
    return steps.stage2(
        source,
        cell.trained,
        work / cell.router if cell.router else None,
        functools.partial(source.encode, settings.data, _data(settings, work), report=report),
        replace(cell.variant.own_stage2(settings.stage2), seed=cell.seed),
        work / cell.tuned,
        start=cell.variant.start,
        targets=work / f"targets-{_data_key(settings)}" if settings.keep_targets else None,
        stage=f"stage 2 of {cell.name}",
        report=report,
    )


def _share(name: str, share: int) -> str:
    """What one share of a variant's videos is called."""
    return f"videos of {name} ({share + 1} of {SHARES})"


def task_full(
    settings: AblationSettings, out: Path, seed: int, share: int, *, report: Report = silent
) -> None:
    """One share of the videos number `seed` of full attention."""
    config, folder = sampling(settings), out / "videos" / REFERENCE
    requests = requests_of(settings, open_source(settings), [seed])[share::SHARES]
    stage = f"{_share(REFERENCE, share)}, seed {seed}"
    if all((folder / request.file_name).exists() for request in requests):
        return
    generator = generation.load_generator(settings.model)
    generation.write_videos(generator, requests, folder, config, stage=stage, report=report)


def task_videos(
    settings: AblationSettings, cell: Cell, out: Path, share: int, *, report: Report = silent
) -> None:
    """One share of the videos of one variant at one seed; with the first its block maps."""
    from sla2_core.training.stage1.train import load_stage1

    requests = requests_of(settings, open_source(settings), [cell.seed])[share::SHARES]
    folder, config = out / "videos" / cell.name, sampling(settings)
    maps = None if share else out / "block_maps" / f"{cell.name}.json"
    videos_done = all((folder / request.file_name).exists() for request in requests)
    if videos_done and (maps is None or maps.exists()):
        return
    generator = generation.load_generator(settings.model)
    handle = steps.apply(generator.transformer, cell.attention)
    if cell.variant.adapter is not None:
        handle.load(cell.variant.adapter, keep_settings=True)
    elif cell.tuned:
        handle.load(out / "work" / cell.tuned / "adapter", keep_settings=True)
    elif cell.router:
        load_stage1(handle, out / "work" / cell.router)
    generator.transformer.eval()
    stage = _share(cell.name, share)
    generation.write_videos(generator, requests, folder, config, stage=stage, report=report)
    if maps is not None and not maps.exists():
        video, source = folder / requests[0].file_name, source_of(generator, settings)
        found = steps.block_maps(source, handle, video, requests[0].given)
        write_atomic(maps, json.dumps(found) + "\n")


def _fingerprint(cell: Cell) -> dict[str, Any]:
    """What the folder of a variant's videos is bound to, beside the sampling."""
    trained, adapter = cell.tuned or cell.router, cell.variant.adapter
    if adapter is not None:
        trained = generation.folder_digest(adapter)
    return {"attention": cell.attention.fields(), "trained": trained}


def task_scores(
    settings: AblationSettings, out: Path, name: str, *, report: Report = silent
) -> int:
    """Score one variant against full attention, or full attention alone; returns how many videos
    failed.
    """
    from sla2_eval.scoring import metrics
    from sla2_eval.scoring.score import score

    source = open_source(settings)
    names = metrics_of(settings, source)
    reference: Path | None = out / "videos" / REFERENCE
    if name == REFERENCE:
        reference = None
        names = [metric for metric in names if metrics.specs()[metric].kind == "unpaired"]
        names = names or [n for n in UNPAIRED if source.tiny or n != "caption_accuracy"]
    results = score(
        out / "videos" / name,
        reference,
        names,
        out / "scores" / name,
        allow_failures=True,
        store=out / "scores" / "store",
        num_workers=1,
    )
    report(f"scores of {name}", 1, 1)
    return len(results["failed"])


def _data(settings: AblationSettings, work: Path) -> Path:
    return work / f"data-{_data_key(settings)}"


def _captures(settings: AblationSettings, cell: Cell, work: Path) -> Path:
    return work / f"captures-{_captures_key(settings, cell.attention)}"


def graph(settings: AblationSettings, out: Path) -> dict[str, Task]:
    """Every task of the grid with what it needs, seed by seed and variant by variant, so that a
    half-finished grid has whole rows.

    Shared trainings appear once. Of a seed, variants that are trained come first: no worker then
    waits for them at the end.
    """
    here, work, tasks = "sla2_eval.grid.ablation", out / "work", {}

    def add(task: str, step: str, needs: Sequence[str | None], **arguments: Any) -> str:
        if task not in tasks:
            known = tuple(need for need in needs if need)
            given = {"step": step, "settings": settings, **arguments}
            tasks[task] = Task(f"{here}:run_task", given, known)
        return task

    data = add("data", "data", [], work=work)

    def full(seed: int) -> list[str]:
        named = [f"{_share(REFERENCE, share)}, seed {seed}" for share in range(SHARES)]
        return [
            add(name, "full", [], out=out, seed=seed, share=share)
            for share, name in enumerate(named)
        ]

    def place(cell: Cell) -> tuple[int, bool]:
        return settings.seeds.index(cell.seed), cell.tuned is None

    for cell in sorted(cells(settings), key=place):
        reference = full(cell.seed)
        router = tuned = None
        if cell.router:
            folder = _captures(settings, cell, work).name
            captures = add(folder, "capture", [data], cell=cell, work=work)
            router = add(cell.router, "router", [captures], cell=cell, work=work)
        if cell.tuned:
            tuned = add(cell.tuned, "tune", [data, router], cell=cell, work=work)
        videos = [
            add(
                _share(cell.name, share), "videos", [router, tuned], cell=cell, out=out, share=share
            )
            for share in range(SHARES)
        ]
        add(f"scores {cell.name}", "scores", [*videos, *reference], out=out, name=cell.name)
    every = [name for seed in settings.seeds for name in full(seed)]
    add(f"scores {REFERENCE}", "scores", every, out=out, name=REFERENCE)
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
    out, started = Path(out), time.time()
    if ray_address is not None:
        check_address(ray_address)
    import_modules(settings.imports)
    source = open_source(settings)
    settings = with_shift(settings, source)
    grid, config = cells(settings), sampling(settings)
    requests = requests_of(settings, source, settings.seeds)
    tasks = graph(settings, out)
    metrics_of(settings, source)
    full = out / "videos" / REFERENCE
    generation.open_folder(full, config, {"model": generation.model_fingerprint(settings.model)})
    generation.write_manifest(requests, full, config)
    for cell in grid:
        folder = out / "videos" / cell.name
        generation.open_folder(folder, config, _fingerprint(cell))
        generation.write_manifest(requests_of(settings, source, [cell.seed]), folder, config)
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
        {
            **{"name": REFERENCE, "label": "full attention", "family": "full attention"},
            **{"sparsity": 0.0, "flops": 1.0},
        }
    ]
    for cell in grid:
        row = {"name": cell.name, "label": cell.variant.label, "family": cell.variant.family}
        variants.append({**row, **_measured(out, cell), "seed": cell.seed})
    document = {
        "title": settings.title,
        "settings": settings.model_dump(mode="json"),
        "versions": (
            {name: version(name) for name in ("sla2-eval", "sla2-core", "torch", "diffusers", "av")}
            | {"python": platform.python_version()}
        ),
        "hardware": hardware() | {"dtype": str(_dtype(settings))},
        "variants": variants,
        "reference": REFERENCE,
        "notes": list(notes),
        "lost": lost or {},
    }
    write_atomic(out / "run.json", json.dumps(document, indent=1) + "\n")


def _measured(out: Path, cell: Cell) -> dict[str, float | None]:
    """Sparsity and FLOPs of a variant's block maps; before they are there, what its k% says."""
    path = out / "block_maps" / f"{cell.name}.json"
    maps = json.loads(path.read_text()) if path.exists() else {}
    return {"sparsity": maps.get("sparsity", cell.sparsity), "flops": maps.get("flops")}


def _dtype(settings: AblationSettings) -> Any:
    """What the videos are computed in."""
    import torch

    name, source = settings.generate.dtype, open_source(settings)
    if name == "auto" and not source.tiny:  # as load_generator holds a pipeline
        return torch.bfloat16 if source.device.type == "cuda" else torch.float32
    return generation.autocast_dtype(name, source.device.type) or torch.float32


def table(out: Path) -> list[dict[str, Any]]:
    """One row a variant: means over videos and seeds of every metric, in the order of
    the report.
    """
    from sla2_eval.report.data import gather

    rows = []
    for group in gather(out)["groups"]:
        row = {
            "variant": group["label"],
            "sparsity": None if group["sparsity"] is None else round(group["sparsity"], 4),
            "flops": None if group["flops"] is None else round(group["flops"], 4),
            "seeds": group["num_seeds"],
        }
        rows.append(row | {metric: cell["mean"] for metric, cell in group["metrics"].items()})
    return rows
