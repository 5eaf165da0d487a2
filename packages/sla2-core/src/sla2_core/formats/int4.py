"""int4: Q K^T in INT4, P V in FP8; simulated, for study."""

from __future__ import annotations

from sla2_core.formats.base import Scaled
from sla2_core.registry import FORMATS


@FORMATS.register("int4")
class Int4(Scaled):
    """INT4 (limit 7) for Q and K, E4M3 for P and V."""

    qk, pv = "int4", "fp8"
    cpu = ("int4", "fp8")
