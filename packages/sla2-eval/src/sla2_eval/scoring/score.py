"""Scores a folder of videos: plans tasks, hands them to workers, survives what fails, and writes
results.json.

The driver alone writes to disk. Results are kept per video in a store, so a rerun does what is
missing; results.json is made from the store alone, in the order of file names, so that it does not
depend on the number of workers or on reruns.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sla2_eval.parallel.cluster import check_address, local_gpus
from sla2_eval.parallel.processes import ProcessPool
from sla2_eval.parallel.ray_pool import RayPool
from sla2_eval.parallel.tasks import ClusterLost, Pool, Task, WorkerDied
from sla2_eval.runs.folders import INPUTS
from sla2_eval.runs.store import ResultStore, digest, file_digest, write_atomic
from sla2_eval.scoring import metrics
from sla2_eval.scoring.metrics import MetricSpec
from sla2_eval.scoring.summary import document
from sla2_eval.scoring.vbench import as_vbench
from sla2_eval.scoring.worker import one_line
from sla2_eval.videos.manifest import Entry, compared, left_out, pair, read_manifest
from sla2_eval.videos.video import check_decoder

ATTEMPTS = 3  # of a video whose worker dies or whose file or metric fails
Progress = Callable[[str, int, int], None]


class ScoringError(RuntimeError):
    """Some videos could not be scored; `results` holds what results.json says, with the reasons
    under "failed".
    """

    def __init__(self, message: str, results: dict):
        super().__init__(message)
        self.results = results


@dataclass
class _Task:
    """One video with its reference, and the metrics it still needs."""

    video: Entry
    reference: Entry | None
    wanted: list[str]
    reference_wanted: list[str]
    side: str = "video"  # "reference": a reference of no video here, scored for set metrics alone
    attempts: int = 0

    @property
    def name(self) -> str:
        return f"{self.side} {self.video.file_name}"

    def narrow(self, known: Container[str]) -> list[str]:
        """Leave out the metrics that turned out to be unavailable; returns those the video itself
        still needed.
        """
        gone = [name for name in self.wanted if name not in known]
        self.wanted = [name for name in self.wanted if name in known]
        self.reference_wanted = [name for name in self.reference_wanted if name in known]
        return gone

    def plain(self) -> dict:
        pair = compared(self.video, self.reference) if self.reference else None
        return {
            "video": str(self.video.path),
            "reference": str(self.reference.path) if self.reference else None,
            "pair": [str(path) for path in pair] if pair else None,
            "prompt": self.video.prompt,
            "metrics": self.wanted,
            "reference_metrics": self.reference_wanted,
        }


class _Run:
    """The state of one call of `score`."""

    def __init__(
        self,
        chosen: dict[str, MetricSpec],
        settings: dict[str, dict],
        decoder: str,
        store: ResultStore,
    ):
        self.settings, self.decoder, self.store = settings, decoder, store
        self.unavailable: dict[str, str] = {}
        self.specs: dict[str, MetricSpec] = {}
        self.weights: dict[str, dict] = {}
        self.sources: dict[str, str] = {}  # sha256 of the modules of metrics from outside
        for name, spec in chosen.items():
            if reason := metrics.why_unavailable(spec, settings.get(name)):
                self.unavailable[name] = reason
                continue
            self.specs[name] = spec
            self.weights[name] = _weight_digests(spec, settings.get(name, {}))
            module = metrics.module_of(name)
            if module.__name__ in metrics.registered() and module.__file__:
                self.sources[name] = file_digest(Path(module.__file__))
        self.digests: dict[Path, str] = {}
        self.failures: dict[
            tuple[str, str, str], str
        ] = {}  # (side, file name, metric or "*") -> error
        self.results: dict[tuple[str, str, str], dict] = {}  # (side, file name, metric) -> result

    def used_settings(self, spec: MetricSpec) -> dict:
        """What a result depends on beside the video: all settings, with file contents in place of
        file names.
        """
        given = {
            k: v
            for k, v in self.settings.get(spec.name, {}).items()
            if k not in ("files", "digests")
        }
        used = {
            **spec.settings,
            **given,
            "revision": spec.revision,
            "weights": self.weights[spec.name],
        }
        return used if self.decoder == "pyav" else {**used, "decoder": self.decoder}

    def key(self, spec: MetricSpec, entry: Entry, reference: Entry | None) -> tuple[str, str, str]:
        """Where the store keeps the result of a metric for a video and, if paired, its
        reference.
        """
        used, path = self.used_settings(spec), entry.path
        if spec.kind == "paired":
            assert reference is not None  # otherwise no paired metric is wanted
            path, other = compared(entry, reference)
            used["reference"] = self.digests[other]
        if spec.needs_prompt:
            used["prompt"] = entry.prompt
        if spec.name in self.sources:  # edited, it scores anew
            used["source"] = self.sources[spec.name]
        return self.digests[path], spec.name, digest(used)

    def read_digest(
        self, side: str, entry: Entry, path: Path | None = None, what: str = "*"
    ) -> bool:
        """Note the sha256 of the entry's file, or of `path` for it; False, and a failure of `what`,
        if it cannot be read.
        """
        path = path or entry.path
        if path not in self.digests:
            try:
                if path.is_fifo():
                    raise OSError("a pipe")  # reading it would wait for ever
                self.digests[path] = file_digest(path)
            except OSError as error:
                reason = (
                    "nothing there"
                    if isinstance(error, FileNotFoundError)
                    else error.strerror or one_line(error)
                )
                self.failures[side, entry.file_name, what] = (
                    f"{path}: expected a video file, got {reason}"
                )
                return False
        return True

    def missing(self, side: str, entry: Entry, reference: Entry | None) -> list[str]:
        """The metrics that the store does not have for this video; those it has are taken."""
        wanted = []
        for name, spec in self.specs.items():
            if spec.kind == "paired" and (side == "reference" or reference is None):
                continue
            stored = self.store.get(*self.key(spec, entry, reference))
            if stored is None:
                wanted.append(name)
            else:
                self.results[side, entry.file_name, name] = stored
        return wanted

    def keep(
        self, side: str, entry: Entry, reference: Entry | None, results: dict[str, dict]
    ) -> None:
        """Store what a worker returned."""
        for name, result in results.items():
            self.store.put(*self.key(self.specs[name], entry, reference), result)
            self.results[side, entry.file_name, name] = result

    def drop(self, name: str, reason: str) -> None:
        """A metric turned out to be unavailable in a worker."""
        self.unavailable[name] = (
            reason if reason.startswith("unavailable") else f"unavailable: {reason}"
        )
        self.specs.pop(name, None)


def _weight_digests(spec: MetricSpec, settings: dict) -> dict[str, str]:
    if not spec.weights:
        return {}
    from sla2_eval.scoring import weights

    return {
        name: file_digest(weights.path_of(name, settings.get("files"))) for name in spec.weights
    }


def _plan(run: _Run, videos: list[Entry], references: list[Entry] | None) -> list[_Task]:
    """Tasks for what the store lacks. A reference is decoded beside its video, or alone where only
    sets want it.
    """
    tasks, paired_names = [], set()
    paired = any(spec.kind == "paired" for spec in run.specs.values())
    for entry, reference in pair(videos, references or []):
        if not run.read_digest("video", entry):
            continue
        if reference:
            paired_names.add(reference.file_name)
        if references is not None and reference is None and paired:
            run.failures["video", entry.file_name, "reference"] = (
                f"{entry.path}: expected a reference video of the same name, got none"
            )
        if reference is not None and not run.read_digest("reference", reference):
            run.failures["video", entry.file_name, "reference"] = run.failures.pop(
                ("reference", reference.file_name, "*")
            )
            reference = None
        comparable = reference
        if reference is not None and paired:
            pixels = compared(entry, reference)
            if not all(run.read_digest("video", entry, path, "reference") for path in pixels):
                comparable = None
        wanted = run.missing("video", entry, comparable)
        reference_wanted = run.missing("reference", reference, None) if reference else []
        if wanted or reference_wanted:
            tasks.append(_Task(entry, reference, wanted, reference_wanted))
    if any(spec.kind == "set" for spec in run.specs.values()):
        for entry in references or []:
            if entry.file_name not in paired_names and run.read_digest("reference", entry):
                wanted = [
                    n for n in run.missing("reference", entry, None) if run.specs[n].kind == "set"
                ]
                if wanted:
                    tasks.append(_Task(entry, None, wanted, [], side="reference"))
    return tasks


def _finish(run: _Run, task: _Task, outcome: dict | WorkerDied) -> bool:
    """Take an outcome; True if the task is to be tried again."""
    task.attempts += 1
    last, side = task.attempts >= ATTEMPTS, task.side
    if isinstance(outcome, WorkerDied):
        if last:
            why = f" ({outcome})" if str(outcome).startswith("exit") else ""
            run.failures[side, task.video.file_name, "*"] = (
                f"{task.video.path}: expected a video that scores, got a worker that died"
                f" {ATTEMPTS} times{why}"
            )
        return not last
    for name, reason in outcome["unavailable"].items():
        run.drop(name, reason)
    known = run.specs.keys()
    run.keep(
        side,
        task.video,
        task.reference,
        {n: r for n, r in outcome["results"].items() if n in known},
    )
    if task.reference:
        run.keep(
            "reference",
            task.reference,
            None,
            {n: r for n, r in outcome["reference_results"].items() if n in known},
        )
    errors, reference_errors = outcome["errors"], outcome["reference_errors"]
    if "*" not in errors:
        unpaired_done = set(outcome["results"]) | set(outcome["unavailable"])
        task.wanted = [name for name in task.wanted if name not in unpaired_done]
        task.reference_wanted = [
            n for n in task.reference_wanted if n not in outcome["reference_results"]
        ]
    if not errors and not reference_errors:
        return False
    if last:
        for name, error in errors.items():
            run.failures[side, task.video.file_name, name] = error
        for name, error in reference_errors.items():
            if name == "*":
                run.failures["video", task.video.file_name, "reference"] = error
            elif task.reference:
                run.failures["reference", task.reference.file_name, name] = error
    return not last


class _Counter:
    """Progress of each metric over the videos."""

    def __init__(
        self, progress: Progress | None, names: Iterable[str], total: int, tasks: list[_Task]
    ):
        self.progress, self.total = progress, total
        waiting = [name for task in tasks if task.side == "video" for name in task.wanted]
        self.done = {name: total - waiting.count(name) - 1 for name in names}
        self.count(self.done)

    def count(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.done:
                self.done[name] += 1
                if self.progress:
                    self.progress(name, self.done[name], self.total)


def _execute(
    run: _Run,
    tasks: list[_Task],
    counter: _Counter,
    device: str,
    num_workers: int | None,
    address: str | None,
) -> tuple[int, int]:
    """Run the tasks; returns how many workers there were at most, and how many died. Failing ones
    go to the end of the queue until their last attempt.
    """
    deaths = 0
    waiting = deque(tasks)
    started: dict[str, _Task] = {}
    held = {"settings": run.settings, "device": device, "decoder": run.decoder}
    needed = {metrics.module_of(name).__name__ for name in run.specs}
    held["modules"] = tuple(name for name in metrics.registered() if name in needed)
    with _open_pool(device, num_workers, address) as pool:
        if device == "cuda" and not pool.gpus:
            raise ValueError("device: expected a GPU that torch can use for 'cuda', got none")
        while waiting or started:
            while waiting and pool.free():
                task = waiting.popleft()
                gone = task.narrow(run.specs)
                if task.side == "video":
                    counter.count(gone)
                if task.wanted or task.reference_wanted:
                    started[task.name] = task
                    arguments = {"task": task.plain(), **held}
                    pool.submit(task.name, Task("sla2_eval.scoring.worker:score_video", arguments))
            if not started:
                break
            try:
                name, outcome = pool.wait()
            except ClusterLost as error:
                kept = f"{len(run.results)} results are in {run.store.root}"
                raise ClusterLost(f"{error}; {kept}") from error
            task = started.pop(name)
            deaths += isinstance(outcome, WorkerDied)
            before = list(task.wanted)
            again = _finish(run, task, outcome)
            if again:
                waiting.append(task)
            if task.side == "video":
                counter.count(name for name in before if not again or name not in task.wanted)
        return pool.places, deaths


def _open_pool(device: str, num_workers: int | None, address: str | None) -> Pool:
    """One process for one worker, because a local Ray takes seconds to start and gives nothing to
    it; Ray for two or more, or on a cluster. All give the same bytes.

    `num_workers` None: a worker for each GPU of the cluster, or of this machine where it has
    several; else one for each CPU of a cluster, and one here.
    """
    gpus = 0 if device == "cpu" else None
    if address is None and num_workers is None and gpus is None and (here := local_gpus()) > 1:
        return RayPool(None, gpus=here)
    if address is None and num_workers in (None, 1):
        return ProcessPool(1)
    return RayPool(address, workers=num_workers, gpus=gpus)


def _chosen(
    names: Iterable[str],
    settings: dict,
    reference: str | Path | None,
    num_workers: int | None,
    device: str,
) -> dict[str, MetricSpec]:
    """The metrics asked for; raises ValueError for a bad argument of `score`."""
    chosen = metrics.select(names, reference=reference is not None)
    metrics.check_settings(settings, chosen)
    if reference is None:
        paired = [name for name, spec in chosen.items() if spec.kind != "unpaired"]
        if paired:
            raise ValueError(f"reference: expected a folder for {', '.join(paired)}, got none")
    whole = isinstance(num_workers, int | None) and not isinstance(num_workers, bool)
    if not whole or (num_workers is not None and num_workers < 1):
        raise ValueError(f"num_workers: expected a whole number of at least 1, got {num_workers!r}")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {device!r}")
    return chosen


def score(
    videos: str | Path,
    reference: str | Path | None = None,
    metrics: Iterable[str] = ("psnr", "ssim", "temporal_flickering"),
    out: str | Path = "scores",
    num_workers: int | None = None,
    ray_address: str | None = None,
    allow_failures: bool = False,
    progress: Progress | None = None,
    *,
    settings: dict[str, dict] | None = None,
    device: str = "auto",
    decoder: str = "pyav",
    store: str | Path | None = None,
    roots: Sequence[str | Path] = (),
) -> dict:
    """Score every video of a folder and return what `out`/results.json then holds.

    The VBench dimensions among them are also in `out`/vbench_eval_results.json, in VBench's form.

    `videos`, `reference`: folders or JSONL manifests, paired by file name. `metrics`: names and
    groups as `metrics.select` takes them. `num_workers`: 1 is a child process, more are Ray actors,
    of the cluster at `ray_address` if given ("auto" finds one); None is one for each GPU of the
    cluster or of this machine, or for each CPU of a cluster without any. `progress(metric, done,
    total)` is called as videos finish. `settings`: by metric, over the metric's defaults.
    `decoder`: "pyav", or "torchcodec" where it is installed and finds an FFmpeg. `store`: where
    results are kept for reruns, `out`/store if not given; several runs may share one.
    `roots`: folders that symbolic links of the videos may lead into.

    Raises ValueError for bad arguments and manifests, OSError if results cannot be written, and
    ScoringError, after results.json is written, if any video failed and `allow_failures` is not
    set.
    """
    started = time.time()
    chosen = _chosen(metrics, settings or {}, reference, num_workers, device)
    check_decoder(decoder)
    if ray_address is not None:
        check_address(ray_address)
    entries = read_manifest(videos, roots)
    references = read_manifest(reference, roots) if reference is not None else None
    if references and Path(videos).is_file() and [len(entries), len(references)] == [1, 1]:
        # Two single files are a pair, whatever they are called.
        references = [replace(references[0], file_name=entries[0].file_name)]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(chosen, settings or {}, decoder, ResultStore(store or out / "store"))
    tasks = _plan(run, entries, references)
    counter = _Counter(progress, run.specs, len(entries), tasks)
    workers = deaths = 0
    if tasks:
        workers, deaths = _execute(run, tasks, counter, device, num_workers, ray_address)
    results = document(run, entries, references, list(chosen))
    sides = {"videos": (videos, entries), "reference": (reference, references)}
    results["left_out"] = {
        side: found
        for side, (place, listed) in sides.items()
        if place is not None and listed is not None and (found := left_out(place, listed))
    }
    inputs = {"videos": videos} | ({} if reference is None else {"reference": reference})
    write_atomic(
        out / INPUTS,
        json.dumps({side: str(Path(path).resolve()) for side, path in inputs.items()}) + "\n",
    )
    write_atomic(
        out / "results.json",
        json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )
    if theirs := as_vbench(results):
        write_atomic(
            out / "vbench_eval_results.json",
            json.dumps(theirs, indent=1, ensure_ascii=False) + "\n",
        )
    else:
        (out / "vbench_eval_results.json").unlink(missing_ok=True)  # of an earlier run
    timing = {
        "seconds": round(time.time() - started, 3),
        "tasks": len(tasks),
        "workers": workers,
        "deaths": deaths,
    }
    write_atomic(out / "timing.json", json.dumps(timing) + "\n")
    if results["failed"] and not allow_failures:
        broken = {row["file_name"] for row in results["failed"]}
        first = results["failed"][0]["error"]
        raise ScoringError(
            f"{len(broken)} of {len(entries)} videos failed, the first with: {first}", results
        )
    return results
