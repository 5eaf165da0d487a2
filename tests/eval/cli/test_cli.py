"""The sla2 command: help, exit codes, and one-line errors that name the file or option and what was
expected.
"""

import json

import click
import numpy as np
import pytest
from sla2_eval.cli.main import COMMANDS, main, sla2
from sla2_eval.videos.video import write_video

SUBCOMMANDS = [[name] for name in COMMANDS] + [
    ["train", "teacher"],
    ["train", "router"],
    ["train", "finetune"],
    ["import", "turbodiffusion"],
    ["weights", "list"],
    ["weights", "fetch"],
    ["preference", "page"],
    ["preference", "count"],
]


def fails(capsys, arguments: list[str], code: int = 2) -> str:
    """Run, expect the exit code and exactly one line on stderr; returns that line."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("sla2: error: ")
    return captured.err.strip()


def moving_square(step: int) -> np.ndarray:
    frames = np.full((6, 32, 32, 3), 20, dtype=np.uint8)
    for t in range(6):
        frames[t, 8:16, 4 + step * t : 12 + step * t] = (200, 40, 40)
    return frames


@pytest.mark.parametrize("arguments", SUBCOMMANDS, ids=" ".join)
def test_help_has_an_example(arguments, capsys):
    assert main([*arguments, "--help"]) == 0
    assert "Example:\n    sla2 " + " ".join(arguments) in capsys.readouterr().out


def test_the_group_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["quickstrt"], ["quickstart", "'quickstrt'"]),
        (["train"], []),
        (["train", "teacher"], ["--config"]),
        (["train", "teacher", "--config", "x.yaml", "--stepz", "3"], ["--stepz"]),
        (["generate", "--prompts", "p.txt", "--out", "o", "--steps", "0"], ["--steps", "0"]),
        (
            ["generate", "--prompts", "p.txt", "--out", "o"],
            ["p.txt", "one prompt a line", "nothing there"],
        ),
        (["score", "--videos", "v", "--out", "o"], ["--metrics"]),
        (
            ["score", "--videos", "v", "--metrics", "psnr", "--out", "o", "--num-workers", "0"],
            ["--num-workers", "0"],
        ),
        (
            ["score", "--videos", "v", "--metrics", "psnrr", "--out", "o"],
            ["--metrics", "psnr", "'psnrr'"],
        ),
        (["score", "--videos", "v", "--metrics", "psnr", "--out", "o"], ["reference", "psnr"]),
        (
            ["score", "--videos", "v", "--metrics", "temporal_flickering", "--out", "o"],
            ["v:", "nothing there"],
        ),
        (["report", "nowhere"], ["expected a folder", "run.json", "nowhere"]),
        (["weights", "fetch", "alexnett"], ["alexnet", "'alexnett'"]),
        (["ablate", "--config", "none.yaml", "--out", "o"], ["none.yaml", "YAML", "nothing there"]),
    ],
)
def test_bad_arguments(arguments, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if not parts:
        assert main(arguments) == 2
        return
    message = fails(capsys, arguments)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stepz: 3\n", ["stepz: unknown key", "known keys here: model, start, videos"]),
        ("steps: many\n", ["steps:", "integer", "'many'"]),
        ("steps: 0\n", ["steps: expected an integer >= 1, got 0"]),
        ("learning_rate: .nan\n", ["learning_rate:", "finite number", "'nan'"]),
        ("ema: 1\n", ["ema: expected a number in [0, 1), got 1"]),
        ("steps: [1\nseed: 2\n", ["line 2", "expected YAML"]),
        ("- 1\n- 2\n", ["expected keys and values", "list"]),
    ],
)
def test_broken_settings_name_file_and_key(text, parts, tmp_path, capsys):
    path = tmp_path / "teacher.yaml"
    path.write_text(text)
    message = fails(
        capsys, ["train", "teacher", "--config", str(path), "--out", str(tmp_path / "out")]
    )
    assert all(part in message for part in ["teacher.yaml", *parts]), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "variants: [{name: a, label: A, family: F, topk: 0.1}]",
            ["variants.0.topk: unknown key", "attention"],
        ),
        (
            "variants: [{name: a, label: A, family: F, attention: {topkk: 0.1}}]",
            ["(a)", "topkk: unknown key", "topk,"],
        ),
        (
            "variants: [{name: a, label: A, family: F, attention: {topk: 2}}]",
            ["(a)", "attention.topk: expected a number in (0, 1], got 2"],
        ),
        (
            "variants: [{name: a, label: A, family: F, attention: {router: heuristic}}]",
            ["(a)", "attention.topk: expected a value"],
        ),
        (
            "variants: [{name: a, label: A, family: F, attention: {topk: 0.1, variant: sla3}}]",
            ["(a)", "attention.variant: expected one of sla2, pooled,", "'sla3'"],
        ),
        (
            "variants: [{name: a, label: A, family: F, attention: {topk: 1}, train_precision: 1}]",
            ["variants.0.train_precision", "string"],
        ),
        (
            "variants: [{name: a, label: A, family: F, attention: {topk: 0.1},"
            " train_precision: int3}]",
            ["(a)", "train_precision: expected one of", "'int3'"],
        ),
        ("attention: {method: sla}", ["attention.method: unknown key", "variant"]),
        ("attention: {head_dim: 64}", ["attention.head_dim: unknown key", "variant"]),
        ("attention: {block_q: 0}", ["attention.block_q: expected an integer >= 1, got 0"]),
        ("attention: []", ["attention: expected keys and values, got list"]),
        ("capture: {samples: 0}", ["capture.samples: expected an integer >= 1, got 0"]),
        ("stage1: {topk: [5]}", ["stage1.topk: expected fractions in (0, 1]"]),
        ("stage1: 3", ["stage1: expected keys and values, got int"]),
        ("generate: {guidance: -1}", ["generate.guidance: expected a number >= 0, got -1"]),
        ("imports: [no_such_module]", ["imports: expected modules", "'no_such_module'"]),
        (
            "variants: [{name: full, label: A, family: F, attention: {topk: 0.1}}]",
            ["none called 'full'"],
        ),
        ("variants: []", ["variants:", "at least 1"]),
        ("seeds: [0]", ["variants: expected a value"]),
        (
            "stage2: {lr: 1}\nvariants: [{name: a, label: A, family: F, attention: {topk: 0.1}}]",
            ["stage2.lr: unknown key", "learning_rate"],
        ),
        (
            "stage2: {seed: 1}\nvariants: [{name: a, label: A, family: F, attention: {topk: 1}}]",
            ["stage2.seed: expected none"],
        ),
    ],
)
def test_broken_grids_name_the_variant(text, parts, tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    message = fails(capsys, ["ablate", "--config", str(path), "--out", str(tmp_path / "out")])
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("command", ["quickstart", "generate", "score"])
def test_an_out_that_is_no_folder(command, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "prompts.txt").write_text("a red circle moving left\n")
    write_video(tmp_path / "a-0.mp4", moving_square(1), 8)
    out = str(tmp_path / "taken")
    arguments = {
        "quickstart": ["quickstart", "--out", out],
        "generate": ["generate", "--prompts", str(tmp_path / "prompts.txt"), "--out", out],
        "score": [
            "score",
            "--videos",
            str(tmp_path),
            "--metrics",
            "temporal_flickering",
            "--out",
            out,
        ],
    }[command]
    message = fails(capsys, arguments)
    assert "--out: expected a folder that can be written" in message
    assert out in message
    assert (tmp_path / "taken").read_text() == "a file"


def test_generate_names_a_foreign_model(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle moving left\n")
    (tmp_path / "empty").mkdir()
    arguments = [
        "generate",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    message = fails(capsys, [*arguments, "--model", str(tmp_path / "empty")])
    assert "model: expected" in message
    assert "empty" in message
    assert "hub id" in fails(capsys, [*arguments, "--model", "a/b/c"])
    assert "adapter: expected a folder" in fails(
        capsys, [*arguments, "--model", "a/b", "--adapter", "none"]
    )
    assert not list((tmp_path / "out").iterdir())


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="nothing there"):
        main(
            [
                "generate",
                "--debug",
                "--prompts",
                str(tmp_path / "p.txt"),
                "--out",
                str(tmp_path / "o"),
            ]
        )


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> list:
    """(path, command) of every command that does something itself."""
    if not isinstance(command, click.Group):
        return [(path, command)]
    context = click.Context(command)
    names = command.list_commands(context)
    return [leaf for n in names for leaf in leaves(command.get_command(context, n), (*path, n))]


def test_every_command_takes_json_and_it_is_a_flag():
    found = leaves(sla2)
    assert {path[0] for path, _ in found} == set(COMMANDS)
    for path, command in found:
        option = next((p for p in command.params if "--json" in p.opts), None)
        assert isinstance(option, click.Option), path
        assert option.is_flag, path


def test_json_is_rows_and_nothing_else_on_stdout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text("{num_videos: 1, steps: 1, batch_size: 1, dtype: float32}")
    for words, key in (
        (["bench", "--model"], "gpu"),
        (["train", "teacher", "--config", "t.yaml", "--out", "teacher"], "model"),
    ):
        assert main([*words, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert isinstance(rows, list), words
        assert all(key in row for row in rows), words
    assert (tmp_path / rows[0]["model"] / "transformer" / "config.json").is_file()


def test_json_tables_are_json(capsys):
    assert main(["weights", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"name", "licence", "path", "present"} <= set(rows[0])
    assert main(["score", "--list", "--json"]) == 0
    assert "psnr" in {row["metric"] for row in json.loads(capsys.readouterr().out)}


def test_score_list_says_what_each_metric_is_and_how_to_get_it(tmp_path, monkeypatch, capsys):
    from sla2_eval.scoring import metrics, weights

    monkeypatch.setenv("SLA2_WEIGHTS", str(tmp_path))
    assert main(["score", "--list", "--json"]) == 0
    rows = {row["metric"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == metrics.specs().keys()
    for name, row in rows.items():
        assert all(
            row[key]
            for key in ("kind", "title", "better", "range", "definition", "source", "licence")
        ), name
        spec = metrics.specs()[name]
        if spec.weights and "needs the Python package" not in row["here"]:
            fetch = " && ".join(f"sla2 weights fetch {weight}" for weight in spec.weights)
            assert row["here"] == f"unavailable: run {fetch}"
    assert rows["psnr"]["here"] == "yes"
    (tmp_path / weights.FILES["raft"].file_name).touch()
    assert main(["score", "--list"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert "licence" in table[0]
    assert any("dynamic_degree" in line and "yes" in line for line in table)
    assert any("lpips" in line and "sla2 weights fetch alexnet" in line for line in table)


def test_score_prints_a_table_and_names_broken_videos(tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    for index in range(2):
        write_video(folder / f"a square-{index}.mp4", moving_square(index), 8)
    arguments = [
        "score",
        "--videos",
        str(folder),
        "--metrics",
        "temporal_flickering",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[0]
    assert row["metric"] == "temporal_flickering"
    assert row["videos"] == 2
    assert 0.9 < row["mean"] < 1
    (folder / "broken-0.mp4").write_text("not a video")
    assert main(arguments) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("sla2: error:")]
    assert len(errors) == 1
    assert "broken-0.mp4" in errors[0]
    assert "temporal_flickering" in captured.out
    assert not [path for path in (tmp_path / "out").rglob("*") if "partial" in path.name]


def test_score_that_could_compute_nothing_did_not_go_well(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLA2_WEIGHTS", str(tmp_path / "none"))
    write_video(tmp_path / "a square-0.mp4", moving_square(1), 8)
    arguments = [
        "score",
        "--videos",
        str(tmp_path),
        "--reference",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--metrics", "lpips"]) == 1
    assert "unavailable: run sla2 weights fetch alexnet" in capsys.readouterr().out
    both = [*arguments, "--metrics", "lpips,temporal_flickering"]
    assert main(both) == 1
    error = "sla2: error: lpips: unavailable: run sla2 weights fetch alexnet"
    assert error in capsys.readouterr().err.splitlines()
    (tmp_path / "poster.png").touch()
    assert main([*both, "--allow-missing"]) == 0
    err = capsys.readouterr().err.splitlines()
    assert error not in err
    assert f"sla2: warning: {tmp_path}: left out 1 .png" in err


def test_an_unexpected_error_is_one_line(monkeypatch, capsys):
    import sla2_eval.cli.doctor

    def broken():
        raise KeyError("unforeseen\nand on two lines")

    monkeypatch.setattr(sla2_eval.cli.doctor, "examine", broken)
    message = fails(capsys, ["doctor"], code=1)
    assert "KeyError" in message
    assert "--debug" in message
