"""How a model is sampled where nobody says otherwise: as its pipeline's call, its scheduler and its
training say. Read from small files and signatures; no weights are loaded.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Frames a second of the videos that each pipeline's model was trained on, where its call has no
# frame_rate. Wan2.2's 5B model ("expand_timesteps") and CogVideoX 1.5 ("patch_size_t") differ.
_FPS = {
    "WanPipeline": 16.0,
    "CogVideoXPipeline": 8.0,
    "HunyuanVideoPipeline": 24.0,
    "HunyuanVideo15Pipeline": 24.0,
}
# What pipelines call the number of frames of a video.
FRAMES = ("num_frames", "frames", "video_length")
TINY_STEPS, TINY_GUIDANCE = 20, 2.0


@dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """What a model says of its sampling; None where it does not. `images`: whether it makes images
    and no videos. `takes_negative`: whether it takes a negative prompt.
    """

    name: str
    steps: int | None = None
    guidance: float | None = None
    flow_shift: float | None = None
    fps: float | None = None
    images: bool = False
    takes_negative: bool = True

    @property
    def suffix(self) -> str:
        """Of the files that its samples are written to."""
        return ".png" if self.images else ".mp4"


def defaults_of(model: Path | str) -> ModelDefaults:
    """Of a folder or a hub id, as find_model returns it. Raises ValueError naming the model if it
    is no pipeline, OSError if a hub id cannot be fetched.
    """
    if isinstance(model, Path) and not (model / "model_index.json").exists():
        from sla2_eval.tiny.shapes import FPS

        shift = _shift(config_of(model, "scheduler"))
        return ModelDefaults(
            name="the tiny model",
            steps=TINY_STEPS,
            guidance=TINY_GUIDANCE,
            flow_shift=shift,
            fps=FPS,
            takes_negative=False,
        )
    import diffusers

    index = config_of(model, None)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(
            f"model: expected a pipeline, whose model_index.json has _class_name, got {model}"
        )
    scheduler = config_of(model, "scheduler")
    kind = getattr(diffusers, name, None)
    given = {} if kind is None else _call_defaults(kind)
    if samples_by_rcm(scheduler):  # of a model distilled to a few steps
        given |= {"num_inference_steps": 1 + len(scheduler["mid_timesteps"]), "guidance_scale": 1.0}
    return ModelDefaults(
        name=name,
        steps=given.get("num_inference_steps"),
        guidance=given.get("guidance_scale"),
        flow_shift=_shift(scheduler),
        fps=fps_of(name, given, index, config_of(model, "transformer")),
        images=kind is not None and frames_argument(given) is None,
        takes_negative=kind is None or "negative_prompt" in given,
    )


def frames_argument(arguments: Iterable[str]) -> str | None:
    """Which of a call's arguments is the number of frames; None for a model of images."""
    return next((name for name in FRAMES if name in arguments), None)


def _call_defaults(kind: type) -> dict[str, Any]:
    """{argument of a pipeline's call: its default}."""
    parameters = inspect.signature(kind.__call__).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def fps_of(
    name: str, call: Mapping[str, Any], index: Mapping[str, Any], transformer: Mapping[str, Any]
) -> float | None:
    """Frames a second of a pipeline: of its class's name, the defaults of its call, and the
    configurations of itself and its transformer.
    """
    if isinstance(rate := call.get("frame_rate", call.get("fps")), int | float):
        return float(rate)
    if index.get("expand_timesteps"):
        return 24.0
    if name == "CogVideoXPipeline" and transformer.get("patch_size_t"):
        return 16.0
    return _FPS.get(name)


def config_of(model: Path | str, part: str | None) -> dict[str, Any]:
    """The configuration of a part of a pipeline (None: of itself), empty if it has none."""
    file = {None: "model_index.json", "scheduler": "scheduler_config.json"}.get(part, "config.json")
    if isinstance(model, Path):
        path = model / (part or ".") / file
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = Path(hf_hub_download(model, file, subfolder=part))
    except LocalEntryNotFoundError as error:  # no network, and nothing kept of an earlier time
        raise OSError(f"model: expected {file} of {model} from the hub, got: {error}") from error
    except EntryNotFoundError:
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def _shift(scheduler: Mapping[str, Any]) -> float | None:
    """The shift of a flow-matching scheduler's configuration; None where it has no single one."""
    key = shift_key(scheduler)
    return None if key is None else float(scheduler[key])


def samples_by_rcm(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is rCM's, as an imported checkpoint has it."""
    return scheduler.get("_class_name") == "RCMScheduler"


def shift_key(scheduler: Mapping[str, Any]) -> str | None:
    """What a scheduler's configuration calls its shift."""
    if scheduler.get("use_dynamic_shifting"):
        return None
    return next((key for key in ("flow_shift", "shift") if key in scheduler), None)


def shifted(scheduler: Any, shift: float | None) -> Any:
    """The scheduler with another shift; itself for None and where it is the same. Raises ValueError
    for one that has none.
    """
    if shift is None:
        return scheduler
    key = shift_key(scheduler.config)
    if key is None:
        raise ValueError(
            f"flow_shift: expected none for {type(scheduler).__name__}, which has no fixed shift,"
            f" got {shift}"
        )
    if scheduler.config[key] == shift:
        return scheduler
    return type(scheduler).from_config(scheduler.config, **{key: shift})
