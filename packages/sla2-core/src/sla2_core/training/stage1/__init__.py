"""Stage 1 (Alg. 1): the router and alpha against full attention's output."""

from sla2_core.training.stage1.train import (
    Stage1Config,
    Stage1Report,
    load_router,
    load_stage1,
    train_router,
    train_stage1,
)

__all__ = [
    "Stage1Config",
    "Stage1Report",
    "load_router",
    "load_stage1",
    "train_router",
    "train_stage1",
]
