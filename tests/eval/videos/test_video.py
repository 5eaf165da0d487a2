"""Decoding: what is written is read back, by PyAV and by torchcodec alike, and broken files are
refused in one line.
"""

import io
import struct
import sys
import tempfile
import types

import av
import numpy as np
import pytest
from helpers import mp4
from PIL import Image
from sla2_eval.scoring import metrics
from sla2_eval.scoring.metrics.base import Sample
from sla2_eval.scoring.score import score
from sla2_eval.videos import video
from sla2_eval.videos.video import VideoError, check_decoder, read_video, write_video


def _why_no_torchcodec() -> str | None:
    try:
        check_decoder("torchcodec")
    except ValueError as error:
        return str(error)
    return None


REASON = _why_no_torchcodec()
TORCHCODEC = pytest.param(
    "torchcodec", marks=pytest.mark.skipif(REASON is not None, reason=str(REASON))
)
BOTH = ["pyav", TORCHCODEC]


def moving(frames: int, height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    clip = [
        127 + 80 * np.sin((x + 3 * t) / 7 + c) * np.cos(y / 5)
        for t in range(frames)
        for c in range(3)
    ]
    return np.uint8(clip).reshape(frames, 3, height, width).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("decoder", BOTH)
def test_what_is_written_is_read_back(tmp_path, decoder):
    frames = moving(7, 46, 70)
    write_video(tmp_path / "a.mp4", frames, 12, crf=1)
    found = read_video(tmp_path / "a.mp4", decoder)
    assert found.fps == 12
    assert found.frames.dtype == np.uint8
    assert found.frames.shape == (7, 46, 70, 3)
    assert np.abs(found.frames.astype(int) - frames).mean() < 6  # yuv420p halves the chroma
    assert np.argmin([np.abs(found.frames[3].astype(int) - frame).mean() for frame in frames]) == 3


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.mkv", "ffv1", "bgr0"),
        ("a.mov", "mjpeg", "yuvj444p"),
    ],
)
def test_other_containers_are_read(tmp_path, name, codec, pixels):
    frames = moving(3, 34, 52)
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=12)
        stream.height, stream.width, stream.pix_fmt = 34, 52, pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    found = read_video(tmp_path / name)
    assert (found.fps, found.frames.shape) == (12, frames.shape)
    assert np.abs(found.frames.astype(int) - frames).mean() < (0.01 if codec == "ffv1" else 12)


@pytest.mark.parametrize("decoder", BOTH)
def test_lossless_files_give_every_frame_back(tmp_path, decoder):
    frames = np.random.default_rng(0).integers(0, 256, (5, 33, 47, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, 12, lossless=True)
    found = read_video(tmp_path / "a.mp4", decoder)
    assert found.fps == 12
    np.testing.assert_array_equal(found.frames, frames)


def test_the_same_frames_give_the_same_file(tmp_path):
    rng = np.random.default_rng(0)
    for shape in ((5, 32, 32, 3), (5, 64, 96, 3)):
        frames, files = rng.integers(0, 255, shape, dtype=np.uint8), set()
        for _ in range(30):
            write_video(tmp_path / "a.mp4", frames, 8)
            read_video(tmp_path / "a.mp4")  # leaves memory behind that is not zero
            files.add((tmp_path / "a.mp4").read_bytes())
        assert len(files) == 1


@pytest.mark.parametrize("decoder", [TORCHCODEC])
def test_torchcodec_gives_pyavs_frames(make_folder, tmp_path, decoder):
    for number, (frames, height, width) in enumerate(
        [(5, 48, 64), (3, 50, 70), (17, 480, 720), (1, 16, 16)]
    ):
        path = tmp_path / f"{number}.mp4"
        write_video(path, moving(frames, height, width), 8)
        mine, theirs = read_video(path, decoder), read_video(path)
        assert mine.fps == theirs.fps
        # The same FFmpeg gives the same bytes; another version's conversion from YUV may round
        # otherwise.
        assert np.abs(mine.frames.astype(int) - theirs.frames).max() <= 1
    videos, reference = make_folder("a", 2, noise=9.0), make_folder("b", 2)
    names = ["psnr", "temporal_flickering"]
    torchcodec = score(videos, reference, names, tmp_path / "out", decoder=decoder)
    pyav = score(videos, reference, names, tmp_path / "out")
    for name in names:
        assert torchcodec["metrics"][name]["settings"]["decoder"] == decoder
        assert torchcodec["metrics"][name]["mean"] == pytest.approx(
            pyav["metrics"][name]["mean"], rel=1e-3
        )


def _audio_with_cover(path) -> None:
    """Music with a picture of its cover, which FFmpeg shows as a video stream."""

    def box(kind: bytes, payload: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(payload), kind) + payload

    mp4.sound_alone(path)
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(picture, "JPEG")
    covers = box(
        b"ilst", box(b"covr", box(b"data", struct.pack(">II", 13, 0) + picture.getvalue()))
    )
    handler = box(b"hdlr", struct.pack(">II4sIIIB", 0, 0, b"mdir", 0, 0, 0, 0))
    about = box(b"udta", box(b"meta", struct.pack(">I", 0) + handler + covers))
    data = path.read_bytes()  # which ends with its "moov" box
    start = data.index(b"moov") - 4
    size = struct.unpack_from(">I", data, start)[0] + len(about)
    path.write_bytes(data[:start] + struct.pack(">I", size) + data[start + 4 :] + about)
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1


def test_a_large_video_lies_in_a_file_without_a_name(tmp_path, monkeypatch):
    """Its frames are those of one in memory, and metrics may take pieces of it as of any array."""
    frames = moving(7, 32, 48)
    write_video(tmp_path / "a.mp4", frames, 8)
    held = read_video(tmp_path / "a.mp4").frames
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(video, "_IN_MEMORY", 3 * frames[0].size)
    found = read_video(tmp_path / "a.mp4").frames
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, held)
    assert list((tmp_path / "tmp").iterdir()) == []
    score = metrics.load("temporal_flickering", {})
    assert score(Sample(found, 8)) == score(Sample(held, 8))


