"""Reading and writing video files (PyAV, which brings its own ffmpeg; torchcodec on demand). The
only door to video codecs.
"""

from __future__ import annotations

import itertools
import os
import struct
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from sla2_eval.runs.extras import how_to_get
from sla2_eval.videos import image


class VideoError(ValueError):
    """A video file that cannot be used; the message is one line that names the file."""


@dataclass(frozen=True)
class Video:
    """Decoded frames, uint8 (T, H, W, 3) RGB, and the frame rate in frames per second."""

    frames: np.ndarray
    fps: float


DECODERS = ("pyav", "torchcodec")
_IN_MEMORY = 1 << 30  # bytes of one decoded video
# FFmpeg's numbers of the transfer functions of high dynamic range
_HDR = {16: "PQ (SMPTE 2084)", 18: "HLG (ARIB STD-B67)"}
# Of FFmpeg's formats those that hold a video: a playlist would open other files, and a picture is
# no video.
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif,nut,ivf,h264,hevc,yuv4mpegpipe"


def check_decoder(name: str) -> None:
    """Raise ValueError in one line if `name` is no decoder, or one that does not work here."""
    if name not in DECODERS:
        raise ValueError(f"decoder: expected {' or '.join(DECODERS)}, got {name!r}")
    if name == "pyav":
        return
    try:
        import torchcodec
    except ImportError:
        raise ValueError(
            "decoder: expected the Python package torchcodec, got none"
            f" ({how_to_get('torchcodec')})"
        ) from None
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"decoder: expected a torchcodec that loads, got: {_first_line(error)}"
        ) from error
    if getattr(torchcodec, "ffmpeg_major_version", 0) is None:
        raise ValueError(
            "decoder: expected an FFmpeg whose libraries torchcodec finds, got none (apt install"
            " ffmpeg)"
        )


