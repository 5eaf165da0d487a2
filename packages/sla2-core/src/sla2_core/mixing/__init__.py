"""The axis of mixing: how the two branches become one output, one member a file.

Importing this folder registers them.
"""

from sla2_core.mixing import joint, mass, one, position, sum
from sla2_core.mixing.base import Mixing, mix

__all__ = ["Mixing", "joint", "mass", "mix", "one", "position", "sum"]
