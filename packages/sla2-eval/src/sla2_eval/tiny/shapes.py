"""The built-in data set: short videos of moving, colliding and occluding shapes, each with a
caption.

A scene is drawn from a numpy Generator and rendered exactly (anti-aliased, constant velocity,
elastic collisions), so a video and its caption follow from (seed, index) alone. `detector.py` reads
the same attributes back from pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_FRAMES = 16
SIZE = 32
FPS = 8
BACKGROUND = (0.10, 0.10, 0.10)
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.30, 0.95),
    "yellow": (0.95, 0.90, 0.15),
    "magenta": (0.90, 0.20, 0.90),
    "cyan": (0.15, 0.90, 0.90),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS: dict[str, int] = {
    "horizontally": 0,
    "vertically": 1,
}  # the axis; which way along it the caption does not say
RELATIONS = ("alone", "in front of", "behind", "colliding with")
RADIUS = 5.0  # pixels; every shape has about the same area

WORDS = (
    "a",
    "and",
    "moving",
    "in",
    "front",
    "of",
    "behind",
    "colliding",
    "with",
    *COLOURS,
    *SHAPES,
    *MOTIONS,
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a caption says: the mover, its axis of motion, and how it meets the second shape (if
    there is one).
    """

    colour: str
    shape: str
    motion: str
    relation: str = "alone"
    other_colour: str | None = None
    other_shape: str | None = None

    @property
    def other(self) -> tuple[str, str]:
        """Colour and shape of the second shape. Raises ValueError if there is none."""
        if self.other_colour is None or self.other_shape is None:
            raise ValueError(f"scene: expected a second shape, got {self.relation!r}")
        return self.other_colour, self.other_shape

    @property
    def caption(self) -> str:
        text = f"a {self.colour} {self.shape} moving {self.motion}"
        if self.relation == "alone":
            return text
        return f"{text} {self.relation} a {self.other_colour} {self.other_shape}"


def parse_caption(caption: str) -> Scene:
    """The Scene a caption describes. Raises ValueError, with the caption, if it is not of this data
    set's form.
    """
    for relation in RELATIONS[1:]:
        head, found, tail = caption.partition(f" {relation} ")
        if found:
            break
    else:
        head, relation, tail = caption, "alone", ""
    words, others = head.split(), tail.split()
    ok = len(words) == 5 and words[0] == "a" and words[3] == "moving"
    ok = ok and words[1] in COLOURS and words[2] in SHAPES and words[4] in MOTIONS
    if relation != "alone":
        ok = (
            ok
            and len(others) == 3
            and others[0] == "a"
            and others[1] in COLOURS
            and others[2] in SHAPES
        )
    if not ok:
        raise ValueError(
            "caption: expected 'a COLOUR SHAPE moving AXIS [RELATION a COLOUR SHAPE]', got"
            f" {caption!r}"
        )
    second = {} if relation == "alone" else {"other_colour": others[1], "other_shape": others[2]}
    return Scene(colour=words[1], shape=words[2], motion=words[4], relation=relation, **second)


def sample_scene(rng: np.random.Generator) -> Scene:
    """Half of the scenes hold one shape; the others split evenly over passing in front, behind, and
    colliding.
    """
    colours = rng.permutation(list(COLOURS))
    shapes = rng.choice(SHAPES, size=2)
    relation = "alone" if rng.random() < 0.5 else str(rng.choice(RELATIONS[1:]))
    second = (
        {}
        if relation == "alone"
        else {"other_colour": str(colours[1]), "other_shape": str(shapes[1])}
    )
    return Scene(
        colour=str(colours[0]),
        shape=str(shapes[0]),
        motion=str(rng.choice(list(MOTIONS))),
        relation=relation,
        **second,
    )


