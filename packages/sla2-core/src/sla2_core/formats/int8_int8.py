"""int8_int8: both products in INT8, for GPUs without FP8."""

from __future__ import annotations

from sla2_core.formats.base import Scaled
from sla2_core.registry import FORMATS


@FORMATS.register("int8_int8")
class Int8Int8(Scaled):
    """INT8 for Q, K, P and V."""

    qk, pv = "int8", "int8"
    cpu = ("int8", "int8")
    cuda = "int8_int8"
