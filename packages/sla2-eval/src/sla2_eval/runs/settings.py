"""YAML settings of the commands, validated: an unknown key or a wrong value is one line that names
the file and the key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class SettingsError(ValueError):
    """Settings that cannot be used; the message is one line that names the file and the key."""


class Settings(BaseModel):
    """A section of a settings file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AttentionSettings(Settings):
    """Fields of SLA2Config that a settings file may set; head_dim and num_heads come from the
    model.
    """

    topk: float = Field(0.03, gt=0, le=1)
    block_q: int = Field(32, ge=1)
    block_k: int = Field(16, ge=1)
    method: Literal["sla2", "sla"] = "sla2"
    router: Literal["learned", "heuristic"] = "learned"
    per_head_router: bool = False
    alpha: Literal["position", "mass", "one"] = "position"
    alpha_knots: int = Field(16, ge=1)
    alpha_per_head: bool = True
    alpha_init: float = Field(0.8, gt=0, lt=1)
    tau: float = Field(0.1, gt=0)
    smooth_k: bool = True
    precision: Literal["full", "int8", "int8_int8", "fp8", "int4", "nvfp4"] = "full"
    qat_backward: Literal["paper", "matched"] = "paper"
    backend: Literal["auto", "reference", "cpu", "cuda", "emulator"] = "auto"


class DataSettings(Settings):
    """Captioned videos to train on: a folder, or `num_videos` of the built-in scenes, written as
    mp4 files.
    """

    videos: Path | None = None
    num_videos: int = Field(256, ge=1)
    seed: int = Field(1, ge=0)


class CaptureSettings(Settings):
    """How many forward passes, at random noise levels, give the Q, K, V of stage 1."""

    samples: int = Field(8, ge=1)
    seed: int = Field(0, ge=0)


class Stage1Settings(Settings):
    """Router and alpha against full attention's output, on captured Q, K, V."""

    steps: int = Field(60, ge=1)
    topk: tuple[float, ...] = (0.03, 0.05, 0.1)


class Stage2Settings(Settings):
    """Fine-tuning of the model and alpha, router frozen."""

    steps: int = Field(60, ge=1)
    batch_size: int = Field(4, ge=1)
    learning_rate: float = Field(1e-4, ge=0)
    alpha_learning_rate: float = Field(1e-3, ge=0)
    warmup: int = Field(10, ge=0)
    decay: Literal["constant", "cosine"] = "cosine"
    loss: Literal["diffusion", "distill"] = "diffusion"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    checkpoint_every: int = Field(50, ge=1)


class SamplingSettings(Settings):
    """How videos are sampled: Euler steps, classifier-free guidance, and how many
    videos at a time.
    """

    steps: int = Field(20, ge=1)
    guidance: float = Field(2.0, ge=0)
    batch_size: int = Field(4, ge=1)
    seed: int = Field(0, ge=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class GridSettings(SamplingSettings):
    """Sampling of every variant of a grid: the first `num_prompts` lines of `prompts` (None: the
    built-in scenes).
    """

    prompts: Path | None = None
    num_prompts: int = Field(24, ge=1)


class VariantSettings(Settings):
    """One variant of a grid: what differs from the base, and how it is trained.

    `train_precision` is the sparse branch's precision in stage 2; None trains in the precision it
    runs in (QAT).
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    label: str
    family: str
    attention: dict[str, object] = {}
    train_precision: Literal["full", "int8", "int8_int8", "fp8", "int4", "nvfp4"] | None = None
    finetune: bool = True


class AblationSettings(Settings):
    """`sla2 ablate` and `sla2 quickstart`: a grid of variants over seeds, each compared with full
    attention.
    """

    title: str = "SLA2 ablation"
    model: str = "tiny"
    seeds: tuple[int, ...] = (0,)
    attention: AttentionSettings = AttentionSettings()
    data: DataSettings = DataSettings()
    capture: CaptureSettings = CaptureSettings()
    stage1: Stage1Settings = Stage1Settings()
    stage2: Stage2Settings = Stage2Settings()
    generate: GridSettings = GridSettings()
    metrics: tuple[str, ...] | None = None
    workers: int = Field(2, ge=0)
    variants: tuple[VariantSettings, ...] = Field(min_length=1)


class TeacherSettings(Settings):
    """`sla2 train teacher`: fields of TeacherConfig, and a folder of captioned videos instead of
    the built-in scenes.
    """

    videos: Path | None = None
    num_videos: int = Field(6000, ge=1)
    seed: int = Field(0, ge=0)
    steps: int = Field(6000, ge=1)
    batch_size: int = Field(8, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    warmup: int = Field(100, ge=1)
    cooldown: int = Field(2000, ge=1)
    weight_decay: float = Field(0.01, ge=0)
    caption_dropout: float = Field(0.1, ge=0, le=1)
    ema: float = Field(0.999, ge=0, lt=1)
    checkpoint_every: int = Field(250, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class TrainSettings(Settings):
    """`sla2 train router` and `sla2 train finetune`: model, operator, data, and both stages."""

    model: str = "tiny"
    seed: int = Field(0, ge=0)
    attention: AttentionSettings = AttentionSettings()
    data: DataSettings = DataSettings()
    capture: CaptureSettings = CaptureSettings()
    stage1: Stage1Settings = Stage1Settings()
    stage2: Stage2Settings = Stage2Settings()


Model = TypeVar("Model", bound=Settings)


def _known_keys(model: type[BaseModel], location: tuple) -> list[str]:
    """Keys of the section that holds the last part of `location`."""
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def validate(values: object, model: type[Model], where: str) -> Model:
    """`values` as `model`. Raises SettingsError, one line beginning with `where`, for the first
    thing that is wrong.
    """
    if not isinstance(values, dict):
        raise SettingsError(f"{where}: expected keys and values, got {type(values).__name__}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(_known_keys(model, first["loc"]))
            raise SettingsError(f"{where}: {key}: unknown key; known keys here: {known}") from None
        if first["type"] == "missing":
            raise SettingsError(f"{where}: {key}: expected a value, got none") from None
        message = first["msg"][0].lower() + first["msg"][1:]
        raise SettingsError(
            f"{where}: {key}: {message}, got {str(first['input'])[:80]!r}"
        ) from None


def load_settings(path: str | Path, model: type[Model]) -> Model:
    """Read a YAML file as `model`; relative paths in it are resolved against its folder.

    Raises SettingsError naming the file, and the line or key, if it is missing, not YAML, or holds
    unknown or wrong values.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: expected a YAML file, got nothing there") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: expected a YAML file, got {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise SettingsError(f"{path}{line}: expected YAML, got: {problem}") from None
    settings = validate({} if values is None else values, model, str(path))
    return _resolve_paths(settings, path.parent)


def _resolve_paths(settings: Model, folder: Path) -> Model:
    """The same settings with each relative path taken from `folder`."""
    changed: dict[str, object] = {}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Path) and not value.is_absolute():
            changed[name] = folder / value
        elif isinstance(value, Settings):
            changed[name] = _resolve_paths(value, folder)
    return settings.model_copy(update=changed)
