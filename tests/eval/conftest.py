"""Small real mp4 files for the tests of scoring and of the report."""

import json

import numpy as np
import pytest


def clip(
    seed: int, frames: int = 5, height: int = 48, width: int = 64, noise: float = 0.0
) -> np.ndarray:
    """A moving pattern, uint8 (frames, height, width, 3), with noise on top if asked."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 6, 3)
    video = np.stack(
        [
            [np.sin((x + 2 * t) / 7 + p) * np.cos((y + seed) / 5 - p) for p in phase]
            for t in range(frames)
        ]
    ).transpose(0, 2, 3, 1)
    video = 127 + 90 * video + noise * rng.normal(size=video.shape)
    return np.clip(video, 0, 255).astype(np.uint8)


@pytest.fixture
def make_folder(tmp_path):
    """make_folder(name, count, noise=0, ...) writes {prompt}-0.mp4 files and a manifest, and
    returns the folder.
    """
    from sla2_eval.videos.manifest import video_name
    from sla2_eval.videos.video import write_video

    def make(name: str, count: int, noise: float = 0.0, fps: float = 8, **size):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = []
        for i in range(count):
            file_name = video_name(f"pattern {i:03d}", 0)
            write_video(folder / file_name, clip(i, noise=noise, **size), fps)
            rows.append(
                json.dumps(
                    {"file_name": file_name, "prompt": f"pattern {i:03d}", "index": 0, "seed": i}
                )
            )
        (folder / "manifest.jsonl").write_text("\n".join(rows) + "\n")
        return folder

    return make


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory):
    """A folder with a random Wan pipeline in model/, two captioned videos of 5 x 32 x 48 in videos/
    and two prompts in prompts.txt.
    """
    from helpers import pipelines
    from sla2_eval.videos.dataset import write_folder

    folder = tmp_path_factory.mktemp("wan")
    pipelines.wan().save_pretrained(folder / "model")
    pixels = [clip(seed, height=32, width=48) for seed in range(2)]
    write_folder(folder / "videos", zip(pixels, ["a red circle", "a blue square moving"]), fps=8)
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    return folder


@pytest.fixture
def wan_training(wan_folder) -> dict:
    """Settings that train next to nothing of the random Wan, whose 12 tokens lie in blocks of 4 and
    of 2.
    """
    return {
        "model": str(wan_folder / "model"),
        "video": {"num_frames": 5, "height": 32, "width": 48},
        "attention": {"topk": 0.5, "block_q": 4, "block_k": 2, "precision": "int8"},
        "data": {"videos": str(wan_folder / "videos")},
        "capture": {"samples": 2, "layers_per_sample": 2, "heads": 1, "dtype": "bfloat16"},
        "stage1": {"steps": 2, "topk": [0.5]},
        "stage2": {"steps": 2, "batch_size": 2, "accumulate": 2, "gradient_checkpointing": True},
    }


@pytest.fixture
def small_grid() -> dict:
    """Settings of a grid of two variants that trains and samples next to nothing; the model is to
    be added.
    """
    return {
        "seeds": [0],
        "attention": {"block_q": 32, "block_k": 16},
        "data": {"num_videos": 6},
        "capture": {"samples": 2},
        "stage1": {"steps": 2, "topk": [0.1], "max_scores": 1 << 22},
        "stage2": {"steps": 3, "batch_size": 1, "checkpoint_every": 1, "autocast": "auto"},
        "generate": {"num_prompts": 2, "steps": 1, "dtype": "float32"},
        "metrics": ["psnr", "temporal_flickering"],
        "variants": [
            {
                "name": "a",
                "label": "A",
                "family": "F",
                "attention": {"topk": 0.1, "precision": "int8"},
            },
            {"name": "b", "label": "B", "family": "F", "attention": {"topk": 0.1}},
        ],
    }


VARIANTS = [
    {"name": "full", "label": "Full attention", "family": "full", "sparsity": 0.0},
    {"name": "sla2-90", "label": "SLA2 90 %", "family": "SLA2", "sparsity": 0.9},
    {"name": "sla2-97-s0", "label": "SLA2 97 %", "family": "SLA2", "sparsity": 0.97, "seed": 0},
    {"name": "sla2-97-s1", "label": "SLA2 97 %", "family": "SLA2", "sparsity": 0.97, "seed": 1},
    {"name": "late", "label": "<b>Not</b> scored", "family": "SLA", "sparsity": 0.97},
]


def results(values: dict[str, list[float]], failed: tuple = ()) -> dict:
    """The part of a results.json that the report reads, one prompt per value."""
    about = {
        "psnr": {"kind": "paired", "title": "PSNR (dB)", "higher_is_better": True},
        "temporal_flickering": {
            "kind": "unpaired",
            "title": "Temporal flickering",
            "higher_is_better": True,
        },
    }
    count = len(next(iter(values.values())))
    return {
        "format": 1,
        "metrics": {
            n: {**about[n], "definition": "of it", "source": "somewhere", "mean": 0.0}
            for n in values
        },
        "videos": [
            {
                "file_name": f"p{i}-0.mp4",
                "prompt": f"p{i}",
                "index": 0,
                "scores": {n: v[i] for n, v in values.items()},
            }
            for i in range(count)
        ],
        "failed": list(failed),
        "unavailable": {"lpips": "unavailable: run sla2 weights fetch alexnet"},
        "versions": {"torch": "9.9"},
    }


@pytest.fixture
def run_dir(make_folder, tmp_path):
    """A run of full attention, three variants that were scored, and one that was not."""
    root = tmp_path / "run"
    flickering = [0.9, 0.8, 0.87, 0.83, 0.88, 0.81, 0.86]
    psnr = [31.0, 33.0, 31.5, 32.5, 32.25, 31.75, 32.0]
    scores = {
        "full": {"temporal_flickering": flickering},
        "sla2-90": {"psnr": psnr, "temporal_flickering": flickering},
        "sla2-97-s0": {
            "psnr": [value - 11 for value in psnr],
            "temporal_flickering": [value - 0.2 for value in flickering],
        },
        "sla2-97-s1": {
            "psnr": [value - 7 for value in psnr],
            "temporal_flickering": [value - 0.2 for value in flickering],
        },
    }
    for number, variant in enumerate(VARIANTS[:-1]):
        make_folder(f"run/videos/{variant['name']}", 2, noise=4.0 * number, fps=10)
        folder = root / "scores" / variant["name"]
        folder.mkdir(parents=True)
        failed = (
            [{"file_name": "p9-0.mp4", "metric": None, "error": "p9: broken <mp4>"}]
            if number == 1
            else []
        )
        (folder / "results.json").write_text(json.dumps(results(scores[variant["name"]], failed)))
    (root / "block_maps").mkdir()
    maps = {
        "grid": [4, 2, 2],
        "order": list(range(15, -1, -1)),
        "block_q": 8,
        "block_k": 4,
        "layers": [{"layer": 0, "head": 1, "map": [[0], [1, 3]]}],
    }
    (root / "block_maps" / "sla2-97-s0.json").write_text(json.dumps(maps))
    run = {
        "title": "A run & its <title>",
        "variants": VARIANTS,
        "reference": "full",
        "settings": {"a": {"b": [1, 2]}},
    }
    (root / "run.json").write_text(
        json.dumps({**run, "hardware": {"cpu": "two"}, "notes": ["mind this"]})
    )
    return root
