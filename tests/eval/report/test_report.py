"""The report of a run, from a small run folder with real videos and real scores."""

import csv
import json
import re
import shutil

import pytest
from PIL import Image
from sla2_eval.cli.main import main
from sla2_eval.report.charts import chart, ticks
from sla2_eval.report.data import gather
from sla2_eval.report.findings import findings
from sla2_eval.report.page import write_report
from sla2_eval.report.paper import MODELS, paper
from sla2_eval.report.tables import as_markdown
from sla2_eval.report.text import number, signed, unbroken
from sla2_eval.scoring.score import score


def test_groups_hold_seeds_intervals_and_paired_differences(run_dir):
    data = gather(run_dir)
    assert [group["label"] for group in data["groups"]] == [
        "Full attention",
        "SLA2 90 %",
        "SLA2 97 %",
        "<b>Not</b> scored",
    ]
    full, ninety, ninety_seven, late = (group["metrics"] for group in data["groups"])
    assert "psnr" not in full
    assert full["temporal_flickering"]["mean"] == pytest.approx(0.85)
    half = 2.4469 * 0.6614 / 7**0.5
    assert ninety["psnr"]["high"] == pytest.approx(32 + half, abs=1e-3)
    counts = ("n", "num_videos", "of_videos", "num_seeds", "method")
    assert [ninety["psnr"][key] for key in counts] == [7, 7, 7, 1, "Student's t over prompts"]
    assert ninety["temporal_flickering"]["difference"]["within_noise"]
    assert ninety_seven["psnr"]["mean"] == 23.0
    # Two seeds, 2 dB above and below, say more than the seven prompts.
    assert ninety_seven["psnr"]["high"] > 23.0 + 5 * 2.0
    assert [ninety_seven["psnr"][key] for key in counts[:4]] == [7, 14, 14, 2]
    difference = ninety_seven["temporal_flickering"]["difference"]
    assert difference["mean"] == pytest.approx(-0.2)
    assert difference["low"] <= difference["mean"] <= difference["high"] < 0
    # All signs alike is one choice in 64; Holm's correction is over three pairs.
    assert (difference["p"], difference["p_holm"]) == pytest.approx((1 / 64, 3 / 64))
    assert not difference["within_noise"]
    pairs = [(row["metric"], row["first"], row["second"]) for row in data["comparisons"]]
    assert pairs[0] == ("psnr", "SLA2 90 %", "SLA2 97 %")
    assert len(pairs) == 4
    assert late == {}
    assert data["not_scored"] == ["late"]
    assert [run["versions"] for run in data["runs"]] == [{"torch": "9.9"}]


def test_speed_is_what_generation_noted(run_dir):
    assert gather(run_dir)["speed"] == []
    (run_dir / "videos" / "full" / "speed.jsonl").write_text(
        '{"videos": 2, "seconds": 8.0}\n{"videos": 2, "seconds": 12.0}\n'
    )
    (run_dir / "videos" / "sla2-90" / "speed.jsonl").write_text('{"videos": 1, "seconds": 2.5}\n')
    full, ninety = gather(run_dir)["speed"]
    keys = ("variant", "device", "seconds", "least", "most", "batches", "videos", "speedup")
    assert [full[key] for key in keys] == [
        *("Full attention", "unknown (run)", 5.0, 4.0, 6.0, 2, 4, 1.0),
    ]
    assert (ninety["seconds"], ninety["speedup"], ninety["speedup_low"]) == (2.5, 2.0, None)
    assert "2.00 ×" in write_report(run_dir).read_text()


def test_a_speedup_has_an_interval_and_is_of_one_machine(run_dir):
    def note(variant, seconds, device):
        lines = [{"videos": 2, "seconds": 2 * s, "device": device} for s in seconds]
        path = run_dir / "videos" / variant / "speed.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    note("full", [4.0, 4.2, 3.9, 4.1, 4.0, 3.8, 30.0], "H200")  # one batch that warmed up
    note("sla2-90", [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 15.0], "H200")
    note("sla2-97-s0", [1.0] * 7, "a laptop")
    _, ninety, other = gather(run_dir)["speed"]
    assert (ninety["seconds"], ninety["most"], ninety["speedup"]) == (2.0, 15.0, 2.0)
    assert 1.7 < ninety["speedup_low"] < 2.0 < ninety["speedup_high"] < 2.3
    assert (other["device"], other["speedup"]) == ("a laptop", None)
    assert "<td>unknown</td>" in write_report(run_dir).read_text()


