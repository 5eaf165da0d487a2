"""Scores one video: decodes it once, runs all its metrics, returns plain data. Runs in a process
that may die.

`python -m sla2_eval.scoring.worker` reads tasks and writes outcomes as JSON lines on its standard
streams, for the driver of `pools.ProcessPool`; `pools.RayPool` calls `Worker` inside an actor.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from typing import TYPE_CHECKING

from sla2_eval.parallel.cluster import enter, local_gpus
from sla2_eval.scoring import metrics
from sla2_eval.scoring.metrics.base import MetricUnavailable, Sample

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
    """Holds the loaded metrics of one process. Every computation runs on one CPU thread, so that
    sums come out alike.
    """

    def __init__(
        self,
        settings: dict[str, dict],
        device: str,
        decoder: str,
        place: tuple[str, bool] | None = None,
    ):
        """`place`: the driver's, in a worker of Ray's, which starts elsewhere."""
        if place:
            enter(*place)
        for name in (
            "OMP_NUM_THREADS",
            "MKL_NUM_THREADS",
            "OPENBLAS_NUM_THREADS",
            "NUMBA_NUM_THREADS",
        ):
            os.environ[name] = "1"
        self.settings, self.device, self.decoder = settings, device, decoder
        self.specs = metrics.specs()
        self.scorers: dict = {}

    def _scorer(self, name: str):
        if name not in self.scorers:
            if self.device == "auto":
                self.device = "cuda" if local_gpus() else "cpu"
            self.scorers[name] = metrics.load(name, self.settings.get(name, {}), self.device)
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)
        return self.scorers[name]

    def run(self, task: dict) -> dict:
        """Score one task {"video", "reference", "prompt", "metrics", "reference_metrics"}.

        Returns {"results", "reference_results", "errors", "reference_errors", "unavailable"}, each
        by metric; an error under "*" is of the file itself. Raises nothing that a file or a metric
        can cause.
        """
        out = {
            "results": {},
            "reference_results": {},
            "errors": {},
            "reference_errors": {},
            "unavailable": {},
        }
        video = _decode(task["video"], self.decoder, out["errors"])
        reference = None
        if task["reference"]:
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
        if (
            video
            and reference
            and any(self.specs[name].kind == "paired" for name in task["metrics"])
        ):
            try:
                _check_pair(task["video"], video, reference)
            except ValueError as error:
                out["reference_errors"]["*"] = one_line(error)
                reference = None
        if video:
            sample = Sample(
                video.frames, video.fps, reference.frames if reference else None, task["prompt"]
            )
            self._score(sample, task["metrics"], out["results"], out["errors"], out["unavailable"])
        return out

    def _score(
        self, sample: Sample, names: list[str], results: dict, errors: dict, unavailable: dict
    ) -> None:
        import math

        for name in names:
            kind = self.specs[name].kind
            if kind == "paired" and sample.reference is None:
                continue
            try:
                value = self._scorer(name)(sample)
                if kind == "set":
                    results[name] = {"features": pack(value)}
                elif not math.isfinite(value):
                    raise ValueError(f"{name}: expected a finite value, got {value}")
                else:
                    results[name] = {"value": float(value)}
            except MetricUnavailable as error:
                unavailable[name] = one_line(error)
            except Exception as error:
                errors[name] = one_line(error)


def main() -> None:
    """Serve tasks until the input ends. The first line holds the arguments of Worker, and where the
    driver finds modules.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the outcomes
    hello = json.loads(sys.stdin.readline())
    sys.path[:] = hello.pop("path")
    worker = Worker(**hello)
    for line in sys.stdin:
        channel.write(json.dumps(worker.run(json.loads(line))) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
