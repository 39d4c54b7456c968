"""What Triton Inference Server loads; all of it lives in the package."""

from multiexit_engine.compat.triton_server import TritonPythonModel

__all__ = ["TritonPythonModel"]
