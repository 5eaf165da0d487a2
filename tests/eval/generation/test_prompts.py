"""Prompt files: plain ones, and those of VBench and VBench-2.0 by their structure."""

import json
from pathlib import Path

import pytest
from sla2_eval.generation.prompts import Prompt, plan, read_prompts

# As VBench's all_dimension.txt, a prompt of two dimensions is there twice.
SHORT = ["a still fox", "a person swimming in ocean", "a still fox", "x" * 190]
LONGER = [
    "a red fox, still as stone",
    "someone swims far out",
    "a fox that never moves",
    "x of all",
]
INFO = [
    {"prompt_en": "a still fox", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "a person swimming in ocean",
        "dimension": ["subject_consistency", "dynamic_degree"],
        "auxiliary_info": {"subject_consistency": {"x": "y"}},
    },
    {"prompt_en": "a still fox", "dimension": ["scene"]},
    {"prompt_en": "x" * 190, "dimension": ["scene"]},
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "all_dimension.txt").write_text("\n".join(SHORT) + "\n")
    (tmp_path / "all_dimension_longer.txt").write_text("\n".join(LONGER) + "\n")
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(INFO))
    return tmp_path


def texts(prompts) -> list[str]:
    return [prompt.prompt for prompt in prompts]


@pytest.mark.parametrize(("text", "message"), [("\n \n", "got none"), (b"\xff\xfe\x00", "UTF-8")])
def test_files_that_hold_no_prompts(text, message, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(path)
    assert str(path) in str(error.value)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n", encoding="utf-8-sig")
    assert texts(read_prompts(tmp_path / "prompts.txt")) == ["a red circle", "a blue square"]


def test_only_a_line_feed_ends_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("a red\u2028circle\r\na blue square".encode())
    assert texts(read_prompts(tmp_path / "prompts.txt")) == ["a red\u2028circle", "a blue square"]


def test_the_experiments_prompts_are_those_of_the_quickstart():
    from sla2_eval.grid.steps import builtin_prompts

    found = read_prompts(Path(__file__).parents[3] / "experiments" / "tiny_wan" / "prompts.txt")
    assert texts(found) == builtin_prompts(50)


def test_vbenchs_files_as_they_are(files):
    plain = read_prompts(files / "all_dimension.txt")
    assert plain == [Prompt(text) for text in dict.fromkeys(SHORT)]
    known = read_prompts(files / "all_dimension.txt", info=files / "VBench_full_info.json")
    assert known == read_prompts(files / "VBench_full_info.json")
    assert [(p.dimensions, p.samples) for p in known] == [
        (("temporal_flickering", "scene"), 25),
        (("subject_consistency", "dynamic_degree"), 5),
        (("scene",), 5),
    ]
    requests = plan(known, None, 7)
    assert len(requests) == 35
    assert requests[-1].file_name == "x" * 190 + "-4.mp4"  # whole, as VBench looks for it
    scene = read_prompts(files / "VBench_full_info.json", dimensions=["scene"])
    assert texts(scene) == ["a still fox", "x" * 190]


def test_longer_prompts_carry_the_originals_names(files):
    found = read_prompts(
        files / "all_dimension_longer.txt",
        names=files / "all_dimension.txt",
        info=files / "VBench_full_info.json",
    )
    assert [(p.prompt, p.text) for p in found] == [
        (SHORT[0], LONGER[0]),  # of the repeated one the first
        (SHORT[1], LONGER[1]),
        (SHORT[3], LONGER[3]),
    ]
    first = plan(found, [0], 0)[0]
    assert (first.file_name, first.given) == ("a still fox-0.mp4", LONGER[0])


@pytest.mark.parametrize("form", ["list", "by name"])
def test_vbench_2_cuts_names_and_asks_for_twenty_of_diversity(tmp_path, form):
    story = "A dragon " + "y" * 200
    rows = [("A man is running.", ["Diversity", "Human_Clothes"]), (story, ["Complex_Plot"])]
    content = [{"prompt_en": prompt, "dimension": names} for prompt, names in rows]
    if form == "by name":
        content = {p[:180]: {"caption": p, "dimension": names} for p, names in rows}
    (tmp_path / "info.json").write_text(json.dumps(content))
    requests = plan(read_prompts(tmp_path / "info.json"), None, 0)
    assert [r.prompt for r in requests] == [rows[0][0]] * 20 + [story] * 3
    assert requests[-1].file_name == f"{story[:180]}-2.mp4"


def test_no_two_prompts_share_a_file_name():
    long = "z" * 300
    prompts = ["either/or", "either or", f"{long}1", f"{long}2", "a", "A"]
    names = [request.file_name for request in plan(prompts, [0, 1], 0)]
    assert len(set(names)) == 12
    assert names[:2] == ["either or-0.mp4", "either or-1.mp4"]
    assert names[2].startswith("either or ")
    assert names[4] == "z" * 180 + "-0.mp4"
    assert all(len(name.encode()) <= 255 for name in names)
    # What was generated keeps its name where prompts are added.
    assert [r.file_name for r in plan([*prompts, "either\\or"], [0, 1], 0)][:12] == names
    with pytest.raises(ValueError, match="each prompt once, got 'a' again"):
        plan(["a", "b", "a"], [0], 0)
    with pytest.raises(ValueError, match="expected a number for 'a', which is of no benchmark"):
        plan(["a"], None, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": "one.txt"}, "names: expected a prompt for each of the 4 of .* got 1 in"),
        ({"info": "other.json"}, "info: expected every prompt in .*, got none like 'a still fox'"),
        ({"dimensions": ["scene"]}, "among none, as the file has no dimensions, got 'scene'"),
        (
            {"info": "VBench_full_info.json", "dimensions": ["color"]},
            "expected names among dynamic_degree, scene, .*, got 'color'",
        ),
        ({"info": "broken.json"}, r"broken\.json: expected \[\{\"prompt_en\""),
        ({"info": "absent.json"}, r"absent\.json: expected a text file .* got nothing there"),
    ],
)
def test_files_that_do_not_fit_are_named(files, change, message):
    (files / "one.txt").write_text("a\n")
    (files / "other.json").write_text(json.dumps(INFO[1:2]))
    (files / "broken.json").write_text(json.dumps([{"prompt": "x"}]))
    change = {k: files / v if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        read_prompts(files / "all_dimension.txt", **change)
