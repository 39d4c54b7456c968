"""Training of multi-exit models: small ones from text, ELMERs from pairs, heads for finished ones.

Built on transformers' networks and, for ELMER, one of its own. Only probes learn from what the
engine reads; the others do not know the engine that serves what they make.
"""

from multiexit_engine.train.causal import TrainingReport, train_causal
from multiexit_engine.train.causal_config import CausalTrainingConfig, TrainingProgress
from multiexit_engine.train.elmer import ElmerReport, train_elmer
from multiexit_engine.train.elmer_config import ElmerProgress, ElmerTrainingConfig
from multiexit_engine.train.gates import GateReport, train_gates
from multiexit_engine.train.heads import HeadTrainingConfig, train_exit_heads
from multiexit_engine.train.probes import ProbeReport, train_probes

__all__ = [
    "CausalTrainingConfig",
    "ElmerProgress",
    "ElmerReport",
    "ElmerTrainingConfig",
    "GateReport",
    "HeadTrainingConfig",
    "ProbeReport",
    "TrainingProgress",
    "TrainingReport",
    "train_causal",
    "train_elmer",
    "train_exit_heads",
    "train_gates",
    "train_probes",
]
