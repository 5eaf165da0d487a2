"""Manifests: names, JSONL, pairing, and paths that must stay inside."""

import json
import os

import numpy as np
import pytest
from sla2_eval.videos.manifest import left_out, pair, parse_name, read_manifest, video_name
from sla2_eval.videos.video import write_video


@pytest.mark.parametrize(
    ("prompt", "index", "name"),
    [
        ("a red circle", 3, "a red circle-3.mp4"),
        ("semi-final", 0, "semi-final-0.mp4"),
        ("either/or\n", 1, "either or-1.mp4"),
        ("../up", 0, " up-0.mp4"),
        ("x" * 300, 2, "x" * 180 + "-2.mp4"),
    ],
)
def test_video_name(prompt, index, name):
    assert video_name(prompt, index) == name
    assert parse_name(name)[1] == index


def test_only_vbench_2_cuts_prompts_that_would_fit():
    """A prompt of VBench's own has 190 characters, and its files carry all of them."""
    assert video_name("x" * 190, 0) == "x" * 190 + "-0.mp4"
    assert video_name("x" * 190, 0, cut=True) == "x" * 180 + "-0.mp4"
    assert (
        video_name("x" * 300, 0, mark=" 12345678", suffix=".png") == "x" * 180 + " 12345678-0.png"
    )


def test_long_prompt_of_wide_characters_fits_a_file_name(tmp_path):
    name = video_name("漢" * 200, 0)
    assert len(name.encode()) <= 255
    write_video(tmp_path / name, np.zeros((1, 16, 16, 3), dtype=np.uint8), 8)
    assert [entry.file_name for entry in read_manifest(tmp_path)] == [name]


def test_a_folder_of_videos_of_any_kind_says_what_it_left_out(tmp_path):
    for name in ("a-0.webm", "b-1.MKV", "c-0.mov", "d-0.mp4", "poster.png", "e.gif", "notes.txt"):
        (tmp_path / name).touch()
    entries = read_manifest(tmp_path)
    assert [e.file_name for e in entries] == ["a-0.webm", "b-1.MKV", "c-0.mov", "d-0.mp4"]
    assert left_out(tmp_path, entries) == {".gif": 1, ".png": 1}
    (tmp_path / "manifest.jsonl").write_text('{"file_name": "a-0.webm"}\n')
    listed = read_manifest(tmp_path)
    assert left_out(tmp_path, listed) == {".gif": 1, ".mkv": 1, ".mov": 1, ".mp4": 1, ".png": 1}
    assert left_out(tmp_path / "manifest.jsonl", listed) == {}


def test_one_file_is_a_manifest_of_itself(tmp_path):
    (tmp_path / "a fox-3.webm").touch()
    (entry,) = read_manifest(tmp_path / "a fox-3.webm")
    assert (entry.file_name, entry.prompt, entry.index) == ("a fox-3.webm", "a fox", 3)


def test_name_without_an_index_is_all_prompt():
    assert parse_name("sunset.mp4") == ("sunset", 0)


def test_folder_is_read_in_the_order_of_names(tmp_path):
    for name in ("b-1.mp4", "a-0.mp4", ".hidden-0.mp4", "notes.txt"):
        (tmp_path / name).touch()
    assert [(e.file_name, e.prompt, e.index) for e in read_manifest(tmp_path)] == [
        ("a-0.mp4", "a", 0),
        ("b-1.mp4", "b", 1),
    ]


def test_jsonl_wins_over_names(tmp_path):
    row = {"file_name": "x.mp4", "prompt": "a dog", "index": 4, "seed": 9, "dimensions": ["scene"]}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n\n")
    (entry,) = read_manifest(tmp_path)
    assert (entry.prompt, entry.index, entry.seed, entry.path) == (
        "a dog",
        4,
        9,
        tmp_path / "x.mp4",
    )
    assert read_manifest(tmp_path / "manifest.jsonl") == [entry]


def test_jsonl_as_editors_leave_it(tmp_path):
    """A byte order mark, Windows line ends, an empty line, and a line separator inside a prompt."""
    rows = [{"file_name": "./a.mp4", "prompt": "one\u2028two\x85"}, {"file_name": "sub//b-3.mp4"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "manifest.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n\r\n")
    found = [(e.file_name, e.prompt, e.index, e.path) for e in read_manifest(tmp_path)]
    assert found == [
        ("a.mp4", "one\u2028two\x85", 0, tmp_path / "a.mp4"),
        ("sub/b-3.mp4", "b", 3, tmp_path / "sub" / "b-3.mp4"),
    ]


def test_one_file_under_two_names_is_refused(tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"file_name": "a.mp4"}\n{"file_name": "./a.mp4"}\n')
    with pytest.raises(ValueError, match=r"line 2: expected each file once, got 'a\.mp4' again"):
        read_manifest(tmp_path)


def test_what_cannot_be_written_as_utf8_is_refused_before_anything_is_scored(tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"file_name": "a.mp4", "prompt": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"line 1: expected a text prompt"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.jsonl").unlink()
    os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9-0.mp4", os.O_CREAT))
    with pytest.raises(ValueError, match=r"expected a file name in UTF-8, got 'caf\\udce9-0.mp4'"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../outside.mp4", "a/../../b.mp4", "", 7, "nul\0.mp4"]
)
def test_paths_out_of_the_folder_are_refused(tmp_path, name):
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"file_name": name}) + "\n")
    with pytest.raises(ValueError, match=r"manifest\.jsonl line 1: expected a "):
        read_manifest(tmp_path)


def test_links_out_of_the_folder_are_refused(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out.mp4"
    inside.mkdir()
    outside.touch()
    (inside / "a-0.mp4").symlink_to(outside)
    with pytest.raises(ValueError, match=f"links out of it; --root allows what lies in {tmp_path}"):
        read_manifest(inside)
    (entry,) = read_manifest(inside, roots=[tmp_path / "elsewhere", tmp_path])
    assert entry.path == inside / "a-0.mp4"


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"prompt": "a"}', '{"file_name": "a.mp4", "index": "x"}']
)
def test_bad_line_is_named(tmp_path, line):
    (tmp_path / "manifest.jsonl").write_text('{"file_name": "ok.mp4"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2: expected"):
        read_manifest(tmp_path)


def test_repeated_file_is_refused(tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"file_name": "a.mp4"}\n' * 2)
    with pytest.raises(ValueError, match="each file once"):
        read_manifest(tmp_path)


def test_empty_and_absent_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got none"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="got nothing there"):
        read_manifest(tmp_path / "absent")


def test_pairs_by_name(tmp_path):
    for folder, names in (("a", "pq"), ("b", "qr")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}-0.mp4").touch()
    (tmp_path / "a" / "manifest.jsonl").write_text(
        '{"file_name": "p-0.mp4"}\n{"file_name": "q-0.mp4", "prompt": "a longer prompt"}\n'
    )
    pairs = pair(read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b"))
    assert [(v.file_name, r and r.path) for v, r in pairs] == [
        ("p-0.mp4", None),
        ("q-0.mp4", tmp_path / "b" / "q-0.mp4"),
    ]
    assert pairs[1][1].prompt == "a longer prompt"
