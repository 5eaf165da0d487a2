"""Pictures: read as videos of one frame, and refused in one line where 8 bits of RGB do not hold
them.
"""

import numpy as np
import pytest
from PIL import Image
from sla2_eval.videos.image import write_image
from sla2_eval.videos.manifest import read_manifest
from sla2_eval.videos.video import VideoError, read_video

PIXELS = np.random.default_rng(0).integers(0, 256, (13, 21, 3), dtype=np.uint8)


def test_what_is_written_is_read_back(tmp_path):
    write_image(tmp_path / "a.png", PIXELS)
    found = read_video(tmp_path / "a.png")
    assert found.fps == 0
    np.testing.assert_array_equal(found.frames, PIXELS[None])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_pictures_are_read_as_they_are_shown(tmp_path):
    turned = Image.fromarray(PIXELS)
    turned.getexif()[0x0112] = 6  # shown turned to the right
    turned.save(tmp_path / "a.png", exif=turned.getexif())
    expected = np.rot90(PIXELS, -1)[None]
    np.testing.assert_array_equal(read_video(tmp_path / "a.png").frames, expected)
    grey = Image.fromarray(PIXELS).convert("LA")  # opaque
    grey.save(tmp_path / "b.png")
    assert (read_video(tmp_path / "b.png").frames == np.asarray(grey)[None, ..., :1]).all()


def _save(path, kind: str) -> None:
    image = Image.fromarray(PIXELS)
    if kind == "transparent":
        image.putalpha(128)
    elif kind == "deep":
        image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    more = [Image.fromarray(255 - PIXELS)] if kind == "moving" else []
    image.save(path, "PNG", save_all=bool(more), append_images=more)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "text":
        path.write_text("not a picture")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("transparent", "expected an opaque picture, got a transparent one"),
        ("deep", "expected a picture of 8 bits a channel in RGB, got I;16"),
        ("moving", "expected one picture, got 2"),
        ("cut", "expected a readable picture, got"),
        ("text", "expected a readable picture, got"),
    ],
)
def test_other_pictures_are_refused(tmp_path, kind, said):
    _save(tmp_path / "a b.png", kind)
    with pytest.raises(VideoError, match=rf"a b\.png: {said}") as caught:
        read_video(tmp_path / "a b.png")
    assert "\n" not in str(caught.value)


def test_a_folder_without_videos_is_one_of_pictures(tmp_path):
    for name in ("b-1.PNG", "a-0.jpg", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    assert [(e.prompt, e.index) for e in read_manifest(tmp_path)] == [("a", 0), ("b", 1)]
    (tmp_path / "c-0.mp4").touch()
    assert [entry.file_name for entry in read_manifest(tmp_path)] == ["c-0.mp4"]
