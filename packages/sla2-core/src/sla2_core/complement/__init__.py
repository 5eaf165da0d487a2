"""The axis of complements: what the unselected blocks give, one member a file.

Importing this folder registers them.
"""

from sla2_core.complement import coarse, linear, none, pooled, projected
from sla2_core.complement.base import Branch, Complement

__all__ = ["Branch", "Complement", "coarse", "linear", "none", "pooled", "projected"]
