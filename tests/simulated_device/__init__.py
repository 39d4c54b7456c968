"""A device that is not there: it counts what the host does, and computes as late as a GPU may.

Tensors of the device "sim" hold memory of the CPU. An operation on them is put at the end of a
stream and runs when somebody waits for it; a copy from pinned memory reads that memory then, and a
copy to the host leaves nonsense there until then. So a step that reads its results too early, or
overwrites its inputs too early, gives wrong tokens. A capture records operations without running
them, on the memory they had; a replay puts them into the stream again: values that Python saw
while capturing stay what they were.

Nothing here looks at the engine.
"""

from tests.simulated_device.device import SimulatedDevice, simulated_device

__all__ = ["SimulatedDevice", "simulated_device"]
