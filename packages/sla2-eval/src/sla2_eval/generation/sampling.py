"""Videos from prompts: the same noise for every variant of a model, one mp4 file each (png of an
image model), resumable.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sla2_eval.generation.cost import CallCosts
from sla2_eval.generation.defaults import (
    FRAMES,
    TINY_GUIDANCE,
    TINY_STEPS,
    config_of,
    defaults_of,
    frames_argument,
    samples_by_rcm,
    shifted,
)
from sla2_eval.generation.prompts import Prompt, Request, plan
from sla2_eval.runs.folders import note_settings
from sla2_eval.runs.progress import Report, noted, silent
from sla2_eval.runs.store import digest, file_digest, write_atomic
from sla2_eval.videos.image import write_image
from sla2_eval.videos.video import write_video

if TYPE_CHECKING:
    import torch
    from sla2_core.integrations.handle import SLA2Handle
    from torch import nn

MANIFEST = "manifest.jsonl"
LOSSLESS = "lossless"  # folder of the frames before the codec's loss, below that of the videos
SETTINGS = "generation.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How videos are sampled. `dtype` is autocast's; "auto" takes bfloat16 where the processor
    computes it natively. None takes the model's own, as generation/defaults.py finds it.

    `flow_shift`: of the scheduler's noise schedule. `fps`: of the files. `lossless`: each video a
    second time to the bit, for paired metrics.
    """

    steps: int | None = None
    guidance: float | None = None
    flow_shift: float | None = None
    negative_prompt: str | None = None
    fps: float | None = None
    batch_size: int = 4
    seed: int = 0
    dtype: str = "auto"
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    lossless: bool = True

    def __post_init__(self) -> None:
        # Not above: commands that only score import this module, and torch takes seconds.
        from sla2_core.training.settings import check_fields

        own = ("steps", "num_frames", "height", "width")
        check_fields(
            self,
            {
                "an integer >= 1": ("batch_size", *own),
                "an integer >= 0": ("seed",),
                "a number >= 0": ("guidance",),
                "a number > 0": ("flow_shift", "fps"),
                "True or False": ("lossless",),
            },
            optional=(*own, "guidance", "flow_shift", "fps"),
        )
        if not isinstance(self.negative_prompt, str | None):
            raise ValueError(f"negative_prompt: expected a text, got {self.negative_prompt!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")


def resolved(model: str | Path, config: SamplingConfig) -> SamplingConfig:
    """The same with the model's own values where it says them and `config` does not.

    Raises ValueError naming the field for a negative prompt or a shift that the model does not
    take, and for the frame rate of a video model that says none; OSError if a hub id cannot be
    fetched.
    """
    own = defaults_of(find_model(model))
    if config.negative_prompt is not None and not own.takes_negative:
        raise ValueError(
            f"negative_prompt: expected none for {own.name}, which takes none, got one"
        )
    if config.flow_shift is not None and own.flow_shift is None:
        raise ValueError(
            f"flow_shift: expected none for {own.name}, whose scheduler has no fixed shift, got"
            f" {config.flow_shift}"
        )
    if config.num_frames is not None and own.images:
        raise ValueError(
            f"num_frames: expected none for {own.name}, which makes images, got {config.num_frames}"
        )
    names = ("steps", "guidance", "flow_shift", "fps")
    found = replace(
        config,
        **{name: getattr(own, name) for name in names if getattr(config, name) is None},
    )
    if found.fps is None and not own.images:
        raise ValueError(f"fps: expected a number for {own.name}, which does not say its own")
    return found


class Generator(Protocol):
    """A model that turns requests into videos."""

    transformer: nn.Module
    upscale: int  # each pixel is written this many times in both directions
    handles: Sequence[SLA2Handle]  # of the adapters that were loaded; none with full attention

    @property
    def fps(self) -> float | None:
        """Frames per second of its videos, where `config.fps` says no other."""

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> np.ndarray:
        """uint8 (n, T, H, W, 3) RGB."""
        ...


def noise_seed(prompt: str, index: int, seed: int) -> int:
    """The seed of a video's initial noise: a function of these three alone, whatever the batch,
    order or variant.
    """
    return (
        int.from_bytes(hashlib.sha256(f"{seed}|{index}|{prompt}".encode()).digest()[:8], "little")
        >> 1
    )


def autocast_dtype(name: str, device: str = "cpu") -> torch.dtype | None:
    """The torch dtype to compute in, for a value of SamplingConfig.dtype; None is plain float32."""
    import torch
    from sla2_core.training.stage2.train import autocast_dtype

    return autocast_dtype(None if name == "float32" else name, torch.device(device))


