"""torchvision's RAFT from a local file: the optical flow between two frames. Used by several
metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def optical_flow(settings: dict, device: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The flow from one uint8 (H, W, 3) frame to another in pixels, float32 (2, h, w), of frames
    padded to multiples of 8.

    `settings`: "model", a name of torchvision's, and "iterations". Its C_T_V1 weights are the
    original's raft-things, which VBench uses; C_T_V2 are torchvision's own training.
    """
    import torch
    import torchvision

    from sla2_eval.scoring.metrics.loading import fill, load_tensors

    model = getattr(torchvision.models.optical_flow, settings["model"])(
        weights=None, progress=False
    )
    model = fill(model, load_tensors("raft", settings), "raft").to(device)

    def flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            pair = [_padded(frame, device) for frame in (first, second)]
            return model(*pair, num_flow_updates=settings["iterations"])[-1][0].cpu().numpy()

    return flow


def _padded(frame: np.ndarray, device: str) -> Tensor:
    """A uint8 (H, W, 3) frame as float (1, 3, h, w) in [-1, 1], replicated at its borders to
    multiples of 8.
    """
    import torch
    from torch.nn.functional import pad

    x = torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1
    down, across = -x.shape[-2] % 8, -x.shape[-1] % 8
    return pad(
        x, (across // 2, across - across // 2, down // 2, down - down // 2), mode="replicate"
    )


def strongest(flow: np.ndarray, share: float) -> float:
    """Mean length of the longest `share` of the vectors of a flow (2, H, W), in pixels."""
    import numpy as np

    lengths = np.sqrt((flow.astype(np.float64) ** 2).sum(0)).reshape(-1)
    count = max(1, int(share * lengths.size))
    return float(np.sort(lengths)[-count:].mean())
