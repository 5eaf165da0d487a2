"""Reads colour, shape and motion back from a video of shapes, without a learned part: the caption
accuracy of the tiny model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sla2_eval.tiny.shapes import (
    BACKGROUND,
    COLOURS,
    MOTIONS,
    RADIUS,
    SHAPES,
    Scene,
    coverage,
    parse_caption,
)

_NOMINAL_AREA = {shape: float(coverage(shape, 16.0, 16.0).sum()) for shape in SHAPES}
_MIN_TRAVEL = 6.0  # pixels over the whole video; the data set moves at least 12
_MAX_STEP = 3.5  # pixels between neighbouring frames; the data set moves at most 1.25


@dataclass(frozen=True)
class Detection:
    """Whether the captioned mover was found in its colour, and which of its other attributes agree
    with the caption.
    """

    visible: bool
    shape: bool
    motion: bool
    other: bool  # the second shape has its colour and shape; True where the caption has none

    @property
    def correct(self) -> bool:
        """The captioned shape, in the captioned colour, moving the captioned way; `other` is
        reported beside it.
        """
        return bool(self.visible and self.shape and self.motion)


def colour_masks(video: np.ndarray) -> dict[str, np.ndarray]:
    """Pixels nearest to each palette colour: bool (T, H, W) each. `video` is float (T, H, W, 3) in
    [0, 1].
    """
    palette = np.asarray([BACKGROUND, *COLOURS.values()], dtype=np.float32)
    distance = ((video[..., None, :] - palette) ** 2).sum(-1)
    nearest = np.where(distance.min(-1) < 0.25, distance.argmin(-1), -1)
    return {name: nearest == i + 1 for i, name in enumerate(COLOURS)}


def _centroid(mask: np.ndarray) -> np.ndarray:
    y, x = np.nonzero(mask)
    return np.array([x.mean(), y.mean()])


def _shape_of(mask: np.ndarray) -> str:
    """The template with the best overlap at the mask's bounding-box centre, shifted by up to a
    pixel.
    """
    y, x = np.nonzero(mask)
    cx, cy = x.mean(), y.mean()
    scores = {}
    for shape in SHAPES:
        radius = RADIUS * np.sqrt(mask.sum() / _NOMINAL_AREA[shape])
        best = 0.0
        for ox in (-0.5, 0.0, 0.5):
            for oy in (-0.5, 0.0, 0.5):
                template = coverage(shape, cx + ox, cy + oy, radius) > 0.5
                best = max(best, float((template & mask).sum() / max(1, (template | mask).sum())))
        scores[shape] = best
    return max(scores, key=scores.__getitem__)


def _moves(track: np.ndarray, frames: np.ndarray, scene: Scene) -> bool:
    """The track (n, 2), seen at `frames` (n,), goes along the captioned axis: steadily, or there
    and back if it collides.
    """
    axis = MOTIONS[scene.motion]
    along, across = track[:, axis], track[:, 1 - axis]
    if along[len(along) // 2] < along[0]:  # either way along the axis
        along = -along
    smooth = bool((np.abs(np.diff(along)) <= _MAX_STEP * np.diff(frames)).all()) and bool(
        np.ptp(across) <= 4.0
    )
    if scene.relation == "colliding with":
        turn = int(along.argmax())
        return smooth and along[turn] - along[0] >= 2.0 and along[turn] - along[-1] >= 2.0
    return smooth and along[-1] - along[0] >= _MIN_TRAVEL


def _found(mask: np.ndarray, shape: str, least: int) -> tuple[np.ndarray, bool]:
    """Frames that show at least half the shape's area, and whether the best-seen of them have that
    shape.
    """
    area = mask.sum((1, 2)) / _NOMINAL_AREA[shape]
    frames = np.nonzero((area > 0.5) & (area < 1.6))[0]
    if len(frames) < least:
        return frames, False
    whole = frames[np.argsort(-area[frames], kind="stable")][: max(4, len(frames) // 3)]
    votes = [_shape_of(mask[t]) for t in whole]
    return frames, votes.count(shape) * 2 > len(votes)


def detect(video: np.ndarray, caption: str) -> Detection:
    """Compare `video`, float (T, H, W, 3) in [0, 1], with `caption`. Raises ValueError for a
    foreign caption.
    """
    scene = parse_caption(caption)
    masks = colour_masks(video)
    num_frames = len(video)
    frames, shape_ok = _found(masks[scene.colour], scene.shape, num_frames // 2)
    visible = len(frames) >= num_frames // 2
    motion = visible and _moves(
        np.stack([_centroid(masks[scene.colour][t]) for t in frames]), frames, scene
    )
    other = True
    if scene.relation != "alone":
        colour, shape = scene.other
        _, other = _found(masks[colour], shape, num_frames // 3)
    return Detection(visible=visible, shape=shape_ok, motion=motion, other=other)
