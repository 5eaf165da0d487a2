"""SLA2 in other people's models: diffusers transformers by family, and call sites of
scaled_dot_product_attention.
"""

from sla2_core.integrations import families

__all__ = ["families"]
