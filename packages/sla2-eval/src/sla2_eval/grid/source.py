"""A model to train, whichever it is: the built-in tiny Wan, or a diffusers pipeline whose VAE and
text encoders make videos and captions into training data.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from sla2_core.training.cache import INDEX_NAME, CachedData
from sla2_core.training.data import TensorData
from sla2_core.training.settings import check_same
from sla2_core.training.stage2.objectives import WHOLE
from torch import Tensor, nn

from sla2_eval.generation.defaults import samples_by_rcm
from sla2_eval.generation.sampling import (
    Generator,
    PipelineGenerator,
    TinyGenerator,
    find_model,
    hide_loading_bars,
    load_generator,
)
from sla2_eval.grid.settings import DataSettings, TrainingSettings, VideoSettings
from sla2_eval.runs.progress import Report, silent
from sla2_eval.runs.settings import SettingsError

S = TypeVar("S", bound=TrainingSettings)


class TrainSource(Protocol):
    """A model to train. Each part is loaded when it is first asked for: encoding needs a VAE and
    text encoders, training needs the transformer alone.

    Attributes:
        name: what messages and adapters call it.
        device: where the transformer runs in capture and stage 1; stage 2 places it by itself.
        tiny: whether it is the built-in model or one of its form, whose captions are built in too.
        sigma_range: the noise levels that the model denoises.
    """

    name: str
    device: torch.device
    tiny: bool
    sigma_range: tuple[float, float]

    @property
    def transformer(self) -> nn.Module:
        """The model, its weights in fp32, in eval mode."""
        ...

    @property
    def shift(self) -> float:
        """Of the noise schedule, as the model's own scheduler says."""
        ...

    def encode(self, data: DataSettings, folder: Path, *, report: Report = silent) -> Any:
        """The data set of train_stage2: items {"latents": ..., condition: ...}. What takes long is
        kept in `folder` and not done twice.
        """
        ...

    def encode_video(self, path: Path, prompt: str) -> dict[str, Tensor]:
        """One such item, of a video that the model generated for the prompt."""
        ...


class TinySource:
    """The built-in tiny model, or a folder of one of its form. It works on pixels, on the CPU."""

    tiny = True
    sigma_range = WHOLE

    def __init__(self, name: str, generator: TinyGenerator | None = None):
        self.name, self.device, self._generator = name, torch.device("cpu"), generator

    @functools.cached_property
    def transformer(self) -> nn.Module:
        return (self._generator or load_generator(self.name)).transformer

    @property
    def shift(self) -> float:
        return _shift_of(find_model(self.name))

    def encode(self, data: DataSettings, folder: Path, *, report: Report = silent) -> TensorData:
        from sla2_eval.tiny import model as tiny
        from sla2_eval.tiny.shapes import NUM_FRAMES, SIZE
        from sla2_eval.videos.dataset import read_folder

        videos = data.videos or _write_scenes(data, folder, report)
        found = read_folder(videos, num_frames=NUM_FRAMES, height=SIZE, width=SIZE)
        return TensorData(tiny.to_latents(found.videos), tiny.encode_captions(found.captions))

    def encode_video(self, path: Path, prompt: str) -> dict[str, Tensor]:
        from sla2_eval.tiny import model as tiny
        from sla2_eval.videos.video import read_video

        _, frames, height, width = tiny.LATENT_SHAPE
        up = TinyGenerator.upscale  # each pixel was written so many times in both directions
        pixels = read_video(path).frames.reshape(frames, height, up, width, up, 3).mean((2, 4))
        return {
            "latents": tiny.to_latents(pixels[None])[0],
            "encoder_hidden_states": tiny.encode_captions([prompt])[0],
        }


def _write_scenes(data: DataSettings, folder: Path, report: Report) -> Path:
    """The built-in scenes as captioned mp4 files in `folder`, written once."""
    from sla2_eval.tiny.shapes import FPS, sample
    from sla2_eval.videos.dataset import MANIFEST, write_folder

    def scenes() -> Any:
        for index in range(data.num_videos):
            video, caption = sample(data.seed, index)
            yield (video * 255).round().astype("uint8"), caption
            report("training videos", index + 1, data.num_videos)

    if not (folder / MANIFEST).exists():
        write_folder(folder, scenes(), fps=FPS, upscale=TinyGenerator.upscale)
    return folder


