"""fp8: both products in FP8 E4M3."""

from __future__ import annotations

from sla2_core.formats.base import Scaled
from sla2_core.registry import FORMATS


@FORMATS.register("fp8")
class Fp8(Scaled):
    """E4M3 for Q, K, P and V."""

    qk, pv = "fp8", "fp8"
    cpu = ("fp8", "fp8")
    cuda = "fp8"
