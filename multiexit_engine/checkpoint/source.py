"""Where a checkpoint lies: the demo in the package, a local folder, or the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from multiexit_engine.errors import CheckpointError

SHIPPED = ("demo", "demo-elmer")
ASSETS = Path(__file__).parents[1] / "assets"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZER_FILES = ("*.txt", "*.model", "*.jinja")
_SAFETENSORS = ("model.safetensors", "model-*.safetensors")
_PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin")


def checkpoint_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder that holds config and weights; downloads them for a hub id.

    A local folder wins over a hub id of the same name. Of the hub's files only configs, tokenizers
    and weights are fetched, pickles (``.bin``) only where there are no safetensors, code never.

    Args:
        name_or_path: "demo", "demo-elmer", a folder, or a hub id ("ibm/gpt2-medium-multiexit").
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: there is no such folder, or the hub does not give it.
        ValueError: a revision of something that is not on the hub.
    """
    is_shipped = name_or_path in SHIPPED
    folder = ASSETS / name_or_path if is_shipped else Path(name_or_path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r}: {folder} is a local folder; only hub ids have revisions"
            )
        return folder
    if is_shipped:
        raise CheckpointError(f"{name_or_path} is not installed: there is no folder {folder}")
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: give the folder that holds it")
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, Path) or not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(
            f"there is no folder {name!r}; allowed are 'demo', 'demo-elmer', a folder with "
            "config.json, or a hub id such as 'ibm/gpt2-medium-multiexit'"
        )
    return _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    try:
        patterns = ["*.json", *_TOKENIZER_FILES, *_SAFETENSORS]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if not any(path for pattern in _SAFETENSORS for path in folder.glob(pattern)):
            patterns = ["*.json", *_TOKENIZER_FILES, *_PICKLES]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    # releases of huggingface_hub differ in their HTTP library, whose errors have no common base
    except Exception as error:
        at = f" at revision {revision!r}" if revision is not None else ""
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{name!r} is no local folder, and the hub did not give it{at}: {reason}. Check the "
            "name and the connection, or download it and give its folder"
        ) from error
    return folder
