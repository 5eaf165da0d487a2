"""The model families, one file each. Importing this folder registers them."""

from sla2_core.integrations.families import (
    cogvideox,
    flux,
    hunyuan_video,
    hunyuan_video15,
    ltx2,
    wan,
)

__all__ = ["cogvideox", "flux", "hunyuan_video", "hunyuan_video15", "ltx2", "wan"]
