"""Turns the face's "auto" and names into the values that an engine is made of."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch

from multiexit_engine.checkpoint import Checkpoint
from multiexit_engine.config import BackendName, EngineConfig, ModelConfig
from multiexit_engine.errors import BackendUnavailable
from multiexit_engine.ops import Op
from multiexit_engine.quantization import Quantization
from multiexit_engine.runtime.device.graph_parts import graph_library
from multiexit_engine.runtime.device.graphs import ANSWER_SIZES, MOST_ANSWER_ROWS, graph_sizes
from multiexit_engine.runtime.device.persistent import persistent_kernel
from multiexit_engine.runtime.memory import num_kv_blocks

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_engine_config(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    backend: BackendName,
    max_model_len: int | None,
    max_batch_size: int,
    max_num_batched_tokens: int | None,
    kv_cache_memory: int | None,
    block_size: int,
    prefix_caching: bool,
    seed: int,
    quantization: str | None,
    cuda_graphs: bool | Sequence[int] | str = False,
    async_scheduling: bool = False,
    conditional_nodes: bool = False,
    persistent_blocks: bool = False,
) -> EngineConfig:
    """The checked limits of an engine on a checkpoint; see ``Engine.from_pretrained``."""
    check_counts(
        max_batch_size=max_batch_size,
        block_size=block_size,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
    )
    place = pick_device(device)
    kind = pick_dtype(dtype, checkpoint.dtype, place)
    if place.type == "cuda" and cuda_graphs is not False and _answers_at_once(checkpoint.config):
        check_lists_rows(backend)
    length = pick_max_model_len(max_model_len, checkpoint.config)
    return EngineConfig(
        device=place,
        dtype=kind,
        backend=pick_backend(backend, place),
        max_model_len=length,
        max_batch_size=max_batch_size,
        max_num_batched_tokens=max_num_batched_tokens or step_tokens(place),
        block_size=block_size,
        num_kv_blocks=num_kv_blocks(
            checkpoint.config,
            dtype=kind,
            device=place,
            block_size=block_size,
            max_model_len=length,
            max_batch_size=max_batch_size,
            kv_cache_memory=kv_cache_memory,
        ),
        prefix_caching=prefix_caching,
        seed=seed,
        quantization=pick_quantization(quantization, place),
        cuda_graphs=pick_graph_sizes(cuda_graphs, place, checkpoint.config, max_batch_size),
        async_scheduling=pick_async_scheduling(async_scheduling, place, checkpoint.config),
        conditional_nodes=pick_conditional_nodes(conditional_nodes, cuda_graphs),
        persistent_blocks=pick_persistent_blocks(
            persistent_blocks, place, backend, checkpoint.config
        ),
    )


def pick_device(device: str | torch.device) -> torch.device:
    """The device of a name; "auto" prefers CUDA. Raises ValueError when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: must be 'auto', 'cpu' or 'cuda[:n]'") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r}: must be 'auto', 'cpu' or 'cuda[:n]'")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return place


def pick_dtype(dtype: str | torch.dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" keeps what the checkpoint has where the device is fit for it."""
    if dtype == "auto":
        return _native_dtype(stored, device)
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r}: must be 'auto', " + ", ".join(map(repr, DTYPES)))
    return found


def pick_max_model_len(wanted: int | None, model: ModelConfig) -> int:
    """The longest sequence; raises ValueError beyond what the checkpoint was made for."""
    limit = model.max_position_embeddings
    if wanted is None:
        return limit
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 2 <= wanted <= limit:
        raise ValueError(f"max_model_len={wanted!r}: this model allows 2..{limit}")
    return wanted


def pick_backend(backend: BackendName, device: torch.device) -> BackendName:
    """The backend itself, if it exists for the device.

    On CUDA "auto" is the reference until ``benchmarks/gpu_report.py`` has passed on a GPU: the
    kernels are proven in the interpreter and by compiling only.
    """
    if backend not in ("auto", "reference", "native"):
        raise ValueError(f"backend={backend!r}: must be 'auto', 'reference' or 'native'")
    if backend == "reference" or (backend == "auto" and device.type == "cuda"):
        return "reference"
    try:
        for op in Op.registry.values():
            op.require(device.type)
    except BackendUnavailable as error:
        if backend == "native":
            raise BackendUnavailable(f"backend='native': {error}; use 'auto'") from error
        _warn_once(f"ops run in plain PyTorch where they have no kernel: {error}")
    return backend


