"""A random Wan pipeline through ablate, generate, score and report, from a prompt file of VBench's
structure: what each command leaves is what the next one needs.
"""

import json

import pytest
import yaml
from sla2_eval.cli.main import main

# As all_dimension.txt, where a prompt of two dimensions stands twice, with its longer versions.
SHORT = ["a red circle", "a blue square", "a red circle"]
LONGER = ["a red circle moving horizontally", "a blue square moving vertically", "a circle"]
INFO = [
    {"prompt_en": "a red circle", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a blue square", "dimension": ["subject_consistency"]},
    {"prompt_en": "a red circle", "dimension": ["overall_consistency"]},
]
SIZE = {"num_frames": 5, "height": 32, "width": 48}
NAMES = [f"{prompt}-{index}.mp4" for prompt in SHORT[:2] for index in (0, 1)]


@pytest.fixture
def prompts(tmp_path) -> dict[str, str]:
    """The files, by the option that takes each."""
    found = {
        "prompts": ("all_dimension_longer.txt", "\n".join(LONGER) + "\n"),
        "names": ("all_dimension.txt", "\n".join(SHORT) + "\n"),
        "info": ("VBench_full_info.json", json.dumps(INFO)),
    }
    for name, text in found.values():
        (tmp_path / name).write_text(text)
    return {option: str(tmp_path / name) for option, (name, _) in found.items()}


def words(options: dict) -> list[str]:
    """--some-name value of each option."""
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in options.items())
    return [word for pair in pairs for word in pair]


def test_a_random_wan_goes_through_all_four_commands(wan_training, prompts, tmp_path, capsys):
    grid, videos, scores, out = (tmp_path / name for name in ("grid", "videos", "scores", "out"))
    settings = {
        **wan_training,
        "generate": {**prompts, "num_prompts": 2, "steps": 1, "dtype": "float32"},
        "metrics": ["psnr", "temporal_flickering"],
        "workers": 0,
        "variants": [{"name": "sla2", "label": "SLA2 trained", "family": "SLA2"}],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(settings))
    assert main(["ablate", *words({"config": tmp_path / "grid.yaml", "out": grid})]) == 0
    (adapter,) = (grid / "work" / "stage2").glob("*/adapter")

    sampling = {**prompts, **SIZE, "videos_per_prompt": 2, "steps": 2, "dtype": "float32"}
    given = words({"model": wan_training["model"], **sampling, "out": videos})
    variants = ["--variant", "full=full", "--variant", f"sparse={adapter}"]
    assert main(["generate", *given, *variants]) == 0
    for variant in ("full", "sparse"):
        manifest = (videos / variant / "manifest.jsonl").read_text().splitlines()
        rows = {row["file_name"]: row for row in map(json.loads, manifest)}
        assert list(rows) == NAMES
        assert [rows[name]["text"] for name in NAMES] == [LONGER[0]] * 2 + [LONGER[1]] * 2
        dimensions = ["temporal_flickering", "overall_consistency"]
        assert rows[NAMES[0]]["dimensions"] == dimensions
        made = json.loads((videos / variant / "generation.json").read_text())
        used = {key: made["sampling"][key] for key in ("steps", "guidance", "flow_shift", "fps")}
        assert used == {"steps": 2, "guidance": 5.0, "flow_shift": 3.0, "fps": 16.0}

    for folder in (videos / "sparse", videos / "sparse" / "lossless"):
        (folder / NAMES[3]).write_bytes(b"cut off")
    asked = words({"videos": videos / "sparse", "reference": videos / "full", "out": scores})
    asked += ["--metrics", "psnr,temporal_flickering"]
    assert main(["score", *asked]) == 1
    assert NAMES[3] in capsys.readouterr().err
    assert main(["score", *asked, "--allow-failures"]) == 0

    folders = [str(folder) for folder in (videos, grid, scores)]
    assert main(["report", *folders, "--reference", str(videos), "--out", str(out)]) == 0
    data = json.loads((out / "results.json").read_text())
    groups = {group["label"]: group for group in data["groups"]}
    costs = {label: (group["sparsity"], group["flops"]) for label, group in groups.items()}
    assert costs == {
        "full": (0.0, 1.0),
        "full attention": (0.0, 1.0),
        "sparse": (0.5, costs["SLA2 trained"][1]),  # the same maps, in a grid and by itself
        "SLA2 trained": (0.5, pytest.approx(1.5625)),
    }
    assert [label for label, group in groups.items() if group["reference"]] == ["full"]
    assert [group["num_seeds"] for group in groups.values()] == [0, 0, 0, 1]
    counts = {
        (label, metric): (cell["num_videos"], cell["of_videos"])
        for label, group in groups.items()
        for metric, cell in group["metrics"].items()
    }
    assert counts == {
        ("full", "temporal_flickering"): (4, 4),
        ("full attention", "temporal_flickering"): (2, 2),
        ("sparse", "psnr"): (3, 4),
        ("sparse", "temporal_flickering"): (3, 4),
        ("SLA2 trained", "psnr"): (2, 2),
        ("SLA2 trained", "temporal_flickering"): (2, 2),
    }
    shared = {(p["metric"], p["first"], p["second"]): p["num_videos"] for p in data["comparisons"]}
    assert shared["temporal_flickering", "full", "sparse"] == 3
    assert shared["psnr", "sparse", "SLA2 trained"] == 2
    assert {(row["variant"], row["videos"]) for row in data["speed"]} == {
        (label, 2 if label in ("full attention", "SLA2 trained") else 4) for label in groups
    }
    table = (out / "results.md").read_text()
    assert "| sparse | 50 % | 156.2 % |" in table
    assert "(3 of 4)" in table
    assert "PSNR (dB) 5 of 6; Temporal flickering 11 of 12" in table
