"""A small Ray cluster on this machine, that is gone after the tests, also after a failure."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@contextmanager
def local_ray() -> Iterator[None]:
    """Ray with two CPUs for the time of the block."""
    import ray

    os.environ.update(ENVIRONMENT)
    try:
        ray.init(
            num_cpus=2,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
        yield
    finally:
        ray.shutdown()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
