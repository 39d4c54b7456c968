"""Opens a checkpoint: its shape, its exits and its weights, all checked, none of it run.

The only room that reads transformers' files, and the one where exits of IBM's layout are found.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from multiexit_engine.checkpoint.exits import LayerIndices, resolve_exits
from multiexit_engine.checkpoint.families import FAMILIES, read_model_config
from multiexit_engine.checkpoint.source import checkpoint_folder
from multiexit_engine.checkpoint.weights import Weights
from multiexit_engine.config import ModelConfig, VocabularyProjectionMode
from multiexit_engine.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# the one tensor that ELMER's fine-tuned models have beside BART's
ELMER_MARK = "concat_head.weight"

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model",
    "vocab.json", "vocab.txt",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was found to hold a model.

    Attributes:
        folder: where it lies.
        config: the model's shape and exits.
        weights: its tensors.
        dtype: of the token embedding as stored.
    """

    folder: Path
    config: ModelConfig
    weights: Weights
    dtype: torch.dtype

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its tokenizer; None when the folder has no tokenizer files.

        Raises:
            CheckpointError: there are files, but transformers cannot read them.
        """
        if not any((self.folder / name).is_file() for name in _TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(self.folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise CheckpointError(
                f"the tokenizer in {self.folder} cannot be read: {error}"
            ) from error
        return tokenizer


def open_checkpoint(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    architecture: str | None = None,
    lm_head_layer_indices: LayerIndices | None = None,
    vocab_projection_mode: VocabularyProjectionMode | str | None = None,
) -> Checkpoint:
    """Find a checkpoint, read its config and check that its exits are there.

    Args:
        name_or_path: "demo", a local folder, or a hub id.
        revision: branch, tag or commit of a hub id.
        architecture: model type to use instead of the one in config.json.
        lm_head_layer_indices: exits to use, as a sequence or ``"24;12"``. Narrows a multi-exit
            checkpoint, or gives exits to a single-exit one. None: those of config.json.
        vocab_projection_mode: how exits project. None: what config.json says, else what the
            tensors that are present say, else SHARED_PROJECTION_DIRECT. That mode without any
            layers given makes every layer an exit.

    Raises:
        CheckpointError: a missing, damaged, incomplete or unsupported checkpoint.
        ValueError: an argument is out of range.
    """
    mode = vocab_projection_mode and VocabularyProjectionMode.parse(vocab_projection_mode)
    folder = checkpoint_folder(name_or_path, revision)
    values = _read_json(folder / "config.json")
    model_type = _model_type(folder, values, architecture)
    weights = Weights(folder, FAMILIES[model_type].prefix)
    model_type = _elmer_or(model_type, weights, architecture)
    if model_type == "elmer" and (lm_head_layer_indices is not None or mode is not None):
        raise ValueError(
            "lm_head_layer_indices and vocab_projection_mode: with ELMER's decoder positions leave "
            "at any layer through the model's own head, so neither is to be given"
        )
    config = read_model_config(model_type, values)
    config = _with_generation_tokens(config, folder)
    family = FAMILIES[model_type]
    layers, projection = resolve_exits(config, values, weights, lm_head_layer_indices, mode or None)
    config = replace(config, exit_layers=layers, projection=projection)
    return Checkpoint(folder, config, weights, weights.get(family.embedding).dtype)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}: is it a model's folder?")
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a JSON object")
    return values


def _model_type(folder: Path, values: dict[str, Any], architecture: str | None) -> str:
    found = architecture if architecture is not None else values.get("model_type")
    if found in FAMILIES:
        return str(found)
    allowed = ", ".join(FAMILIES)
    if architecture is not None:
        raise CheckpointError(f"architecture={architecture!r}: allowed are {allowed}")
    if found is None:
        raise CheckpointError(
            f"{folder / 'config.json'} has no model_type: give architecture=, one of {allowed}"
        )
    raise CheckpointError(
        f"{folder / 'config.json'}: model_type {found!r} is not supported; supported are "
        f"{allowed}. If the model is built like one of these, give architecture="
    )


def _elmer_or(model_type: str, weights: Weights, architecture: str | None) -> str:
    """ELMER where only the tensors tell it from BART, unless the caller wants BART."""
    if model_type != "bart" or ELMER_MARK not in weights:
        return model_type
    if architecture is None:
        return "elmer"
    logger.warning(
        "the checkpoint holds %s: its decoder was trained by ELMER to see all positions at once. "
        "As architecture='bart' it writes one token after the other, which it never learned; "
        "leave architecture= out to open it as ELMER",
        ELMER_MARK,
    )
    return model_type


def _with_generation_tokens(config: ModelConfig, folder: Path) -> ModelConfig:
    """Where texts begin and end: generation_config.json says, else config.json, as transformers."""
    path = folder / "generation_config.json"
    stated = _read_json(path) if path.is_file() else {}
    forced = stated or config.family
    config = replace(
        config,
        eos_token_ids=_eos_token_ids(folder, stated.get("eos_token_id"), config),
        forced_bos_token_id=_one_token_id(folder, "forced_bos_token_id", forced, config),
        forced_eos_token_id=_one_token_id(folder, "forced_eos_token_id", forced, config),
    )
    if config.encoder is None:
        return config
    name = "decoder_start_token_id"
    start = _one_token_id(folder, name, stated, config)
    if start is None:
        start = _one_token_id(folder, name, config.family, config)
    start = config.bos_token_id if start is None else start
    if start is None:
        raise CheckpointError(
            f"{folder} names no decoder_start_token_id and no bos_token_id: put the token that "
            "begins every output into config.json"
        )
    return replace(config, encoder=replace(config.encoder, decoder_start_token_id=start))


def _one_token_id(
    folder: Path, name: str, values: Mapping[str, Any], config: ModelConfig
) -> int | None:
    value = values.get(name)
    # some configs hold a list of one
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < config.vocab_size:
        raise CheckpointError(
            f"{name}={value!r} in {folder}: must be one token id below {config.vocab_size}, or "
            "absent"
        )
    return value


def _eos_token_ids(folder: Path, value: Any, config: ModelConfig) -> tuple[int, ...]:
    if value is None:
        value = config.family["eos_token_id"]
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(
            f"eos_token_id={value!r} in {folder}: must be a token id, a list of them, or absent"
        )
    return tuple(dict.fromkeys(ids))