class TinyGenerator:
    """The built-in tiny Wan and models of its form: pixel space, caption words, classifier-free
    guidance, Euler steps.
    """

    # 32 x 32 becomes 128 x 128, which spares the small pictures the chroma subsampling of H.264
    upscale = 4

    def __init__(self, transformer: Any, scheduler: Any):
        from sla2_eval.tiny.shapes import FPS

        self.transformer, self.scheduler = transformer.eval(), scheduler
        self.handles: Sequence[SLA2Handle] = ()
        self.fps: float | None = FPS

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> np.ndarray:
        """As Generator.sample; the noise of a request does not depend on the others. Raises
        ValueError for a foreign word.
        """
        import torch

        from sla2_eval.tiny.model import LATENT_SHAPE, encode_captions, to_frames

        for name in ("num_frames", "height", "width", "negative_prompt"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name}: expected none with the tiny model, got {getattr(config, name)}"
                )
        noise = [
            torch.randn(
                LATENT_SHAPE,
                generator=torch.Generator().manual_seed(noise_seed(r.prompt, r.index, r.seed)),
            )
            for r in requests
        ]
        latents, text = torch.stack(noise), encode_captions([r.given for r in requests])
        guidance = TINY_GUIDANCE if config.guidance is None else config.guidance
        guided = guidance != 1.0
        text = torch.cat((text, torch.zeros_like(text))) if guided else text
        dtype = autocast_dtype(config.dtype)
        self.scheduler = shifted(self.scheduler, config.flow_shift)
        self.scheduler.set_timesteps(config.steps or TINY_STEPS)
        for t in self.scheduler.timesteps:
            both = torch.cat((latents, latents)) if guided else latents
            with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
                velocity = self.transformer(both, t.expand(len(both)), text, return_dict=False)[
                    0
                ].float()
            if guided:
                conditional, empty = velocity.chunk(2)
                velocity = empty + guidance * (conditional - empty)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        _check_finite(bool(torch.isfinite(latents).all()), requests)
        return to_frames(latents)


class PipelineGenerator:
    """Any text-to-video or text-to-image diffusers pipeline."""

    upscale = 1

    def __init__(self, pipe: Any, fps: float | None = None):
        self.pipe, self.transformer, self.fps = pipe, pipe.transformer, fps
        self.handles: Sequence[SLA2Handle] = ()
        if type(getattr(pipe, "scheduler", None)).__name__ == "RCMScheduler":
            from sla2_core.integrations.rcm import use_rcm

            use_rcm(pipe)
        call = inspect.signature(type(pipe).__call__).parameters
        self._frames = frames_argument(call) or FRAMES[0]  # of a call that takes anything
        pipe.set_progress_bar_config(disable=not sys.stderr.isatty())

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> np.ndarray:
        """As Generator.sample; noise comes from CPU generators, so it is the same on
        every device.
        """
        import torch

        generators = [
            torch.Generator().manual_seed(noise_seed(r.prompt, r.index, r.seed)) for r in requests
        ]
        given: dict[str, Any] = {
            "num_inference_steps": config.steps,
            "negative_prompt": config.negative_prompt and [config.negative_prompt] * len(requests),
            self._frames: config.num_frames,
            "height": config.height,
            "width": config.width,
        }
        if not hasattr(self.pipe, "guider"):
            given["guidance_scale"] = config.guidance
        elif config.guidance is not None:
            self.pipe.guider = self.pipe.guider.new(guidance_scale=config.guidance)
        if config.flow_shift is not None:
            self.pipe.scheduler = shifted(self.pipe.scheduler, config.flow_shift)
        device = self.pipe.device.type
        dtype = None if config.dtype == "auto" else autocast_dtype(config.dtype, device)
        with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype is not None):
            out = self.pipe(
                prompt=[r.given for r in requests],
                generator=generators,
                output_type="np",
                **{name: value for name, value in given.items() if value is not None},
            )
        frames = np.asarray(
            out.frames if hasattr(out, "frames") else np.asarray(out.images)[:, None]
        )  # an image: one frame
        _check_finite(bool(np.isfinite(frames).all()), requests)
        return (frames * 255).round().astype(np.uint8)


def _check_finite(finite: bool, requests: Sequence[Request]) -> None:
    """Raise FloatingPointError where pixels are NaN or infinite, which as uint8 would look like a
    black video.
    """
    if not finite:
        raise FloatingPointError(
            f"model: expected finite pixels, got NaN or infinity beside {requests[0].prompt!r}"
        )


