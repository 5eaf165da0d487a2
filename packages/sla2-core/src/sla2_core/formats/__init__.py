"""The axis of number formats: one member a file. Importing this folder registers them."""

from sla2_core.formats import fp8, full, int4, int8, int8_int8, nvfp4
from sla2_core.formats.base import Format, Scaled, format_of

__all__ = ["Format", "Scaled", "format_of", "fp8", "full", "int4", "int8", "int8_int8", "nvfp4"]
