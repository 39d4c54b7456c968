"""The decoder families, one file each, and the registry that picks one."""

from multiexit_engine.models.base import MultiExitModel
from multiexit_engine.models.registry import build_model

__all__ = ["MultiExitModel", "build_model"]