def coverage(shape: str, x: float, y: float, radius: float = RADIUS) -> np.ndarray:
    """Fraction of each pixel that the shape centred at (x, y) covers: float32 (SIZE, SIZE),
    anti-aliased edges.
    """
    grid = np.arange(SIZE, dtype=np.float32)
    dx, dy = grid[None, :] - x, grid[:, None] - y
    if shape == "circle":
        inside = radius - np.sqrt(dx**2 + dy**2)
    elif shape == "square":
        inside = 0.89 * radius - np.maximum(np.abs(dx), np.abs(dy))
    else:  # upward triangle, centroid at (x, y)
        height = 2.35 * radius
        inside = np.minimum(height / 3 - dy, (2 * height / 3 + dy - 1.75 * np.abs(dx)) / 2.015)
    return np.clip(inside + 0.5, 0.0, 1.0).astype(np.float32)


def _tracks(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """Centres of mover and other, float (NUM_FRAMES, 2) as (x, y)."""
    along = MOTIONS[scene.motion]
    sign = rng.choice([-1.0, 1.0])
    low, high = RADIUS + 1.0, SIZE - 2.0 - RADIUS
    time = np.arange(NUM_FRAMES)[:, None]
    centre = np.empty(2)
    centre[1 - along] = rng.uniform(low, high)
    if scene.relation == "colliding with":
        speed, contact = rng.uniform(0.7, 1.0), 2 * RADIUS
        meet = (low + high) / 2 + rng.uniform(-1.0, 1.0)
        frame = rng.uniform(6.0, 8.0)  # of the collision
        swing = (
            np.abs(time - frame) * speed
        )  # distance from the contact point, shrinking then growing
        mover, other = (
            np.repeat(centre[None], NUM_FRAMES, 0),
            np.repeat(centre[None], NUM_FRAMES, 0),
        )
        mover[:, along] = np.clip(meet - sign * (contact / 2 + swing[:, 0]), low - 1.0, high + 1.0)
        other[:, along] = np.clip(meet + sign * (contact / 2 + swing[:, 0]), low - 1.0, high + 1.0)
        return mover, other
    speed = rng.uniform(0.85, 1.25)
    reach = speed * (NUM_FRAMES - 1)
    start = rng.uniform(low, high - reach) if high - reach > low else (low + high - reach) / 2
    centre[along] = start if sign > 0 else SIZE - 1 - start
    mover = np.repeat(centre[None], NUM_FRAMES, 0)
    mover[:, along] += sign * speed * time[:, 0]
    if scene.relation == "alone":
        return mover, None
    middle = mover[NUM_FRAMES // 2].copy()
    middle[along] += rng.uniform(-1.5, 1.5)
    offset = rng.uniform(3.5, 5.5) * rng.choice([-1, 1])  # so that both shapes stay partly in view
    if not low <= middle[1 - along] + offset <= high:
        offset = -offset
    middle[1 - along] += offset
    return mover, np.repeat(middle[None], NUM_FRAMES, 0)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The video of a scene, positions and speed drawn from `rng`: float32 (NUM_FRAMES, SIZE, SIZE,
    3) in [0, 1].
    """
    mover, other = _tracks(scene, rng)
    layers = [(scene.shape, scene.colour, mover)]
    if other is not None:
        colour, shape = scene.other
        layers.insert(1 if scene.relation == "behind" else 0, (shape, colour, other))
    video = np.empty((NUM_FRAMES, SIZE, SIZE, 3), dtype=np.float32)
    video[:] = BACKGROUND
    for shape, colour, track in layers:
        for t in range(NUM_FRAMES):
            cover = coverage(shape, *track[t])[..., None]
            video[t] = (
                video[t] * (1 - cover) + np.asarray(COLOURS[colour], dtype=np.float32) * cover
            )
    return video


def sample(seed: int, index: int) -> tuple[np.ndarray, str]:
    """Video and caption number `index` of the data set `seed`."""
    rng = np.random.default_rng([seed, index])
    scene = sample_scene(rng)
    return render(scene, rng), scene.caption
