"""Settings of training and of grids: the sections of one file, each read into the dataclass of the
part that it is for. The same keys serve the built-in tiny model and diffusers pipelines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainSerializer, PlainValidator, model_validator
from sla2_core.adapter import load_adapter
from sla2_core.attention import SLA2Attention
from sla2_core.config import SLA2Config
from sla2_core.registry import FORMATS, ORDERS
from sla2_core.training.capture import CaptureConfig
from sla2_core.training.settings import check_fields
from sla2_core.training.stage1.train import Stage1Config
from sla2_core.training.stage2.train import Stage2Config
from sla2_core.variants import VARIANTS, build_config

from sla2_eval.generation.sampling import SamplingConfig
from sla2_eval.runs.settings import Settings

# Stand in for the model's sizes, which are not known before it is loaded.
_SIZES = {"head_dim": 128, "num_heads": 8}
_KEYS = ("variant", *(f.name for f in dataclasses.fields(SLA2Config) if f.name not in _SIZES))


class Attention(Mapping[str, Any]):
    """The section `attention:` as it was given, frozen: fields of SLA2Config, and `variant: NAME`.

    Raises ValueError for a key that is neither; head_dim and num_heads are the model's.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)
        if unknown := [key for key in self._values if key not in _KEYS]:
            raise ValueError(f"{unknown[0]}: unknown key; known keys here: {', '.join(_KEYS)}")

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Attention({self._values!r})"

    def config(
        self,
        *,
        head_dim: int = _SIZES["head_dim"],
        num_heads: int = _SIZES["num_heads"],
    ) -> SLA2Config:
        """The configuration for a model of these sizes. Raises ValueError naming the field."""
        return build_config(self._values, head_dim=head_dim, num_heads=num_heads)

    def fields(self) -> dict[str, Any]:
        """Every field of the configuration, less the model's sizes, as JSON can hold them."""
        return {n: v for n, v in self.config().to_dict().items() if n not in _SIZES}

    def changed(self, own: Mapping[str, Any]) -> Attention:
        """With `own` on top. A variant in it also beats the fields below that it sets itself."""
        below = self._values
        if own.get("variant") in VARIANTS:
            base = Attention({"topk": 0.5, **below}).config()
            chosen = VARIANTS[own["variant"]](base)
            below = {k: v for k, v in below.items() if _same(chosen, base, k)}
        return Attention({**below, **own})

    def in_precision(self, precision: str) -> Attention:
        """With another number format, and without the options of the one it had."""
        config = self.config()
        left = FORMATS.get(config.precision).options.keys() - FORMATS.get(precision).options.keys()
        options = {k: v for k, v in self.get("options", {}).items() if k not in left}
        own = {"options": options} if "options" in self._values else {}
        return Attention({**self._values, **own, "precision": precision})

    def order(self) -> dict[str, Any]:
        """The keys of this section that say in which order tokens are cut into blocks."""
        config = self.config()
        order = ORDERS.get(config.token_order)
        found = {
            "token_order": config.token_order,
            **{n: getattr(config, n) for n in order.settings},
        }
        if order.options:
            found["options"] = {name: config.options[name] for name in order.options}
        return found

    def learns_in_stage1(self) -> bool:
        """Whether stage 1 has anything to train, as the chosen members say."""
        members = SLA2Attention(self.config()).members().values()
        return any("stage1" in m.stages and any(True for _ in m.parameters()) for m in members)


def _same(chosen: SLA2Config, base: SLA2Config, key: str) -> bool:
    return key == "variant" or getattr(chosen, key) == getattr(base, key)


def _attention(values: Any) -> Attention:
    if not isinstance(values, Mapping):
        raise ValueError(f"expected keys and values, got {type(values).__name__}")
    found = Attention(values)
    # A grid's base may leave k% to its variants.
    Attention({"topk": 0.5, **found}).config()
    return found


AttentionSection = Annotated[
    Attention, PlainValidator(_attention), PlainSerializer(dict, return_type=dict)
]


class VideoSettings(Settings):
    """The size of training videos and of generated ones, in frames and pixels."""

    num_frames: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)


class DataSettings(Settings):
    """Captioned videos to train on: a folder, or, for the tiny model, `num_videos` of the built-in
    scenes, written as mp4 files.
    """

    videos: Path | None = None
    num_videos: int = Field(256, ge=1)
    seed: int = Field(1, ge=0)