def _between_frames(path) -> None:
    """Cut where a frame ends, its index in front: nothing is damaged, there is only less than the
    header says.
    """
    with (
        av.open(str(path)) as source,
        av.open(f"{path}.2", "w", format="mp4", options={"movflags": "faststart"}) as sink,
    ):
        stream = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                sink.mux(packet)
    path.with_name(f"{path.name}.2").replace(path)
    with av.open(str(path)) as container:
        at = sorted(packet.pos for packet in container.demux(video=0) if packet.pos)
    path.write_bytes(path.read_bytes()[: at[5]])


BREAK = {
    "between frames": _between_frames,
    "absent": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a video at all\n" * 40),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-400]),
    "audio": mp4.sound_alone,
    "no frames": mp4.no_frames,
}


@pytest.mark.parametrize("how", BREAK)
@pytest.mark.parametrize("decoder", BOTH)
def test_broken_files_are_refused_in_one_line(tmp_path, decoder, how):
    path = tmp_path / "a b.mp4"
    write_video(path, moving(9, 32, 48), 8)
    BREAK[how](path)
    with pytest.raises(VideoError) as caught:
        read_video(path, decoder)
    assert str(caught.value).startswith(f"{path}: expected ")
    assert "\n" not in str(caught.value)
    if how == "between frames" and decoder == "pyav":
        assert str(caught.value).endswith(
            "expected 9 frames as its header says, got 5 (truncated file)"
        )


def test_a_video_of_an_unknown_codec_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, moving(3, 32, 32), 8)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"none"))
    with pytest.raises(
        VideoError, match=r"a\.mp4: expected a readable video, got an unknown codec"
    ):
        read_video(path)


def test_pictures_and_playlists_are_no_videos(tmp_path):
    write_video(tmp_path / "other.mp4", moving(9, 32, 48), 8)
    Image.fromarray(moving(1, 32, 48)[0]).save(tmp_path / "picture.mp4", "PNG")
    (tmp_path / "playlist.mp4").write_text("ffconcat version 1.0\nfile 'other.mp4'\n")
    for name in ("picture.mp4", "playlist.mp4"):
        with pytest.raises(
            VideoError, match=f"{name}: expected a readable video, got another kind of file"
        ):
            read_video(tmp_path / name)


def test_the_cover_of_music_is_no_video(tmp_path):
    _audio_with_cover(tmp_path / "music.mp4")
    with pytest.raises(
        VideoError, match=r"music\.mp4: expected a video stream, got 1 audio stream"
    ):
        read_video(tmp_path / "music.mp4")