def load_generator(model: str | Path, adapter: str | Path | None = None) -> Generator:
    """Load "tiny", a folder of a tiny model, a diffusers folder, or a hub id, and an SLA2 adapter
    on top of it.

    Raises ValueError or FileNotFoundError naming the model or adapter if it is none of these or
    they do not fit; OSError if a hub id cannot be fetched.
    """
    generator = _load_model(model)
    if adapter is not None:
        from sla2_core.integrations.loading import apply_adapter

        handles = []
        for transformer, folder in _adapted(generator, Path(adapter)):
            handles.append(apply_adapter(transformer, folder))
            transformer.eval()
        generator.handles = tuple(handles)
    return generator


def _adapted(generator: Generator, adapter: Path) -> list[tuple[nn.Module, Path]]:
    """The transformers of the model and their adapters; those of the two of Wan2.2 A14B lie in
    folders of their names, as one that was imported does.
    """
    second = getattr(getattr(generator, "pipe", None), "transformer_2", None)
    if second is None:
        imported = not (adapter / "sla2_config.json").exists() and (adapter / "transformer")
        return [(generator.transformer, imported if imported and imported.is_dir() else adapter)]
    found = [(generator.transformer, adapter / "transformer"), (second, adapter / "transformer_2")]
    for _, folder in found:
        if not folder.is_dir():
            raise ValueError(
                "adapter: expected an adapter for each of the model's two transformers, got none"
                f" in {folder}"
            )
    return found


def suffix_of(model: str | Path) -> str:
    """Of the files of a model: ".png" for one that makes images."""
    return defaults_of(find_model(model)).suffix


def find_model(model: str | Path) -> Path | str:
    """The folder of a built-in model or of another, or the hub id. Raises ValueError naming the
    model if it is none of these.
    """
    from sla2_eval.tiny.model import NAMES, weights_of

    folder = weights_of(str(model)) if str(model) in NAMES else Path(model)
    if str(model) in NAMES and not folder.is_dir():
        raise ValueError(
            f"model: expected the weights of {str(model)!r} in {folder}, got none; run sla2 train"
            " teacher"
        )
    if not folder.is_dir():
        if folder.exists() or str(model).startswith((".", "/")) or str(model).count("/") != 1:
            raise ValueError(
                f"model: expected one of {', '.join(NAMES)}, a diffusers folder or a hub id"
                f" (owner/name), got {str(model)!r}"
            )
        return str(model)
    if not any(
        (folder / name).is_file() for name in ("model_index.json", "transformer/config.json")
    ):
        raise ValueError(
            f"model: expected model_index.json or transformer/config.json in {folder}, got neither"
        )
    alone = not (folder / "model_index.json").is_file()
    if alone and samples_by_rcm(config_of(folder, "scheduler")):
        raise ValueError(
            f"model: expected a pipeline in {folder}, got a transformer and its sampler; give"
            " sla2 import turbodiffusion the --base of its text encoder and VAE"
        )
    return folder


def _load_model(model: str | Path) -> Generator:
    found = find_model(model)
    if isinstance(found, Path) and not (found / "model_index.json").exists():
        return TinyGenerator(*_load_tiny(found))
    # diffusers takes a scheduler of an imported checkpoint from modules alone that are loaded.
    import sla2_core.integrations.rcm  # noqa: F401
    import torch
    from diffusers import DiffusionPipeline

    hide_loading_bars()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(str(found), torch_dtype=dtype).to(device)
    return PipelineGenerator(pipe, defaults_of(found).fps)


def hide_loading_bars() -> None:
    """Keep the progress bars of from_pretrained out of what is not a terminal."""
    if sys.stderr.isatty():
        return
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()


