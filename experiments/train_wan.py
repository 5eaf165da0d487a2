"""SLA2 on Wan2.1: encode a folder of captioned videos, capture Q, K, V, stage 1, stage 2. Each part
is done once.

python experiments/train_wan.py --config experiments/wan2.1_1.3b/train.yaml --videos DIR --out DIR
For stage 2 on several GPUs: the same with --until stage1 on one of them, then
accelerate launch experiments/train_wan.py --config ... --out DIR
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from sla2_core import SLA2Config
from sla2_core.integrations.diffusers import SLA2Handle, apply_sla2
from sla2_core.training.cache import INDEX_NAME, CachedData
from sla2_core.training.capture import CaptureConfig, capture
from sla2_core.training.settings import check_same
from sla2_core.training.stage1.train import (
    REPORT_NAME,
    SETTINGS_NAME,
    Stage1Config,
    load_stage1,
    train_stage1,
)
from sla2_core.training.stage2.objectives import draw_sigma, noisy_and_target
from sla2_core.training.stage2.train import Stage2Config, train_stage2


class Settings(NamedTuple):
    """A settings file: one section for each part, `samples` and what else capture takes apart."""

    model: str
    video: dict[str, int]
    attention: SLA2Config
    samples: int
    capture: CaptureConfig
    stage1: Stage1Config
    stage2: Stage2Config


def read_settings(path: Path) -> Settings:
    """Read and check all of a settings file, before hours of work. Raises ValueError naming the
    file and the section.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path}: expected a YAML file, got: {' '.join(str(error).split())}"
        ) from None
    sections = ("model", "video", "attention", "capture", "stage1", "stage2")
    if not isinstance(given, dict) or set(given) != set(sections):
        found = ", ".join(map(str, given)) if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"{path}: expected the sections {', '.join(sections)}, got {found}")

    def build(section: str, make) -> Any:
        try:
            return make(**given[section])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {section}: {error}") from None

    def video(num_frames: int, height: int, width: int) -> dict[str, int]:
        return {"num_frames": num_frames, "height": height, "width": width}

    def captures(samples: int, **others) -> tuple[int, CaptureConfig]:
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples: expected an integer >= 1, got {samples!r}")
        return samples, CaptureConfig(**others)

    samples, capture_config = build("capture", captures)
    return Settings(
        model=str(given["model"]),
        video=build("video", video),
        attention=build("attention", SLA2Config),
        samples=samples,
        capture=capture_config,
        stage1=build("stage1", Stage1Config),
        stage2=build("stage2", Stage2Config),
    )


def show(part: str):
    """A progress callback that prints a line every 10 steps."""

    def progress(step: int, total: int, metrics: dict | None = None) -> None:
        if step % 10 == 0 or step == total:
            numbers = "".join(f"  {name} {value:.4g}" for name, value in (metrics or {}).items())
            print(f"{part} {step}/{total}{numbers}", flush=True)

    return progress


def encoded(settings: Settings, videos: str | None, folder: Path) -> CachedData:
    """The cached latents and text embeddings; made from `videos` with the model's VAE and text
    encoder if absent.
    """
    index = folder / INDEX_NAME
    if index.exists():
        check_same(index, {"settings": {"model": settings.model, **settings.video}})
        return CachedData(folder)
    if videos is None:
        raise ValueError(
            f"--videos: expected a folder of captioned mp4 files, since {folder} holds no encoded"
            " data"
        )
    from diffusers import WanPipeline
    from sla2_eval.videos.encoding import encode_folder

    pipe = WanPipeline.from_pretrained(settings.model, transformer=None, torch_dtype=torch.bfloat16)
    pipe.vae.to(torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    return encode_folder(
        videos, pipe, folder, **settings.video, model=settings.model, progress=show("encode")
    )


def train(settings: Settings, videos: str | None, out: Path, until: str = "stage2") -> Path:
    """All parts up to `until`; returns the folder of the last one's result."""
    from diffusers import WanTransformer3DModel

    router = out / "stage1"
    finished = (router / REPORT_NAME).exists()
    if finished:
        check_same(router / SETTINGS_NAME, {"config": asdict(settings.stage1)})
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not finished:
        raise ValueError(
            f"--out: expected a finished stage 1 in {out} for several processes, run --until stage1"
            " on one"
        )
    data = encoded(settings, videos, out / "data")
    transformer = WanTransformer3DModel.from_pretrained(settings.model, subfolder="transformer")
    handle = apply_sla2(transformer, settings.attention, base_model=settings.model)
    if finished:
        load_stage1(handle, router)
    else:
        first_stage(handle, data, settings, out)
    if until == "stage1":
        return handle.save(router / "adapter")
    return Path(
        train_stage2(
            handle, data, settings.stage2, out / "stage2", progress=show("stage 2")
        ).adapter
    )


def first_stage(handle: SLA2Handle, data: CachedData, settings: Settings, out: Path) -> None:
    """Capture Q, K, V at the noise levels of stage 2, and fit router and alpha to them."""
    transformer, stage2 = handle.transformer, settings.stage2
    transformer.to(
        "cuda" if torch.cuda.is_available() else "cpu"
    )  # accelerate places, or shards, it for stage 2

    def run(sample: int) -> None:
        rng = np.random.default_rng([stage2.seed, 5, sample])
        item = data[int(rng.integers(len(data)))]
        clean, text = (
            item[name][None].to(transformer.device) for name in ("latents", "encoder_hidden_states")
        )
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32)).to(
            clean.device
        )
        sigma = draw_sigma(rng, 1, stage2.sigma, stage2.shift).to(clean.device)
        with torch.autocast(clean.device.type, torch.bfloat16):
            handle.family.predict(
                transformer,
                noisy_and_target(clean, noise, sigma)[0],
                sigma,
                {"encoder_hidden_states": text},
            )

    captures = capture(
        handle,
        run,
        out / "captures",
        samples=settings.samples,
        config=settings.capture,
        progress=show("capture"),
    )
    train_stage1(handle, captures, settings.stage1, out / "stage1", progress=show("stage 1"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, help="settings, e.g. experiments/wan2.1_1.3b/train.yaml"
    )
    parser.add_argument(
        "--videos",
        help="folder of mp4 files with captions (metadata.jsonl, or NAME.txt beside NAME.mp4)",
    )
    parser.add_argument(
        "--out", required=True, help="folder for everything made on the way, and the adapter"
    )
    parser.add_argument(
        "--until", choices=("stage1", "stage2"), default="stage2", help="the last part to run"
    )
    given = parser.parse_args(arguments)
    try:
        print(train(read_settings(Path(given.config)), given.videos, Path(given.out), given.until))
    except (ValueError, OSError, RuntimeError, FloatingPointError, ModuleNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