def test_page_stands_alone_and_says_everything(run_dir):
    page = write_report(run_dir).read_text()
    assert not re.findall(
        r"""(?:src|href)=["'](?!data:|#|(?:results\.(?:csv|md|tex|json)|comparisons\.csv)["'])""",
        page,
    )
    assert not re.search(r"@import|url\(", page)
    for said in (
        "A run &amp; its &lt;title&gt;",
        "&lt;b&gt;Not&lt;/b&gt; scored",
        "p9: broken &lt;mp4&gt;",
        "mind this",
        "unavailable: run sla2 weights fetch alexnet",
        "Paired: against full attention",
        "Unpaired: each video by itself",
        "layer",
        "9.9",
        "two",
        "[1, 2]",
        "pattern 001",
    ):
        assert said in page, said
    player = json.loads(re.search(r'id="data-player">(.*?)</script>', page, re.S)[1])
    assert [variant["label"] for variant in player["variants"]] == [
        "Full attention",
        "SLA2 90 %",
        "SLA2 97 %",
    ]
    assert all(
        source.startswith("data:video/mp4;base64,")
        for row in player["prompts"]
        for source in row["sources"]
    )


def test_videos_shown_are_those_that_can_be_compared(run_dir, make_folder):
    """Full attention has the videos of every seed in one folder, a variant's seeds have a folder
    each.
    """
    for path in sorted((run_dir / "videos" / "full").glob("*.mp4")):
        shutil.copy(path, path.with_name(path.name.replace("-0.mp4", "-1.mp4")))
    (run_dir / "videos" / "full" / "manifest.jsonl").unlink()
    player = json.loads(
        re.search(r'id="data-player">(.*?)</script>', write_report(run_dir).read_text(), re.S)[1]
    )
    assert [(row["prompt"], row["index"], row["fps"]) for row in player["prompts"]] == [
        ("pattern 000", 0, 10.0),
        ("pattern 001", 0, 10.0),
    ]
    for variant in ("sla2-90", "sla2-97-s0", "sla2-97-s1"):
        shutil.rmtree(run_dir / "videos" / variant)
    player = json.loads(
        re.search(r'id="data-player">(.*?)</script>', write_report(run_dir).read_text(), re.S)[1]
    )
    assert len(player["prompts"]) == 4


def test_images_are_shown_as_images(run_dir):
    for variant in ("full", "sla2-90"):
        folder = run_dir / "videos" / variant
        Image.new("RGB", (6, 5), "red").save(folder / "a dot-0.png")
        (folder / "manifest.jsonl").write_text('{"file_name": "a dot-0.png", "prompt": "a dot"}\n')
    player = json.loads(
        re.search(r'id="data-player">(.*?)</script>', write_report(run_dir).read_text(), re.S)[1]
    )
    kinds = [source and source.split(";")[0] for source in player["prompts"][0]["sources"]]
    assert kinds == ["data:image/png", "data:image/png", None]


def test_lead_counts_what_was_scored(run_dir):
    assert "4 variants, 7 prompts, 28 videos scored." in write_report(run_dir).read_text()
    path = run_dir / "scores" / "sla2-90" / "results.json"
    scored = json.loads(path.read_text())
    scored["videos"].append({"file_name": "p9-0.mp4", "prompt": "p9", "index": 0, "scores": {}})
    path.write_text(json.dumps(scored))
    assert gather(run_dir)["num_videos"] == 28
    run = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**run, "variants": run["variants"][:1]}))
    assert "1 variant, 7 prompts, 7 videos scored." in write_report(run_dir).read_text()


def test_what_the_tests_show_is_said_first(run_dir):
    said = {row["metric"]: row["text"] for row in findings(gather(run_dir))}
    assert said["psnr"].startswith("No two variants are shown to differ (smallest p ")
    assert said["temporal_flickering"] == (
        "SLA2 97 % is worse than full attention’s 0.8500 (p ≤ 0.047); no difference to it is"
        " shown for SLA2 90 %. SLA2 90 % (0.8500) is better than SLA2 97 % (p ≤ 0.047)."
    )
    page = write_report(run_dir).read_text()
    assert page.index(unbroken(said["temporal_flickering"])) < page.index("Quality against")
    assert said["psnr"] in (run_dir / "report" / "results.md").read_text()


