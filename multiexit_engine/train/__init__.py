"""Training of multi-exit models: small ones from text, exit heads for finished ones.

Built on transformers' networks; it does not know the engine that serves what it makes.
"""

from multiexit_engine.train.causal import TrainingReport, train_causal
from multiexit_engine.train.causal_config import CausalTrainingConfig, TrainingProgress
from multiexit_engine.train.heads import HeadTrainingConfig, train_exit_heads

__all__ = [
    "CausalTrainingConfig",
    "HeadTrainingConfig",
    "TrainingProgress",
    "TrainingReport",
    "train_causal",
    "train_exit_heads",
]
