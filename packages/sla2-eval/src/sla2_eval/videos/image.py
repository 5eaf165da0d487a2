"""Reading and writing pictures (Pillow): what image models make, scored as videos of one frame."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1")  # of 8 bits a channel, or fewer


def read_image(path: Path) -> np.ndarray:
    """The pixels, uint8 (1, H, W, 3) RGB, turned upright as the file says.

    Raises ValueError, in one line that names the file, for another kind of file, a broken one,
    several pictures in one, more than 8 bits a channel, and one that is transparent anywhere.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=_FORMATS) as file:
            if (count := getattr(file, "n_frames", 1)) > 1:
                raise ValueError(f"{path}: expected one picture, got {count}")
            if file.mode not in _MODES:
                raise ValueError(
                    f"{path}: expected a picture of 8 bits a channel in RGB, got {file.mode}"
                )
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                if np.asarray(image.getchannel("A")).min() < 255:
                    raise ValueError(f"{path}: expected an opaque picture, got a transparent one")
            return np.asarray(image.convert("RGB"))[None]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected a readable picture, got: {error}") from error


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 (H, W, 3) RGB as PNG, in place only when complete. Raises OSError where the
    folder is unwritable.
    """
    from PIL import Image

    partial = path.with_name(f".{uuid.uuid4().hex}.partial.png")
    try:
        Image.fromarray(pixels).save(partial, "PNG")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