def _load_tiny(folder: Path) -> tuple[Any, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from sla2_eval.tiny.model import load_transformer

    transformer = load_transformer(folder / "transformer")
    return transformer, FlowMatchEulerDiscreteScheduler.from_pretrained(str(folder / "scheduler"))


def model_fingerprint(model: str | Path) -> dict:
    """What identifies a model: its hub id, or the sha256 of each weights file in its folder (the
    size, above 256 MB). Adapters that lie beside the weights do not count: a new one leaves the
    model as it was.
    """
    folder = find_model(model)
    if isinstance(folder, str):
        return {"id": folder}
    return {"files": folder_digest(folder, without="adapters")}


def folder_digest(folder: Path, without: str | None = None) -> str:
    """A digest of the weights and JSON files of a folder, but for those of its subfolder
    `without`.
    """
    files = {}
    for path in sorted(p for pattern in ("*.safetensors", "*.json") for p in folder.rglob(pattern)):
        if path.relative_to(folder).parts[0] == without:
            continue
        small = path.stat().st_size <= 256 << 20
        files[path.relative_to(folder).as_posix()] = (
            file_digest(path) if small else path.stat().st_size
        )
    return digest(files)


def open_folder(folder: Path, config: SamplingConfig, fingerprint: dict) -> None:
    """Make `folder` and note what it is generated with. Raises ValueError if it holds videos made
    with something else.
    """
    path, found = folder / SETTINGS, [*folder.glob("*.mp4"), *folder.glob("*.png")]
    videos = [file for file in found if not file.name.startswith(".")]
    if videos and not path.exists():
        raise ValueError(
            f"{folder}: expected a new folder or one of generated videos, got"
            f" {videos[0].suffix[1:]} files without {SETTINGS}"
        )
    note_settings(path, {**fingerprint, "sampling": asdict(config)}, replace=not videos)


def write_videos(
    generator: Generator,
    requests: Sequence[Request],
    folder: Path,
    config: SamplingConfig,
    *,
    stage: str = "generate",
    report: Report = silent,
) -> None:
    """Sample the requests whose files are not there yet, `config.batch_size` at a time.

    The batches are those of a run from the start: in low precision a video's last bits depend on
    what stands beside it.
    """
    missing = {request for request in requests if not (folder / request.file_name).exists()}
    done = len(requests) - len(missing)
    report(stage, done, len(requests))
    if not missing:
        return
    fps = config.fps or generator.fps
    if fps is None and any(not request.is_image for request in missing):
        raise ValueError("fps: expected a number for a model that does not say its own, got none")
    for start in range(0, len(requests), config.batch_size):
        batch = requests[start : start + config.batch_size]
        if missing.isdisjoint(batch):
            continue
        with noted(folder, len(batch)) as about, CallCosts(generator.handles) as costs:
            for video, request in zip(generator.sample(batch, config), batch):
                if request in missing:
                    enlarged = video.repeat(generator.upscale, 1).repeat(generator.upscale, 2)
                    _write(enlarged, request, folder, fps, lossless=config.lossless)
                    done += 1
            about.update(costs.summary())
        report(stage, done, len(requests))


def _write(
    frames: np.ndarray, request: Request, folder: Path, fps: float | None, *, lossless: bool
) -> None:
    """The file of a request; last, because it says that the request is done."""
    if request.is_image:
        if len(frames) != 1:
            raise ValueError(
                f"{request.file_name}: expected one picture of an image model, got {len(frames)}"
                " frames"
            )
        write_image(folder / request.file_name, frames[0])
        return
    assert fps is not None  # checked before anything was sampled
    if lossless:
        (folder / LOSSLESS).mkdir(exist_ok=True)
        write_video(folder / LOSSLESS / request.file_name, frames, fps, lossless=True)
    write_video(folder / request.file_name, frames, fps)


def write_manifest(requests: Sequence[Request], folder: Path, config: SamplingConfig) -> Path:
    """The manifest that scoring reads, one line a video."""
    rows = []
    for request in requests:
        row: dict[str, Any] = {"file_name": request.file_name, "prompt": request.prompt}
        row |= {"index": request.index, "seed": request.seed}
        if request.text is not None:
            row["text"] = request.text
        if request.dimensions:
            row["dimensions"] = list(request.dimensions)
        if config.lossless and not request.is_image:
            row["lossless"] = f"{LOSSLESS}/{request.file_name}"
        rows.append(row)
    write_atomic(
        folder / MANIFEST, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    return folder / MANIFEST


def generate(
    generator: Generator,
    prompts: Sequence[str | Prompt],
    folder: str | Path,
    *,
    config: SamplingConfig | None = None,
    indices: Sequence[int] | None = (0,),
    suffix: str = ".mp4",
    fingerprint: dict | None = None,
    stage: str = "generate",
    report: Report = silent,
) -> Path:
    """Write `{prompt}-{index}.mp4` for each prompt and index, and the manifest; finished files are
    not done twice.

    Two calls with the same prompts, indices and `config.seed` start from the same noise, whatever
    the model. Returns the manifest's path.

    Args:
        indices: numbers of the videos of each prompt; None: as many as its benchmark asks for.
        suffix: of the files, as suffix_of finds it.
        fingerprint: JSON-able description of model and variant; a folder takes one fingerprint and
            one `config` only.

    Raises:
        ValueError: a repeated prompt, or a folder generated with other settings.
        OSError: the folder cannot be written.
    """
    config, folder = config or SamplingConfig(), Path(folder)
    requests = plan(prompts, indices, config.seed, suffix=suffix)
    open_folder(folder, config, fingerprint or {})
    write_videos(generator, requests, folder, config, stage=stage, report=report)
    return write_manifest(requests, folder, config)


def can_write(folder: str | Path, option: str) -> Path:
    """Make `folder` if need be. Raises ValueError naming `option` if files cannot be
    written there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{option}: expected a folder that can be written, got {folder} ({error.strerror})"
        ) from None
    return folder
