"""The engine's numerical vocabulary: every op, each with its reference."""

from multiexit_engine.ops.registry import REFERENCE, Op, register_op, use_backend

__all__ = ["REFERENCE", "Op", "register_op", "use_backend"]
