"""TurboDiffusion's SLA checkpoints: Wan with SLA trained by others, in the layouts in which they
are passed on, as a diffusers transformer with SLA on it.
"""

from sla2_core.integrations.turbodiffusion.loading import load_turbodiffusion, restart_as_sla2
from sla2_core.integrations.turbodiffusion.writing import import_turbodiffusion

__all__ = ["import_turbodiffusion", "load_turbodiffusion", "restart_as_sla2"]
