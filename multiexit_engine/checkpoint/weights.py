"""Tensors of a checkpoint folder, read when somebody asks for them.

Knows file formats and names; nothing of models, dtypes or devices. CPU tensors are mapped from
the file, so that a head nobody reads takes no memory.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from multiexit_engine.errors import CheckpointError

# old versions of transformers stored these buffers; they are computed, not learned
_BUFFERS = re.compile(r"(\.attn(\.attention)?\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


class _SafetensorsFile:
    def __init__(self, path: Path) -> None:
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or incomplete ({error}); copy or download it again"
            ) from error

    def names(self) -> list[str]:
        return list(self._file.keys())

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class _PickleFile:
    def __init__(self, path: Path) -> None:
        content = _load_pickle(path)
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path} holds a {type(content).__name__}, not a dict of tensors; "
                "save the model's state_dict()"
            )
        self._tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}

    def names(self) -> list[str]:
        return list(self._tensors)

    def get(self, name: str) -> Tensor:
        return self._tensors[name]


def _load_pickle(path: Path) -> object:
    try:
        # only the zip format, the default since torch 1.6, can be mapped
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or a pickle that holds more than tensors; nothing of it was "
            "executed. Only plain state dicts are read: convert it to safetensors where you "
            f"trust it ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise CheckpointError(
            f"{path} is damaged or incomplete ({_first_line(error)}); copy or download it again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class Weights:
    """The tensors of a checkpoint, by the name they have in the full model.

    A file may hold the base model alone: "transformer.wte.weight" then finds "wte.weight".

    Args:
        folder: where the files lie.
        prefix: of the base model's tensors in the full model, such as "transformer.".

    Raises:
        CheckpointError: no weight file, a missing shard, or a damaged index.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self._folder = folder
        self._prefix = prefix
        self._opened: dict[Path, _SafetensorsFile | _PickleFile] = {}
        self._files = self._locate()

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self._folder

    def names(self) -> tuple[str, ...]:
        """Names as they stand in the files, without buffers that are computed anyway."""
        return tuple(name for name in self._index if not _BUFFERS.search(name))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._stored_name(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def get(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU; raises CheckpointError when it is missing."""
        stored = self._stored_name(name)
        if stored is None:
            raise CheckpointError(
                f"{self._folder} has no tensor {name!r}: the checkpoint is incomplete or of "
                f"another architecture; it has {self._listed()}"
            )
        return self._get(stored)

    def _get(self, stored: str) -> Tensor:
        file = self._open(self._index[stored])
        try:
            return file.get(stored)
        except (SafetensorError, KeyError) as error:
            raise CheckpointError(
                f"{self._index[stored]} lacks {stored!r}, which the index places there; "
                "copy or download the checkpoint again"
            ) from error

    def _stored_name(self, name: str) -> str | None:
        bare = name.removeprefix(self._prefix)
        for candidate in (name, bare, self._prefix + name):
            if candidate in self._index:
                return candidate
        return None

    @cached_property
    def _index(self) -> dict[str, Path]:
        if isinstance(self._files, dict):
            return self._files
        return dict.fromkeys(self._open(self._files).names(), self._files)

    def _open(self, path: Path) -> _SafetensorsFile | _PickleFile:
        if path not in self._opened:
            is_pickle = path.suffix == ".bin"
            self._opened[path] = _PickleFile(path) if is_pickle else _SafetensorsFile(path)
        return self._opened[path]

    def _locate(self) -> Path | dict[str, Path]:
        for name in _SINGLE_FILES:
            if (path := self._folder / name).is_file():
                return path
            if (index := self._folder / f"{name}.index.json").is_file():
                return self._read_index(index)
        found = ", ".join(sorted(p.name for p in self._folder.iterdir())) or "nothing"
        raise CheckpointError(
            f"{self._folder} holds no weights: expected model.safetensors or pytorch_model.bin, "
            f"or the index of their shards; found {found}"
        )

    def _read_index(self, path: Path) -> dict[str, Path]:
        try:
            names: dict[str, str] = dict(json.loads(path.read_text("utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not an index of shards ({error})") from error
        for shard in sorted({str(name) for name in names.values()}):
            if Path(shard).name != shard or not (self._folder / shard).is_file():
                raise CheckpointError(
                    f"{path} names the shard {shard!r}, which is not in {self._folder}; "
                    "copy or download it too"
                )
        return {name: self._folder / shard for name, shard in names.items()}

    def _listed(self) -> str:
        names = self.names()
        first = ", ".join(names[:4])
        return f"{len(names)} others: {first}, ..." if len(names) > 4 else (first or "no others")