def test_what_an_edit_list_cuts_off_is_not_missing(tmp_path):
    """As `ffmpeg -ss ... -c copy` leaves it: the file still holds, and its header counts, frames
    that no player shows.
    """
    path = tmp_path / "a.mp4"
    write_video(path, moving(9, 32, 48), 8)
    whole = read_video(path).frames
    data = bytearray(path.read_bytes())
    at = (
        data.index(b"elst") + 12
    )  # version and flags, one entry; then its duration, and where it begins in the media
    duration, begin = struct.unpack_from(">II", data, at)
    with av.open(str(path)) as container:
        frame = round(1 / 8 / container.streams.video[0].time_base)
    for kept, begins in [(slice(3, 9), begin + 3 * frame), (slice(0, 6), begin)]:
        struct.pack_into(">II", data, at, duration * 6 // 9, begins)
        path.write_bytes(data)
        assert np.array_equal(read_video(path).frames, whole[kept])


def test_names_with_a_colon_are_no_protocols(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("Noir: a city at night-0.mp4", moving(3, 32, 48), 8)
    assert len(read_video("Noir: a city at night-0.mp4").frames) == 3


@pytest.mark.parametrize("fps", [12.5, 24000 / 1001, 0.5])
def test_frame_rates_are_not_rounded(tmp_path, fps):
    write_video(tmp_path / "a.mp4", moving(3, 32, 48), fps)
    assert read_video(tmp_path / "a.mp4").fps == pytest.approx(fps, rel=1e-6)


def _tagged(path, frames, *, matrix=None, transfer=2) -> None:
    """Write frames as a phone does: turned or mirrored by a matrix in the header, or of another
    transfer function.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.codec_context.color_trc = transfer
        if matrix:
            stream.set_display_matrix([value << 16 for value in matrix] + [0, 0, 1 << 30])
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# Where a pixel (x, y) is shown: (a x + c y, b x + d y), y downwards.
TURNED = {"left": (0, -1, 0, 1, 0, 0), "right": (0, 1, 0, -1, 0, 0), "over": (-1, 0, 0, 0, -1, 0)}


@pytest.mark.parametrize("how", TURNED)
def test_turned_videos_are_shown_upright(tmp_path, how):
    """As players do, so that a metric sees a portrait as one."""
    frames = moving(3, 34, 52)
    frames[:, :10, :20] = 255
    _tagged(tmp_path / "a.mp4", frames, matrix=TURNED[how])
    turns = {"left": 1, "right": -1, "over": 2}[how]
    found = read_video(tmp_path / "a.mp4").frames
    expected = np.rot90(frames, turns, axes=(1, 2))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() < 9
    with pytest.raises(VideoError, match=r"a\.mp4: expected an upright video for torchcodec, got"):
        video._check_upright(tmp_path / "a.mp4", str(tmp_path / "a.mp4"))


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ({"transfer": 16}, r"standard dynamic range, got PQ \(SMPTE 2084\)"),
        ({"transfer": 18}, r"standard dynamic range, got HLG"),
        ({"matrix": (-1, 0, 0, 0, 1, 0)}, "turned by quarters, got a mirrored one"),
        ({"matrix": (1, -1, 0, 1, 1, 0)}, "turned by quarters, got one turned by 45 degrees"),
    ],
)
def test_what_eight_bits_upright_cannot_show_is_refused(tmp_path, tag, said):
    _tagged(tmp_path / "a.mp4", moving(3, 34, 52), **tag)
    with pytest.raises(VideoError, match=rf"a\.mp4: expected a video .*{said}"):
        read_video(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match=said):
        video._check_upright(tmp_path / "a.mp4", str(tmp_path / "a.mp4"))


def test_a_decoder_that_does_not_work_is_refused_before_anything_is_done(
    make_folder, tmp_path, monkeypatch
):
    videos = make_folder("a", 1)
    arguments = {"videos": videos, "metrics": ["temporal_flickering"], "out": tmp_path / "out"}
    with pytest.raises(ValueError, match="decoder: expected pyav or torchcodec, got 'opencv'"):
        score(**arguments, decoder="opencv")
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(
        ValueError, match=r"decoder: expected the Python package torchcodec, got none"
    ):
        score(**arguments, decoder="torchcodec")
    monkeypatch.setitem(sys.modules, "torchcodec", types.SimpleNamespace(ffmpeg_major_version=None))
    with pytest.raises(
        ValueError, match="decoder: expected an FFmpeg whose libraries torchcodec finds, got none"
    ):
        score(**arguments, decoder="torchcodec")
    assert not (tmp_path / "out").exists()


def test_odd_or_wrong_frames_are_not_written(tmp_path):
    for frames, said in [
        (moving(2, 16, 17), r"even height and width .*got \(16, 17\)"),
        (moving(2, 16, 16)[:0], "T >= 1"),
        (moving(2, 16, 16).astype(np.float32), "uint8"),
        (moving(2, 16, 16)[..., :1], "uint8"),
    ]:
        with pytest.raises(ValueError, match=said):
            write_video(tmp_path / "a.mp4", frames, 8)
    assert list(tmp_path.iterdir()) == []
