"""int8: Q K^T in INT8, P V in FP8 E4M3; the default low bit of SLA2."""

from __future__ import annotations

from sla2_core.formats.base import Scaled
from sla2_core.registry import FORMATS


@FORMATS.register("int8")
class Int8(Scaled):
    """SageAttention2++'s formats: INT8 for Q and K, E4M3 for P and V."""

    qk, pv = "int8", "fp8"
    cpu = ("int8", "fp8")
    cuda = "int8"