def test_too_few_prompts_are_said_to_show_nothing(run_dir):
    for path in (run_dir / "scores").glob("*/results.json"):
        scored = json.loads(path.read_text())
        scored["videos"] = scored["videos"][:3]
        path.write_text(json.dumps(scored))
    run = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**run, "variants": run["variants"][:2]}))
    (row,) = findings(gather(run_dir))
    assert row["text"] == (
        "Full attention 0.8567, SLA2 90 % 0.8567; 3 prompts are too few to show a difference."
    )


def test_what_is_not_known_says_so(run_dir):
    """One prompt, a variant of unknown sparsity, a video without a score."""
    run = json.loads((run_dir / "run.json").read_text())
    del run["variants"][1]["sparsity"]
    (run_dir / "run.json").write_text(json.dumps(run))
    path = run_dir / "scores" / "sla2-90" / "results.json"
    scored = json.loads(path.read_text())
    for row in scored["videos"][1:]:
        del row["scores"]["psnr"]
    path.write_text(json.dumps(scored))
    page = write_report(run_dir).read_text()
    assert "interval unknown" in page
    assert "1 of 7 videos" in page
    assert "<small>15 of 21 videos</small>" in page
    assert "<small>28 of 28 videos</small>" in page
    markdown = (run_dir / "report" / "results.md").read_text()
    assert "| SLA2 90 % | unknown | 31.00 (1 of 7) |" in markdown
    compared = gather(run_dir)["comparisons"][0]
    assert [compared[key] for key in ("metric", "n", "p", "p_holm")] == ["psnr", 1, None, None]


def test_what_a_set_metric_warns_of_is_said(run_dir):
    for variant in ("sla2-90", "sla2-97-s0"):
        path = run_dir / "scores" / variant / "results.json"
        scored = json.loads(path.read_text())
        about = {
            "kind": "set",
            "title": "FVD (I3D)",
            "higher_is_better": False,
            "definition": "d",
            "source": "s",
        }
        scored["metrics"]["fvd"] = {
            **about,
            "mean": 90.0,
            "warnings": ["12 clips of the videos: under 256"],
        }
        path.write_text(json.dumps(scored))
    said = "FVD (I3D): 12 clips of the videos: under 256."
    assert write_report(run_dir).read_text().count(said) == 1
    assert (run_dir / "report" / "results.md").read_text().count(said) == 1


def test_small_figures_are_not_shown_as_none(run_dir):
    assert [number(v) for v in (None, 0.0, -0.00002, 0.00123, 9.87654, -12.345)] == [
        "–",
        "0.0000",
        "-2.0e-05",
        "0.0012",
        "9.8765",
        "-12.35",
    ]
    assert [signed(v) for v in (0.0, 0.00002, -0.5, 12.345)] == [
        "+0.0000",
        "+2.0e-05",
        "-0.5000",
        "+12.35",
    ]


def test_markdown_cells_hold_any_label(run_dir):
    run = json.loads((run_dir / "run.json").read_text())
    run["variants"][1]["label"] = "a | b\n<i>c"
    (run_dir / "run.json").write_text(json.dumps(run))
    assert "\n| a \\| b &lt;i&gt;c | 90 % |" in as_markdown(gather(run_dir))


def test_tables_agree_with_the_page(run_dir):
    write_report(run_dir)
    rows = list(csv.DictReader((run_dir / "report" / "results.csv").open()))
    row = next(row for row in rows if row["variant"] == "SLA2 97 %" and row["metric"] == "psnr")
    assert (float(row["mean"]), row["seeds"], row["prompts"]) == (23.0, "2", "7")
    markdown = (run_dir / "report" / "results.md").read_text()
    assert "| SLA2 90 % | 90 % | 32.00 [31.39, 32.61] |" in markdown
    assert "| SLA2 90 % | 90 % | 0.8500 [0.8154, 0.8846] ≈ |" in markdown
    assert "p9-0.mp4: failed: p9: broken" in markdown
    assert json.loads((run_dir / "report" / "results.json").read_text()) == gather(run_dir)


