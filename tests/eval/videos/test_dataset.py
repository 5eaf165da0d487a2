"""A user's own folder of videos: manifest or text files, resizing, and each bad input as one line
naming the file.
"""

import json

import numpy as np
import pytest
from sla2_eval.videos.dataset import read_folder, write_folder
from sla2_eval.videos.video import VideoError, read_video, write_video

SIZE = {"num_frames": 3, "height": 8, "width": 16}


@pytest.fixture
def folder(tmp_path):
    frames = np.zeros((5, 8, 16, 3), dtype=np.uint8)
    frames[:, :, 8:] = 200
    write_folder(tmp_path / "data", [(frames, "half"), (frames[::-1], "again")], fps=8, upscale=2)
    return tmp_path / "data"


def test_folder_is_read_back_resized_and_cut(folder):
    data = read_folder(folder, **SIZE)
    assert data.videos.shape == (2, 3, 8, 16, 3)
    assert data.captions == ["half", "again"]
    assert abs(int(data.videos[0, 0, 4, 2, 0])) < 12
    assert abs(int(data.videos[0, 0, 4, 13, 0]) - 200) < 12


def test_text_files_beside_the_videos_are_captions(folder):
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"00000\.mp4: expected a caption"):
        read_folder(folder, **SIZE)
    for name in ("00000", "00001"):
        (folder / f"{name}.txt").write_text(f"number {name}\n")
    assert read_folder(folder, **SIZE).captions == ["number 00000", "number 00001"]


def test_captions_as_editors_leave_them(folder):
    """A byte order mark, Windows line ends, an empty line, a line separator inside a caption, a
    name in capitals.
    """
    rows = [{"file_name": f"{i:05d}.mp4", "caption": f"caption\u2028{i}"} for i in range(2)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n\r\n")
    assert read_folder(folder, **SIZE).captions == ["caption\u20280", "caption\u20281"]
    (folder / "metadata.jsonl").unlink()
    for i in range(2):
        (folder / f"{i:05d}.mp4").rename(folder / f"{i:05d}.MP4")
        (folder / f"{i:05d}.txt").write_bytes("\ufeffnuméro".encode())
    assert read_folder(folder, **SIZE).captions == ["numéro"] * 2


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{broken", "metadata.jsonl line 1: expected"),
        (json.dumps({"file_name": "../x.mp4", "caption": "c"}), "inside the folder"),
    ],
)
def test_bad_manifest_lines(folder, line, match):
    (folder / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=match):
        read_folder(folder, **SIZE)


def test_bad_folders_and_short_videos(folder, tmp_path):
    with pytest.raises(ValueError, match="nothing: expected a folder"):
        read_folder(tmp_path / "nothing", **SIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: expected mp4 files"):
        read_folder(tmp_path / "empty", **SIZE)
    with pytest.raises(ValueError, match=r"00000\.mp4: expected at least 9 frames, got 5"):
        read_folder(folder, **(SIZE | {"num_frames": 9}))


def test_unreadable_videos_are_named(folder, tmp_path):
    whole = (folder / "00000.mp4").read_bytes()
    cases = {
        "empty.mp4": b"",
        "text.mp4": b"not a video at all",
        "cut.mp4": whole[: len(whole) // 2],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match=name) as caught:
            read_video(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(VideoError, match=r"none\.mp4: expected a video file, got nothing there"):
        read_video(tmp_path / "none.mp4")


@pytest.mark.parametrize("shape", [(4, 7, 8, 3), (4, 8, 8), (0, 8, 8, 3)])
def test_bad_frames_leave_nothing_behind(tmp_path, shape):
    with pytest.raises(ValueError, match="frames: expected"):
        write_video(tmp_path / "x.mp4", np.zeros(shape, dtype=np.uint8), 8)
    with pytest.raises(ValueError, match="frames: expected uint8"):
        write_video(tmp_path / "x.mp4", np.zeros((2, 8, 8, 3)), 8)
    assert list(tmp_path.iterdir()) == []
