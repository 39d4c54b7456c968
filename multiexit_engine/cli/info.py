"""``multiexit info``: what a checkpoint is, and which modes it can run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from multiexit_engine.cache.paged_kv_cache import PagedKVCache
from multiexit_engine.checkpoint import Checkpoint, open_checkpoint
from multiexit_engine.checkpoint.checkpoint import ELMER_MARK
from multiexit_engine.cli.app import console
from multiexit_engine.config import ModelConfig
from multiexit_engine.quantization import Quantization

_MIB = 2**20
_EMBEDDINGS = ("wte.weight", "wpe.weight", "embed_tokens.weight")


def info(
    model: Annotated[str, typer.Argument(help="A local folder, a hub id, or 'demo'.")] = "demo",
    vocab_projection_mode: Annotated[
        str | None, typer.Option(help="How exits project, where the checkpoint does not say.")
    ] = None,
    lm_head_layer_indices: Annotated[
        str | None, typer.Option(help="Exit layers, as 24;12, instead of the checkpoint's own.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id.")] = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="Show the memory of weights in int8, int4, fp8, int8-g64, ..."),
    ] = None,
) -> None:
    """Family, exits, size and possible decoding modes of MODEL; loads no weights."""
    checkpoint = open_checkpoint(
        model,
        revision=revision,
        vocab_projection_mode=vocab_projection_mode,
        lm_head_layer_indices=lm_head_layer_indices,
    )
    how = None if quantization is None else Quantization.parse(quantization)
    console.print(_facts(model, checkpoint, how))
    console.print("\nDecoding modes, ready to copy:")
    is_parallel, name = checkpoint.config.model_type == "elmer", shlex.quote(model)
    for line in _parallel(name, checkpoint) if is_parallel else _examples(name, checkpoint.config):
        typer.echo("  " + line)


def _facts(model: str, checkpoint: Checkpoint, how: Quantization | None) -> Table:
    config, weights = checkpoint.config, checkpoint.weights
    sizes = [weights.get(name) for name in weights.names()]
    kv_bytes = PagedKVCache.bytes_per_block(
        config.num_layers, 1, config.num_kv_heads, config.head_dim, checkpoint.dtype
    )
    table = Table.grid(padding=(0, 2))
    layers = ", ".join(map(str, config.exit_layers)) or "none"
    projection = config.projection.name if config.projection is not None else "-"
    facts = {
        "model": Path(model).name if Path(model).is_dir() else model,
        "family": config.model_type,
        "layers": f"{config.num_layers} of width {config.hidden_size}, {config.num_heads} heads "
        f"({config.num_kv_heads} for keys and values)",
        "vocabulary": f"{config.vocab_size} tokens",
        "context": f"{config.max_position_embeddings} tokens",
        "exits": layers,
        "projection": projection,
        "parameters": f"{sum(t.numel() for t in sizes):,}",
        "memory": f"{weight_bytes(checkpoint, how) / _MIB:.1f} MiB "
        + (f"as stored ({checkpoint.dtype})" if how is None else f"in {how}")
        + f", plus {kv_bytes / 1024:.1f} KiB of keys and values per token",
    }
    for name, value in facts.items():
        table.add_row(f"[bold]{name}[/]", Text(value))
    return table


def weight_bytes(checkpoint: Checkpoint, how: Quantization | None) -> int:
    """Of all weights as an engine holds them, up to the padding of quantized rows.

    Embeddings, norms and biases are never quantized.
    """
    config, weights = checkpoint.config, checkpoint.weights
    if how is None:
        return sum(weights.get(name).nbytes for name in weights.names())
    total = 0
    for name in weights.names():
        tensor = weights.get(name)
        is_matrix = tensor.dim() == 2 and not name.endswith(_EMBEDDINGS)
        total += how.num_bytes(*tensor.shape) if is_matrix else tensor.nbytes
    if "lm_head.weight" not in weights:
        # a tied head becomes a matrix of its own
        total += how.num_bytes(config.vocab_size, config.hidden_size)
    return total


def _parallel(model: str, checkpoint: Checkpoint) -> list[str]:
    """Of a decoder that finds all tokens at once, which knows no other mode."""
    command = f'multiexit generate "Once upon a time" --model {model} --decoding parallel:'
    middle = max(1, checkpoint.config.num_layers // 2)
    lines = [f"{command}none", f"{command}confidence,threshold=1.0,layers={middle}"]
    return [f"{command}soft", *lines] if ELMER_MARK in checkpoint.weights else lines


def _examples(model: str, config: ModelConfig) -> list[str]:
    command = f'multiexit generate "Once upon a time" --model {model} --decoding '
    lines = [command + "original", command + "dola:high"]
    if not config.exit_layers:
        middle = max(1, config.num_layers // 2)
        extra = " --vocab-projection-mode shared_projection_direct"
        return [*lines, f"{command}exit:{middle}{extra}", _contrast(command, middle) + extra]
    lines += [f"{command}exit:{layer}" for layer in config.exit_layers]
    last = config.exit_layers[-1]
    lower = [layer for layer in config.exit_layers if layer < config.num_layers]
    below_last = [layer for layer in lower if layer < last]
    if lower:
        lines.append(_contrast(command, lower[len(lower) // 2]))
    if below_last:
        lines.append(f"{command}contrast:{last},{below_last[len(below_last) // 2]},alpha=0.1")
    return lines


def _contrast(command: str, layer: int) -> str:
    return f"{command}contrast:original,{layer},alpha=0.1"