def test_what_a_grid_lost_is_said_everywhere(run_dir):
    run = json.loads((run_dir / "run.json").read_text())
    lost = {
        "videos late": "its worker died 2 times (signal SIGKILL)",
        "scores late": "needs videos late, whose worker died",
    }
    (run_dir / "run.json").write_text(json.dumps({**run, "lost": lost}))
    page = write_report(run_dir).read_text()
    assert "Not everything was done" in page
    for task, why in lost.items():
        assert f"<dt>{task}</dt><dd>not done: {why}</dd>" in page
        assert f"- {task}: not done: {why}" in (run_dir / "report" / "results.md").read_text()
    assert gather(run_dir)["lost"] == lost


def test_half_finished_runs_have_a_report(run_dir):
    for folder in ("scores", "videos", "block_maps"):
        shutil.rmtree(run_dir / folder)
    page = write_report(run_dir).read_text()
    assert "Nothing has been scored yet" in page
    assert "Side by side" not in page
    assert "Definitions" in as_markdown(gather(run_dir)) or gather(run_dir)["metrics"] == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "{", r"run\.json: expected the description of a run, got"),
        ("run.json", "{}", r'run\.json: expected "variants"'),
        ("run.json", '{"variants": []}', r'run\.json: expected "variants"'),
        (
            "scores/full/results.json",
            '{"format": 2}',
            r"results\.json: expected results of format 1, got format 2",
        ),
        (
            "block_maps/sla2-97-s0.json",
            '{"grid": [1, 1, 1]}',
            r"sla2-97-s0\.json: expected block maps with block_q",
        ),
        (
            "block_maps/sla2-97-s0.json",
            (
                '{"grid": [4, 2, 2], "block_q": 8, "block_k": 4, "layers": [{"layer": 0, "head": 0,'
                ' "map": [[0], [4]]}]}'
            ),
            r"sla2-97-s0\.json: expected 2 rows of key blocks below 4",
        ),
        (
            "block_maps/sla2-97-s0.json",
            (
                '{"grid": [1, 2, 2], "order": [0, 1, 3, 3], "block_q": 4, "block_k": 4,'
                ' "layers": []}'
            ),
            r"sla2-97-s0\.json: expected an order of the 4 tokens of its grid, got 4 places",
        ),
    ],
)
def test_bad_files_are_named(run_dir, name, content, message):
    (run_dir / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report(run_dir)
    assert not (run_dir / "report").exists()


def test_papers_points_are_the_papers():
    small = paper()["models"]["wan2.1-1.3b-480p"]["metrics"]["imaging_quality"]
    assert small["full"] == 0.6367
    assert small["families"]["SLA2"][-1] == {"sparsity": 0.97, "value": 0.6664}
    assert small["families"]["SLA2, heuristic router"] == [{"sparsity": 0.97, "value": 0.6366}]


@pytest.mark.parametrize(
    ("model", "titles"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", ["Wan2.1 1.3B, 480p"]),
        ({"id": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}, ["Wan2.1 14B, 720p"]),
        (None, ["Wan2.1 1.3B, 480p", "Wan2.1 14B, 720p"]),
        ("tiny", []),
        ("THUDM/CogVideoX-2b", []),
    ],
)
def test_the_papers_points_stand_where_they_belong(run_dir, model, titles):
    """On the same models, in the metrics that both have, folded, and on the scale of ours."""
    assert "the paper’s" not in write_report(run_dir).read_text()
    run = json.loads((run_dir / "run.json").read_text())
    settings = {} if model is None else {"model": model}
    (run_dir / "run.json").write_text(json.dumps({**run, "settings": settings}))
    for path in (run_dir / "scores").glob("*/results.json"):
        path.write_text(path.read_text().replace("temporal_flickering", "imaging_quality"))
    page = write_report(run_dir).read_text()
    assert [title for title in MODELS.values() if title in page] == titles
    if "Wan2.1 1.3B, 480p" in titles:
        assert '<details class="paper">' in page
        assert "SLA2 of the paper: 0.677 at sparsity 90 %" in page
        assert "the paper’s full attention 0.6367" in page


def test_flops_are_a_column_and_charts_of_their_own(run_dir):
    assert 'id="by-flops"' not in write_report(run_dir).read_text()
    run = json.loads((run_dir / "run.json").read_text())
    shares = {"full": 1.0, "sla2-90": 0.12, "sla2-97-s0": 0.035, "sla2-97-s1": 0.037}
    for variant in run["variants"]:
        variant["flops"] = shares.get(variant["name"])
    (run_dir / "run.json").write_text(json.dumps(run))
    found = [group["flops"] for group in gather(run_dir)["groups"]]
    assert found == [1.0, 0.12, pytest.approx(0.036), None]
    charts = write_report(run_dir).read_text().split('id="by-flops"')[1].split("</section>")[0]
    assert "SLA2 97 %: 23 [" in charts
    assert "at flops 3.6 %" in charts
    assert "| SLA2 97 % | 97 % | 3.6 % |" in (run_dir / "report" / "results.md").read_text()


def test_latex_holds_any_label_and_marks_the_best(run_dir):
    run = json.loads((run_dir / "run.json").read_text())
    run["variants"][1]["label"] = "50 % & a_b \\"
    (run_dir / "run.json").write_text(json.dumps(run))
    write_report(run_dir)
    text = (run_dir / "report" / "results.tex").read_text()
    best = (
        r"50\,\% \& a\_b \textbackslash{} & 90\,\% & \textbf{32.00} {\scriptsize[31.39, 32.61]} \\"
    )
    assert best in text
    for table in text.split("\\begin{tabular}")[1:]:
        columns = len(re.match(r"\{(\w+)\}", table)[1])
        rows = [line for line in table.splitlines() if line.endswith("\\\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {columns - 1}
    assert text.count("\\begin{table}") == text.count("\\end{table}") == 2


def test_chart_draws_every_point_inside_the_frame():
    families = {
        "x": [
            {"sparsity": s, "value": v, "low": v - 1, "high": v + 1}
            for s, v in ((0.85, 30), (0.97, -4))
        ]
    }
    svg = chart("T", "n", families, {"x": 9}, full=50.0)
    circles = [
        tuple(map(float, m))
        for m in re.findall(r'points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', svg)
    ]
    assert len(circles) == 1
    assert all(0 <= value <= 320 for value in circles[0])
    assert circles[0][1] < circles[0][3]
    assert "full attention 50" in svg.split("<svg")[0] + svg.split("</svg>")[1]
    points = [
        {"seconds": 2, "value": 1.0, "low": -900, "high": 900},
        {"seconds": 3, "value": 2.0, "low": 1.5, "high": 2.5},
    ]
    svg = chart("T", "n", {"x": points}, {"x": 0}, axis="seconds")
    assert "x: 1 [-900, 900] at seconds a video 2 s" in svg
    first, second = re.search(r'points="[\d.]+,([\d.]+) [\d.]+,([\d.]+)"', svg).groups()
    assert float(first) - float(second) > 25  # a long interval leaves the values their room
    assert ticks(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(84.2, 97.9) == [85.0, 90.0, 95.0]


def test_results_of_score_have_a_report(tmp_path, make_folder):
    videos, reference = make_folder("a|b", 3), make_folder("full", 3)
    out = tmp_path / "scores"
    score(videos, reference, ["psnr", "temporal_flickering"], out)
    assert main(["report", str(out)]) == 0
    data = json.loads((out / "report" / "results.json").read_text())
    results = json.loads((out / "results.json").read_text())
    rows = {group["label"]: group for group in data["groups"]}
    assert list(rows) == ["full", "a|b"]
    for metric, about in results["metrics"].items():
        assert rows["a|b"]["metrics"][metric]["mean"] == about["mean"]
    flickering = results["metrics"]["temporal_flickering"]
    full = rows["full"]["metrics"]
    assert full["temporal_flickering"]["mean"] == flickering["reference_mean"]
    assert list(full) == ["temporal_flickering"]
    difference = rows["a|b"]["metrics"]["temporal_flickering"]["difference"]
    assert flickering["difference"].items() <= difference.items()
    assert rows["a|b"]["sparsity"] is None
    page = (out / "report" / "index.html").read_text()
    assert "Paired: against the reference" in page
    assert "Neither the sparsity of these videos nor what they cost is known." in page
    player = json.loads(re.search(r'id="data-player">(.*?)</script>', page, re.S)[1])
    assert [variant["label"] for variant in player["variants"]] == ["full", "a|b"]
    assert len(player["prompts"]) == 3


def test_results_of_score_without_a_reference_have_a_report(tmp_path, make_folder):
    score(make_folder("alone", 2), None, ["temporal_flickering"], tmp_path / "scores")
    write_report(tmp_path / "scores")
    data = json.loads((tmp_path / "scores" / "report" / "results.json").read_text())
    assert [group["label"] for group in data["groups"]] == ["alone"]