@dataclass(frozen=True, kw_only=True)
class CaptureSettings(CaptureConfig):
    """What to capture for stage 1, and in how many forward passes, whose noise levels are spread
    over the schedule.
    """

    samples: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, {"an integer >= 1": ("samples",)})

    def config(self) -> CaptureConfig:
        """Without `samples`."""
        names = (field.name for field in dataclasses.fields(CaptureConfig))
        return CaptureConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(SamplingConfig):
    """Sampling of every variant of a grid: the first `num_prompts` of `prompts` (None: the tiny
    model's built-in scenes), with `names` and `info` as read_prompts takes them.
    """

    prompts: Path | None = None
    names: Path | None = None
    info: Path | None = None
    num_prompts: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, {"an integer >= 1": ("num_prompts",)})

    def config(self, video: VideoSettings | None) -> SamplingConfig:
        """Without the prompts; sizes that are not set are those of `video`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingConfig)}
        sizes = {} if video is None else video.model_dump()
        return SamplingConfig(**values | {k: v for k, v in sizes.items() if values[k] is None})


class TrainingSettings(Settings):
    """What is trained, on what, and how.

    `imports`: modules that register members of their own, imported in every process. `model`:
    "tiny", a folder or a hub id. `video`: the size to train at, for pipelines. `expert`: which of
    the two transformers of a Wan2.2 A14B, "high" or "low": it is trained on its own noise levels.
    The seed of both stages is set beside them; `stage2.shift` and `stage2.sigma_range` are the
    model's own unless they are given.
    """

    imports: tuple[str, ...] = ()
    model: str = "tiny"
    video: VideoSettings | None = None
    expert: Literal["high", "low"] | None = None
    attention: AttentionSection
    data: DataSettings = DataSettings()
    capture: CaptureSettings = CaptureSettings()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()

    @model_validator(mode="after")
    def _seeds_are_set_once(self) -> Self:
        for section in ("stage1", "stage2"):
            if self.is_given(f"{section}.seed"):
                raise ValueError(
                    f"{section}.seed: expected none, since both stages have the run's seed"
                )
        return self


class TrainSettings(TrainingSettings):
    """`sla2 train router` and `sla2 train finetune`."""

    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _attention_is_whole(self) -> Self:
        _checked(self.attention, "attention")
        return self


class VariantSettings(Settings):
    """One variant of a grid: what differs from the base, and how it is trained.

    `train_precision` is the sparse branch's precision in stage 2; None trains in the precision it
    runs in (QAT). `adapter`: the folder of a trained adapter, whose attention takes the place of
    the base's; `attention` may then hold what may change after training (config.CHANGEABLE), and
    nothing is trained. `start`: the folder of a trained adapter that stage 2 goes on from, in place
    of the model's own weights and of stage 1. `stage2` holds what differs in the variant's own
    stage 2, such as the loss that its paper trains with.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    label: str
    family: str
    attention: dict[str, Any] = Field(default_factory=dict)
    train_precision: str | None = None
    finetune: bool = True
    adapter: Path | None = None
    start: Path | None = None
    stage2: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _start_is_trained_further(self) -> Self:
        if self.start is not None and (self.adapter is not None or not self.finetune):
            other = "adapter" if self.adapter is not None else "finetune: false"
            raise ValueError(f"start: expected a variant that is trained, got {other} beside it")
        return self

    def own_stage2(self, base: Stage2Config) -> Stage2Config:
        """The grid's stage 2 with this variant's changes. Raises ValueError naming the key."""
        known = [field.name for field in dataclasses.fields(Stage2Config) if field.name != "seed"]
        if unknown := [key for key in self.stage2 if key not in known]:
            raise ValueError(f"{unknown[0]}: expected one of {', '.join(known)}, got another key")
        return dataclasses.replace(base, **self.stage2)


class AblationSettings(TrainingSettings):
    """`sla2 ablate` and `sla2 quickstart`: a grid of variants over seeds, each compared with full
    attention.

    `keep_targets`: in stage 2 with loss="distill" the predictions of full attention are written
    to the run's folder, once a seed, and read by all variants.
    """

    title: str = "SLA2 ablation"
    attention: AttentionSection = Attention({})
    seeds: tuple[int, ...] = (0,)
    generate: GenerateSettings = GenerateSettings()
    metrics: tuple[str, ...] | None = None
    workers: int = Field(2, ge=0)
    keep_targets: bool = False
    variants: tuple[VariantSettings, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _both_experts_make_the_videos(self) -> Self:
        if self.expert is not None:
            raise ValueError(
                "expert: expected none in a grid, whose videos both transformers make, got"
                f" {self.expert}; sla2 train finetune trains one"
            )
        return self

    @model_validator(mode="after")
    def _variants_are_whole(self) -> Self:
        for number, variant in enumerate(self.variants):
            where = f"variants.{number} ({variant.name})"
            if variant.adapter is not None:  # its file is read by attention_of
                continue
            try:
                attention = self.attention_of(variant)
            except ValueError as error:
                raise ValueError(f"{where}: attention.{error}") from None
            _checked(attention, f"{where}: attention")
            try:
                variant.own_stage2(self.stage2)
            except ValueError as error:
                raise ValueError(f"{where}: stage2.{error}") from None
            if variant.train_precision is not None:
                try:
                    FORMATS.get(variant.train_precision)
                except ValueError as error:
                    raise ValueError(f"{where}: train_{error}") from None
        return self

    def attention_of(self, variant: VariantSettings) -> Attention:
        """The attention of a variant: the base's with the variant's own on top, or its adapter's.

        Raises:
            FileNotFoundError, ValueError: an adapter that cannot be read, or a field that may not
                change.
        """
        if variant.adapter is None:
            return self.attention.changed(variant.attention)
        found = load_adapter(variant.adapter).config.changed(**variant.attention)
        return Attention({n: v for n, v in found.to_dict().items() if n not in _SIZES})


def _checked(attention: Attention, where: str) -> None:
    try:
        attention.config()
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
