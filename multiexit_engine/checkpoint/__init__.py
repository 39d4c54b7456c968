"""Checkpoints: where they lie, what they say of themselves, and their tensors."""

from multiexit_engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from multiexit_engine.checkpoint.exits import exit_weight_name
from multiexit_engine.checkpoint.loader import TensorLoader
from multiexit_engine.checkpoint.text_decoder import text_decoder
from multiexit_engine.checkpoint.weights import Weights

__all__ = [
    "Checkpoint",
    "TensorLoader",
    "Weights",
    "exit_weight_name",
    "open_checkpoint",
    "text_decoder",
]