def pick_quantization(quantization: str | None, device: torch.device) -> Quantization | None:
    """The quantization of a name; raises ValueError for others, and for devices without kernels."""
    if quantization is None:
        return None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"quantization={quantization!r}: quantized weights run on CPUs and CUDA devices, not "
            f"on {str(device)!r}; give device='cpu' or 'cuda', or quantization=None"
        )
    return Quantization.parse(quantization)


def pick_graph_sizes(
    wanted: bool | Sequence[int] | str,
    device: torch.device,
    model: ModelConfig,
    max_batch_size: int,
) -> tuple[int, ...]:
    """Numbers of rows to capture decode steps for; raises ValueError where there are no graphs."""
    if wanted is False:
        return ()
    at_once = _answers_at_once(model)
    _check_has_steps(f"cuda_graphs={wanted!r}", device)
    if wanted is True:
        return ANSWER_SIZES if at_once else graph_sizes(max_batch_size)
    if isinstance(wanted, str):
        sizes = [int(part) if part.isdecimal() else 0 for part in wanted.split(",")]
    else:
        sizes = [] if isinstance(wanted, int) else list(wanted)
    # a row is a position of an answer there, of which a batch has any number
    limit = MOST_ANSWER_ROWS if at_once else max_batch_size
    if not sizes or not all(type(size) is int and 1 <= size <= limit for size in sizes):
        name = "" if at_once else "max_batch_size="
        raise ValueError(
            f"cuda_graphs={wanted!r}: give True, False, or numbers of rows from 1 to {name}{limit}"
        )
    return tuple(sorted(set(sizes)))


def check_lists_rows(backend: BackendName) -> None:
    """Raises ValueError where answers found at once could not be captured."""
    if backend != "native":
        raise ValueError(
            f"cuda_graphs with backend={backend!r}: answers that are found at once are captured "
            "where kernels list their rows; give backend='native', or cuda_graphs=False"
        )


def pick_conditional_nodes(wanted: bool, cuda_graphs: bool | Sequence[int] | str) -> bool:
    """Whether graphs have conditional nodes; raises ValueError where they cannot."""
    if wanted and cuda_graphs is False:
        raise ValueError("conditional_nodes=True without graphs: give cuda_graphs=True as well")
    if wanted:
        graph_library()
    return wanted


def pick_persistent_blocks(
    wanted: bool, device: torch.device, backend: BackendName, model: ModelConfig
) -> bool:
    """Whether few rows run their layers in one launch; raises ValueError where they cannot."""
    if not wanted:
        return False
    if device.type != "cuda" or backend != "native":
        raise ValueError(
            f"persistent_blocks=True on {str(device)!r} with backend={backend!r}: it is a kernel "
            "of GPUs; give device='cuda' and backend='native', or persistent_blocks=False"
        )
    if model.encoder is not None:
        raise ValueError(
            f"persistent_blocks=True: not for encoder-decoders such as {model.model_type!r}"
        )
    persistent_kernel()
    return True


def pick_async_scheduling(wanted: bool, device: torch.device, model: ModelConfig) -> bool:
    """Whether steps are launched ahead; raises ValueError where they cannot be."""
    given = f"async_scheduling={wanted!r}"
    if wanted:
        _check_has_steps(given, device)
    if wanted and _answers_at_once(model):
        raise ValueError(
            f"{given}: a model of type {model.model_type!r} finds an answer in one step, which "
            "none follows; give False"
        )
    return wanted


def _answers_at_once(model: ModelConfig) -> bool:
    return model.model_type == "elmer"


def _check_has_steps(given: str, device: torch.device) -> None:
    if device.type != "cuda":
        name = str(device)
        raise ValueError(f"{given}: {name!r} runs steps at once; give device='cuda' or False")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def check_counts(**counts: int | None) -> None:
    """Raises ValueError for a count that is not a positive integer; None passes."""
    for name, value in counts.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: must be an integer, 1 or more")


def step_tokens(device: torch.device) -> int:
    """Most tokens of a step: enough to keep the device busy without holding up the others."""
    return 8192 if device.type == "cuda" else 1024


def _native_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    if stored not in DTYPES.values():
        return torch.float32
    if device.type == "cpu":
        return stored if stored is torch.bfloat16 and _cpu_has_bf16() else torch.float32
    return stored


def _cpu_has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
