"""nvfp4: both products in NVFP4, values E2M1 with an E4M3 scale for every 16; simulated, for
study.
"""

from __future__ import annotations

from torch import Tensor

from sla2_core.formats.base import Format
from sla2_core.formats.elements import fake_quantize_nvfp4
from sla2_core.registry import FORMATS


@FORMATS.register("nvfp4")
class Nvfp4(Format):
    """NVFP4 for Q and K in groups along d, for P and V in groups along the keys; the groups of keys
    start anew at every key block.
    """

    def round_blocks(self, x: Tensor, block: int) -> Tensor:
        """In groups of 16 along d."""
        return fake_quantize_nvfp4(x)

    def round_values(self, v: Tensor, block_k: int) -> Tensor:
        """In groups of 16 keys of one block, for each channel."""
        return fake_quantize_nvfp4(v.transpose(-1, -2), block_k).transpose(-1, -2)

    def round_probabilities(self, p: Tensor, block_k: int) -> Tensor:
        """In groups of 16 keys of one block; max|P~| is taken as 1."""
        return fake_quantize_nvfp4(p, block_k, amax=1.0)
