"""Whole mp4 files without a frame."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def sound_alone(path: Path) -> None:
    """A second of silence, and no video stream."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def no_frames(path: Path) -> None:
    """A video stream that holds nothing."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height = stream.width = 32
        container.start_encoding()
