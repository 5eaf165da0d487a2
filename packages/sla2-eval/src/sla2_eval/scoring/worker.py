"""Scores one video: decodes it once, runs all its metrics, returns plain data. Runs in a worker of
a pool, which may die.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sla2_eval.parallel.cluster import local_gpus
from sla2_eval.runs.progress import Report, silent
from sla2_eval.scoring import metrics
from sla2_eval.scoring.metrics.base import LeftOut, MetricUnavailable, Sample

if TYPE_CHECKING:
    import numpy as np

    from sla2_eval.videos.video import Video


def pack(features: np.ndarray) -> dict:
    """Float features (n, d) as plain data."""
    import numpy as np

    array = np.ascontiguousarray(features, dtype="<f4")
    if array.ndim != 2 or not np.isfinite(array).all():
        raise ValueError(
            f"features: expected finite float (n, d), got {array.shape} with non-finite values or"
            " another shape"
        )
    return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode()}


def unpack(packed: dict) -> np.ndarray:
    """The float32 features (n, d) that `pack` was given."""
    import numpy as np

    return np.frombuffer(base64.b64decode(packed["float32"]), dtype="<f4").reshape(packed["shape"])


def one_line(error: BaseException) -> str:
    """The first line of an error's message, its type where it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:500]


def _decode(path: str, decoder: str, errors: dict[str, str]) -> Video | None:
    """The video, or None and its error under "*"."""
    from sla2_eval.videos.video import read_video

    try:
        return read_video(path, decoder)
    except Exception as error:
        errors["*"] = one_line(error)
        return None


def _check_pair(path: str, video: Video, reference: Video) -> None:
    """Raise VideoError if the two differ in length, size or frame rate."""
    from sla2_eval.videos.video import VideoError

    if video.frames.shape != reference.frames.shape or abs(video.fps - reference.fps) > 0.01:
        sizes = [
            f"{v.frames.shape[0]} frames of {v.frames.shape[1]} x {v.frames.shape[2]} at {v.fps:g}"
            " a second"
            for v in (reference, video)
        ]
        raise VideoError(f"{path}: expected its reference's {sizes[0]}, got {sizes[1]}")


class Worker:
    """Holds the loaded metrics of one process."""

    def __init__(
        self,
        settings: dict[str, dict],
        device: str,
        decoder: str,
        modules: tuple[str, ...] = (),
    ):
        for module in modules:  # of metrics that are registered in the driver
            metrics.register(module)
        self.settings, self.device, self.decoder = settings, device, decoder
        self.specs = metrics.specs()
        self.scorers: dict = {}

    def _scorer(self, name: str) -> Callable:
        if name not in self.scorers:
            if self.device == "auto":
                self.device = "cuda" if local_gpus() else "cpu"
            self.scorers[name] = metrics.load(name, self.settings.get(name, {}), self.device)
        return self.scorers[name]

    def run(self, task: dict) -> dict:
        """Score one task {"video", "reference", "pair", "prompt", "metrics", "reference_metrics"};
        "pair" holds the two files that paired metrics compare.

        Returns {"results", "reference_results", "errors", "reference_errors", "unavailable"}, each
        by metric; a result is {"value"} (with a "weight" in VBench's total, if that is not 1),
        {"features"} or {"left_out": why}, and an error under "*" is of the file itself. Raises
        nothing that a file or a metric can cause.
        """
        out: dict[str, dict] = {
            "results": {},
            "reference_results": {},
            "errors": {},
            "reference_errors": {},
            "unavailable": {},
        }
        paired = [name for name in task["metrics"] if self.specs[name].kind == "paired"]
        single = [name for name in task["metrics"] if name not in paired]
        encoded = task["pair"] == [task["video"], task["reference"]]
        shared = bool(paired) and encoded  # what is decoded for the pair serves all metrics
        video = reference = None
        sample: Sample | None
        if single or shared:
            video = _decode(task["video"], self.decoder, out["errors"])
        if task["reference_metrics"] or shared:
            reference = _decode(task["reference"], self.decoder, out["reference_errors"])
        if reference:
            sample = Sample(reference.frames, reference.fps, None, task["prompt"])
            self._score(
                sample,
                task["reference_metrics"],
                out["reference_results"],
                out["reference_errors"],
                out["unavailable"],
            )
        if video:
            sample = Sample(video.frames, video.fps, None, task["prompt"])
            self._score(sample, single, out["results"], out["errors"], out["unavailable"])
        if paired and not encoded:
            sample, video, reference = None, None, None  # two videos in memory at a time
            video, reference = self._decode_pair(task["pair"], paired, out)
        if paired and video and reference:
            try:
                _check_pair(task["video"], video, reference)
            except ValueError as error:
                out["reference_errors"]["*"] = one_line(error)
            else:
                sample = Sample(video.frames, video.fps, reference.frames, task["prompt"])
                self._score(sample, paired, out["results"], out["errors"], out["unavailable"])
        return out

    def _decode_pair(
        self, paths: list[str], names: list[str], out: dict[str, dict]
    ) -> tuple[Video | None, Video | None]:
        """The two lossless files; an error of the first is one of each metric in `names`."""
        errors: dict[str, str] = {}
        video = _decode(paths[0], self.decoder, errors)
        reference = _decode(paths[1], self.decoder, out["reference_errors"])
        out["errors"] |= {name: error for error in errors.values() for name in names}
        return video, reference

    def _score(
        self, sample: Sample, names: list[str], results: dict, errors: dict, unavailable: dict
    ) -> None:
        import math

        for name in names:
            spec = self.specs[name]
            try:
                value = self._scorer(name)(sample)
                if spec.kind == "set":
                    results[name] = {"features": pack(value)}
                elif not math.isfinite(value):
                    raise ValueError(f"{name}: expected a finite value, got {value}")
                else:
                    results[name] = {"value": float(value)}
                    if spec.vbench_mean_over == "frame pairs":
                        results[name]["weight"] = len(sample.frames) - 1
            except LeftOut as error:
                results[name] = {"left_out": one_line(error)}
            except MetricUnavailable as error:
                unavailable[name] = one_line(error)
            except Exception as error:
                errors[name] = one_line(error)


_held: tuple[dict, Worker] | None = None  # of this process: what it was made with, and itself


def score_video(task: dict, *, report: Report = silent, **arguments: Any) -> dict:
    """`Worker(**arguments).run(task)` in a worker of a pool, which keeps the Worker, and so its
    models, for the next video.
    """
    global _held
    if _held is None or _held[0] != arguments:
        _held = arguments, Worker(**arguments)
    return _held[1].run(task)