class PipelineSource:
    """A text-to-video or image-to-video pipeline of diffusers, a folder or a hub id, at one size of
    video; of one with two transformers, the `expert` for high noise or for low noise.

    Raises SettingsError, in one line, for one that cannot be trained here.
    """

    tiny = False

    def __init__(
        self, name: str, video: VideoSettings, pipe: Any = None, *, expert: str | None = None
    ):
        from diffusers import DiffusionPipeline

        self.name, self.video, self._pipe = name, video, pipe
        self._place = "transformer_2" if expert == "low" else "transformer"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._parts: Mapping[str, Any] = DiffusionPipeline.load_config(str(find_model(name)))
        kind = self._parts.get("_class_name") or "none"
        for part in ("transformer", "vae"):
            if not _has(self._parts, part):
                raise SettingsError(
                    "model: expected a pipeline with a transformer and a VAE, to train it, got"
                    f" {kind} without {part} in {name}"
                )
        two, boundary = _has(self._parts, "transformer_2"), self._parts.get("boundary_ratio")
        if two and (expert is None or boundary is None):
            lack = "no expert" if expert is None else "no boundary_ratio"
            raise SettingsError(
                f"expert: expected high or low for {kind} with two transformers and a"
                f" boundary_ratio in {name}, got {lack}"
            )
        if expert is not None and not two:
            raise SettingsError(
                f"expert: expected none for {kind} with one transformer in {name}, got {expert}"
            )
        self.sigma_range = WHOLE
        if two and boundary is not None:
            self.sigma_range = (boundary, 1.0) if expert == "high" else (0.0, boundary)

    @functools.cached_property
    def transformer(self) -> nn.Module:
        if self._pipe is not None:
            return getattr(self._pipe, self._place)
        place = {"subfolder": self._place, "torch_dtype": torch.float32}
        return self._class().from_pretrained(str(find_model(self.name)), **place).eval()

    def _class(self) -> Any:
        library, name = self._parts["transformer"]
        return getattr(importlib.import_module(library), name)

    @property
    def shift(self) -> float:
        return _shift_of(find_model(self.name))

    def encode(self, data: DataSettings, folder: Path, *, report: Report = silent) -> CachedData:
        from sla2_eval.videos.encoding import check_videos, encode_folder

        size = self.video.model_dump()
        if (folder / INDEX_NAME).exists():
            check_same(folder / INDEX_NAME, {"settings": {"model": self.name, **size}})
            if data.videos is not None and data.videos.exists():  # they may be gone by now
                check_videos(data.videos, folder)
            return CachedData(folder)
        if data.videos is None:
            raise SettingsError(
                "data.videos: expected a folder of captioned mp4 files to train"
                f" {self.name} on, got none; set it, or give --videos DIR"
            )
        found = encode_folder(
            data.videos,
            self._encoders(),
            folder,
            **size,
            model=self.name,
            progress=lambda done, total: report("training videos", done, total),
        )
        gc.collect()  # the encoders, before the transformer is loaded
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def encode_video(self, path: Path, prompt: str) -> dict[str, Tensor]:
        from sla2_eval.videos.encoding import encode_video

        pipe = self._pipe if self._pipe is not None else self._encoders()
        return encode_video(path, prompt, pipe, **self.video.model_dump())

    def _encoders(self) -> Any:
        """The pipeline with what encodes, in bf16 on a GPU (the VAE in fp32), and of its
        transformer the configuration alone, which some pipelines read.
        """
        # As in generation.sampling: a pipeline may name its scheduler.
        import sla2_core.integrations.rcm  # noqa: F401
        from diffusers import DiffusionPipeline

        place = str(find_model(self.name))
        with torch.device("meta"):
            transformer = self._class().from_config(
                self._class().load_config(place, subfolder="transformer")
            )
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        hide_loading_bars()
        second = {"transformer_2": transformer} if _has(self._parts, "transformer_2") else {}
        pipe = DiffusionPipeline.from_pretrained(
            place,
            transformer=transformer,
            **second,
            torch_dtype={"default": dtype, "vae": torch.float32},
        )
        for part in pipe.components.values():
            if isinstance(part, nn.Module) and part is not transformer:
                part.to(self.device)
        return pipe


def _has(parts: Mapping[str, Any], name: str) -> bool:
    return bool(parts.get(name)) and parts[name][1] is not None


def _shift_of(model: Path | str) -> float:
    """The shift of a model's scheduler; 1 is none."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    # Of any class: this reads the file alone.
    config = FlowMatchEulerDiscreteScheduler.load_config(str(model), subfolder="scheduler")
    if config.get("use_dynamic_shifting"):
        raise SettingsError(
            f"stage2.shift: expected a number for {model}, whose scheduler has another shift for"
            " each length, got none"
        )
    if samples_by_rcm(config):
        raise SettingsError(
            f"stage2.shift: expected a number for {model}, whose scheduler, rCM's, has no shift,"
            " got none"
        )
    return float(config.get("flow_shift", config.get("shift", 1.0)))


def open_source(settings: TrainingSettings) -> TrainSource:
    """The source of the settings' model; nothing large is loaded yet.

    Raises SettingsError for a model that cannot be trained here, or a `video` that does not fit it.
    """
    found = find_model(settings.model)
    if isinstance(found, Path) and not (found / "model_index.json").exists():
        if settings.video is not None:
            raise SettingsError("video: expected none with the tiny model, got a size")
        if settings.expert is not None:
            raise SettingsError(f"expert: expected none for the tiny model, got {settings.expert}")
        return TinySource(settings.model)
    if settings.video is None:
        raise SettingsError(
            f"video: expected num_frames, height and width to train {settings.model} at, got none"
        )
    return PipelineSource(settings.model, settings.video, expert=settings.expert)


def source_of(generator: Generator, settings: TrainingSettings) -> TrainSource:
    """The source around a model that is loaded already, for generation."""
    if isinstance(generator, TinyGenerator):
        return TinySource(settings.model, generator)
    assert isinstance(generator, PipelineGenerator)
    assert settings.video is not None
    return PipelineSource(settings.model, settings.video, generator.pipe, expert=settings.expert)


def with_shift(settings: S, source: TrainSource) -> S:
    """The same settings with the model's own shift and noise levels, unless they give them."""
    own: dict[str, Any] = {}
    if not settings.is_given("stage2.shift"):
        own["shift"] = source.shift
    if not settings.is_given("stage2.sigma_range"):
        own["sigma_range"] = source.sigma_range
    stage2 = dataclasses.replace(settings.stage2, **own)
    return settings.model_copy(update={"stage2": stage2})
