"""Blind pairs, and their votes as a metric."""

import json

import pytest
from sla2_eval.cli.main import main
from sla2_eval.report.data import gather
from sla2_eval.report.preference import count, export
from sla2_eval.scoring.intervals import over_prompts


@pytest.fixture
def folders(make_folder, tmp_path):
    """Videos of full attention and of a variant, and a page of their pairs."""
    full, sla2 = (make_folder(f"secret-{name}", 7) for name in ("full", "sla2"))
    page = export([full, sla2], "secret-sla2", tmp_path / "out", reference=full)
    assert page == tmp_path / "out" / "page" / "index.html"
    return full, sla2, tmp_path / "out"


def ballot(out, rater, sides: list[str], page=None):
    """A file of votes as the page saves them; `sides`: "variant", "reference" or "same" by pair, in
    the order of file names.
    """
    key = json.loads((out / "key.json").read_text())
    numbers = sorted(key["pairs"], key=lambda number: key["pairs"][number]["file_name"])
    votes = {}
    for number, side in zip(numbers, sides, strict=False):
        left = key["pairs"][number]["left"]
        votes[number] = side if side == "same" else "left" if side == left else "right"
    path = out / f"votes-{rater}.json"
    path.write_text(json.dumps({"page": page or key["page"], "rater": rater, "votes": votes}))
    return path


def test_a_page_does_not_tell_and_the_key_does(folders):
    full, sla2, out = folders
    key = json.loads((out / "key.json").read_text())
    lefts = [pair["left"] for pair in key["pairs"].values()]
    assert sorted((lefts.count("variant"), lefts.count("reference"))) == [3, 4]
    text = (out / "page" / "index.html").read_text()
    assert "secret" not in text
    assert "pattern 003" in text  # the prompt
    for number, pair in key["pairs"].items():
        for side in ("left", "right"):
            shown = (out / "page" / "videos" / f"{number}-{side}.mp4").read_bytes()
            of = sla2 if (side == "left") == (pair["left"] == "variant") else full
            assert shown == (of / pair["file_name"]).read_bytes()
    assert len(list((out / "page" / "videos").iterdir())) == 14
    with pytest.raises(ValueError, match=r"out: expected a new folder, got one with key\.json"):
        export([full, sla2], "secret-sla2", out, reference=full)
    with pytest.raises(ValueError, match="--variant: expected one of secret-sla2, got 'other'"):
        export([full, sla2], "other", out.parent / "x", reference=full)
    with pytest.raises(ValueError, match="--reference: expected a folder or a label, got none"):
        export([full, sla2], "secret-sla2", out.parent / "x")


def test_votes_come_back_as_a_metric_with_wilsons_interval(folders, capsys):
    full, sla2, out = folders
    v, r, s = "variant", "reference", "same"
    files = [
        ballot(out, "a", [v, v, v, r, v, v, s]),
        ballot(out, "b", [v, v, r, r, s, r, s]),
        ballot(out, "c", [v, r, v, r]),  # stopped early
    ]
    assert main(["preference", "count", str(out), *map(str, files), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    # By majority: v v v r, undecided (one vote and one of no difference, one each, no difference).
    assert (row["mean"], row["pairs"], row["undecided"], row["raters"]) == (0.75, 4, 3, 3)
    assert (row["votes_variant"], row["votes_reference"], row["votes_same"]) == (9, 6, 3)
    assert row["not_shown"] == 0
    expected = over_prompts({str(i): [float(i != 3)] for i in range(4)}, binary=True)
    assert expected.method.startswith("Wilson")
    assert (row["low"], row["high"]) == (expected.low, expected.high)

    data = gather([full, sla2, out], reference=full)
    assert [group["label"] for group in data["groups"]] == ["secret-full", "secret-sla2"]
    cell = data["groups"][1]["metrics"]["preference"]
    assert (cell["mean"], cell["low"], cell["num_videos"]) == (0.75, expected.low, 4)


def test_votes_that_do_not_fit_are_refused(folders):
    _, _, out = folders
    good = ballot(out, "a", ["variant"])
    again = out / "again.json"
    again.write_text(good.read_text())
    with pytest.raises(ValueError, match=r"again\.json: expected one file of each rater, .* 'a'"):
        count(out, [good, again])
    with pytest.raises(ValueError, match="expected votes of the page of this folder"):
        count(out, [ballot(out, "b", ["variant"], page="other")])
    with pytest.raises(ValueError, match="votes: expected at least one, got none"):
        count(out, [ballot(out, "c", [])])
    good.write_text(good.read_text().replace('"left"', '"up"').replace('"right"', '"up"'))
    with pytest.raises(ValueError, match=r"expected left, right, same .* got 'up' for '00"):
        count(out, [good])
    assert not (out / "results.json").exists()