def read_video(path: str | Path, decoder: str = "pyav") -> Video:
    """Decode every frame of `path`, turned upright as its header says. Raises VideoError if the
    file is missing, empty, not a video, truncated, mirrored, or of high dynamic range, whose light
    8 bits of RGB do not hold. A picture is a video of one frame, and of no frame rate.

    `decoder`: one of DECODERS. torchcodec uses the system's FFmpeg and gives the same frames as
    PyAV on its version; rotated videos it refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise VideoError(
            f"{path}: expected a video file, got {'a folder' if path.is_dir() else 'nothing there'}"
        )
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: expected a video file, got an empty file")
    if path.suffix.lower() in image.SUFFIXES:
        try:
            return Video(frames=image.read_image(path), fps=0.0)
        except ValueError as error:
            raise VideoError(str(error)) from error
    # Whole paths, as FFmpeg takes what stands before a colon for a protocol.
    frames, fps, declared = (_pyav if decoder == "pyav" else _torchcodec)(
        path, os.path.abspath(path)
    )
    if not len(frames):
        raise VideoError(f"{path}: expected at least one frame, got a video stream without frames")
    if declared and len(frames) < declared:
        raise VideoError(
            f"{path}: expected {declared} frames as its header says, got {len(frames)} (truncated"
            " file)"
        )
    return Video(frames=frames, fps=fps)


def frame_rate(path: str | Path) -> float:
    """Frames per second by the header of a video file, 0 if it cannot be read or does not say."""
    import av

    try:
        with av.open(os.path.abspath(path), options={"format_whitelist": _CONTAINERS}) as container:
            return (
                float(container.streams.video[0].average_rate or 0)
                if container.streams.video
                else 0.0
            )
    except (av.FFmpegError, UnicodeDecodeError):
        return 0.0


def _pyav(path: Path, whole: str) -> tuple[np.ndarray, float, int]:
    """The frames, the frame rate, and how many frames the header declares (0 if it does not say);
    `whole`: the whole path.
    """
    import av
    from av.stream import Disposition

    try:
        with av.open(whole, options={"format_whitelist": _CONTAINERS}) as container:
            videos = [
                s for s in container.streams.video if not s.disposition & Disposition.attached_pic
            ]
            if not videos:
                raise VideoError(
                    f"{path}: expected a video stream, got {len(container.streams.audio)} audio"
                    " stream(s)"
                )
            stream = videos[0]
            if stream.codec_context is None:  # a damaged header, or a codec that FFmpeg lacks
                raise VideoError(f"{path}: expected a readable video, got an unknown codec")
            if stream.codec_context.width * stream.codec_context.height <= 1 << 16:
                stream.codec_context.thread_count = (
                    1  # threads only wait for one another on small frames
                )
            kept = sum(
                not entry.is_discard for entry in stream.index_entries
            )  # without what an edit list cuts off
            declared = stream.frames and (kept or stream.frames)
            fps = float(stream.average_rate or 0)
            decoded = container.decode(stream)
            first = next(decoded, None)
            turns = 0 if first is None else _turns(path, stream, first)
            frames = _collected(
                path,
                (
                    np.rot90(frame.to_ndarray(format="rgb24"), turns)
                    for frame in ([] if first is None else itertools.chain([first], decoded))
                ),
            )
    except (av.FFmpegError, UnicodeDecodeError) as error:
        reason = (
            "another kind of file"
            if isinstance(error, av.ArgumentError)
            else f"a decoding error: {error}"
        )
        raise VideoError(f"{path}: expected a readable video, got {reason}") from error
    return frames, fps, declared


def _collected(path: Path, frames: Iterator[np.ndarray]) -> np.ndarray:
    """The frames of one size as one array (T, H, W, 3).

    Beyond _IN_MEMORY bytes they lie in a temporary file that is mapped, of which the system keeps
    in memory what is in use, so that a pair of long 4K videos needs no tens of gigabytes. The file
    has no name and ends with the array.
    """
    held: list[np.ndarray] = []
    file, count, shape = None, 0, None
    for frame in frames:
        shape = shape or frame.shape
        if frame.shape != shape:
            sizes = sorted({shape[:2], frame.shape[:2]})
            raise VideoError(f"{path}: expected frames of one size, got {sizes}")
        count += 1
        held.append(frame)
        try:
            if file is None and count * frame.size > _IN_MEMORY:
                file = tempfile.TemporaryFile()
            if file is not None:
                for one in held:
                    file.write(one.tobytes())
                held.clear()
                file.flush()
        except OSError as error:
            raise VideoError(
                f"{path}: expected room for its frames in {tempfile.gettempdir()} (TMPDIR), got"
                f" {error.strerror}"
            ) from error
    if shape is None:
        return np.empty((0, 0, 0, 3), np.uint8)
    if file is None:
        return np.stack(held)
    return np.memmap(file, np.uint8, mode="c", shape=(count, *shape))


def _turns(path: Path, stream: Any, first: Any) -> int:
    """How many quarter turns counterclockwise the header asks for, by the first frame of a stream.
    Raises VideoError for another angle, a mirrored video and one of high dynamic range.
    """
    if transfer := _HDR.get(stream.codec_context.color_trc):
        raise VideoError(
            f"{path}: expected a video of standard dynamic range, got {transfer}; tone-map it first"
            " (ffmpeg's filters zscale and tonemap)"
        )
    data = (first.side_data[number] for number in range(len(first.side_data)))
    matrix = next((bytes(item) for item in data if item.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return 0
    a, b, _, c, d = struct.unpack("<5i", matrix[:20])
    if a * d - b * c < 0 or first.rotation % 90:
        what = "a mirrored one" if a * d < b * c else f"one turned by {first.rotation} degrees"
        raise VideoError(f"{path}: expected a video turned by quarters, got {what}")
    return first.rotation // 90


def _check_upright(path: Path, whole: str) -> None:
    """Raise VideoError for what torchcodec would decode as it lies, or as if it were SDR."""
    import av

    try:
        with av.open(whole, options={"format_whitelist": _CONTAINERS}) as container:
            if container.streams.video[0].codec_context is None:
                return  # torchcodec says so
            first = next(container.decode(video=0), None)
            if first is not None and _turns(path, container.streams.video[0], first):
                raise VideoError(
                    f"{path}: expected an upright video for torchcodec, got one turned by"
                    f" {first.rotation} degrees; use --decoder pyav"
                )
    except (av.FFmpegError, UnicodeDecodeError, IndexError):
        pass  # torchcodec says what is wrong


def _torchcodec(path: Path, whole: str) -> tuple[np.ndarray, float, int]:
    """The same through torchcodec, on one thread."""
    from torchcodec.decoders import VideoDecoder

    _check_upright(path, whole)
    try:
        found = VideoDecoder(whole, dimension_order="NHWC", num_ffmpeg_threads=1)
        about, count = found.metadata, len(found)
        frames = (
            found.get_frames_in_range(0, count).data.numpy()
            if count
            else np.empty((0, 0, 0, 3), np.uint8)
        )
    except Exception as error:
        reason = (
            "no video stream"
            if "No valid stream" in str(error)
            else f"a decoding error: {_first_line(error)}"
        )
        raise VideoError(f"{path}: expected a readable video, got {reason}") from error
    return frames, float(about.average_fps_from_header or 0), about.num_frames_from_header or 0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_video(
    path: str | Path, frames: np.ndarray, fps: float, *, crf: int = 12, lossless: bool = False
) -> None:
    """Encode uint8 (T, H, W, 3) RGB frames as H.264 yuv420p mp4, in place only when complete.

    `lossless`: as H.264 of RGB, which gives every frame back to the bit, takes several times the
    space, and is shown by few players. Else height and width must be even. Raises ValueError for
    another shape or dtype, OSError where the folder is unwritable.
    """
    import av

    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) == 0:
        raise ValueError(
            f"frames: expected uint8 (T, H, W, 3) with T >= 1, got {frames.dtype} {frames.shape}"
        )
    if not lossless and (frames.shape[1] % 2 or frames.shape[2] % 2):
        raise ValueError(
            f"frames: expected even height and width (H.264 yuv420p), got {frames.shape[1:3]}"
        )
    partial = path.with_name(
        f".{uuid.uuid4().hex}.partial.mp4"
    )  # the name itself may be as long as may be
    try:
        with av.open(os.path.abspath(partial), mode="w", format="mp4") as container:
            codec = "libx264rgb" if lossless else "libx264"
            rate = Fraction(fps).limit_denominator(1001)
            # PyAV's stubs know the kind of a stream by names of codecs that do not have "rgb".
            stream: Any = container.add_stream(codec, rate=rate)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "rgb24" if lossless else "yuv420p"
            quality = {"qp": "0", "preset": "ultrafast"}
            if not lossless:
                # Where B frames go x264 decides, of small frames, by memory that nothing wrote: the
                # file would be another each time.
                quality = {"crf": str(crf), "preset": "veryfast", "x264-params": "bframes=0"}
            stream.options = {**quality, "threads": "1"}
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
