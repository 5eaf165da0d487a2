"""Stage 2 (Alg. 1): the model end to end, with the hard operator."""

from sla2_core.training.stage2.train import (
    Stage2Config,
    Stage2Report,
    TrainingStopped,
    train_stage2,
)

__all__ = ["Stage2Config", "Stage2Report", "TrainingStopped", "train_stage2"]
