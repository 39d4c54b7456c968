"""File formats, names, and files that are damaged."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from multiexit_engine.checkpoint import Weights, open_checkpoint
from multiexit_engine.errors import CheckpointError
from multiexit_engine.models import build_model
from tests.checkpoint.harness import HIDDEN, LAYERS, VOCAB, base_tensors, heads, write, write_config

CPU = torch.device("cpu")


def write_shards(folder, suffix, save):
    tensors = base_tensors()
    names = sorted(tensors)
    parts = {f"part-{i}{suffix}": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save({name: tensors[name] for name in part}, folder / file)
    single = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / f"{single}.index.json").write_text(json.dumps(index))


def write_legacy_bin(tensors, path):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


WRITERS = {
    "model.safetensors": lambda folder: save_file(base_tensors(), folder / "model.safetensors"),
    "pytorch_model.bin": lambda folder: torch.save(base_tensors(), folder / "pytorch_model.bin"),
    "legacy bin": lambda folder: write_legacy_bin(base_tensors(), folder / "pytorch_model.bin"),
    "sharded safetensors": lambda folder: write_shards(folder, ".safetensors", save_file),
    "sharded bin": lambda folder: write_shards(folder, ".bin", torch.save),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_of_files_gives_the_same_tensors(tmp_path, layout):
    WRITERS[layout](tmp_path)
    weights = Weights(tmp_path, "transformer.")
    expected = base_tensors()
    assert sorted(weights.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights.get(name), tensor)


def test_names_without_the_prefix_are_found(tmp_path):
    bare = {name.removeprefix("transformer."): t for name, t in base_tensors().items()}
    save_file(bare, tmp_path / "model.safetensors")
    weights = Weights(tmp_path, "transformer.")
    assert "transformer.wte.weight" in weights
    assert torch.equal(weights.get("transformer.wte.weight"), bare["wte.weight"])


def test_masks_and_rotary_buffers_are_no_weights(tmp_path):
    buffers = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.0.attn.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    torch.save({**base_tensors(), **buffers}, tmp_path / "pytorch_model.bin")
    assert sorted(Weights(tmp_path).names()) == sorted(base_tensors())


def test_the_released_layout_loads(tmp_path):
    """One pickle with masks, the head stored beside the embedding it is tied to."""
    write_config(tmp_path, lm_head_layer_indices=[4, 2], architectures=["MultiHeadGPT2"])
    tensors = base_tensors()
    tensors.update(heads(2, 4))
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    for layer in range(LAYERS):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.exit_layers == (2, 4)
    model = build_model(checkpoint, CPU, torch.float32)
    assert torch.equal(model.embedding.tokens, tensors["transformer.wte.weight"])


def test_a_missing_tensor_is_named(tmp_path):
    tensors = base_tensors()
    del tensors["transformer.h.2.mlp.c_fc.bias"]
    write_config(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'transformer.h.2.mlp.c_fc.bias'"):
        build_model(open_checkpoint(tmp_path), CPU, torch.float32)


def test_a_missing_untied_head_is_named(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, tie_word_embeddings=False))
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head.weight'"):
        build_model(checkpoint, CPU, torch.float32)


def test_a_tied_head_that_is_stored_too_is_the_embedding(tmp_path):
    extra = {"lm_head.weight": base_tensors()["transformer.wte.weight"].clone()}
    model = build_model(open_checkpoint(write(tmp_path, extra)), CPU, torch.float32)
    weight = model.heads.operands(model.heads.original, torch.zeros(1, HIDDEN)).weight
    assert weight.data_ptr() == model.embedding.tokens.data_ptr()


def test_a_stored_head_that_differs_from_the_tied_embedding_is_used(tmp_path, caplog):
    extra = {"lm_head.weight": torch.ones(VOCAB, HIDDEN)}
    model = build_model(open_checkpoint(write(tmp_path, extra)), CPU, torch.float32)
    operands = model.heads.operands(model.heads.original, torch.zeros(1, HIDDEN))
    assert torch.equal(operands.weight, extra["lm_head.weight"])
    assert "lm_head.weight differs from the embedding" in caplog.text


def test_a_shape_that_does_not_fit_is_named(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, n_positions=17))
    with pytest.raises(CheckpointError, match=r"wpe.weight' has the shape \[16, 8\].*\[17, 8\]"):
        build_model(checkpoint, CPU, torch.float32)


def test_integer_weights_are_refused(tmp_path):
    extra = {"transformer.ln_f.bias": torch.zeros(8, dtype=torch.int8)}
    checkpoint = open_checkpoint(write(tmp_path, extra))
    with pytest.raises(CheckpointError, match="stored as torch.int8.*quantized"):
        build_model(checkpoint, CPU, torch.float32)


def test_no_weight_file_lists_what_is_there(tmp_path):
    write_config(tmp_path)
    (tmp_path / "flax_model.msgpack").touch()
    with pytest.raises(CheckpointError, match="no weights: expected.*found.*flax_model.msgpack"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "legacy bin"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_reported(tmp_path, file, share):
    write_config(tmp_path)
    WRITERS[file](tmp_path)
    path = tmp_path / ("model.safetensors" if "safe" in file else "pytorch_model.bin")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_of_noise_is_reported(tmp_path, file):
    write_config(tmp_path)
    (tmp_path / file).write_bytes(bytes(range(256)) * 40)
    with pytest.raises(CheckpointError, match=f"{file} is damaged"):
        open_checkpoint(tmp_path)


class _Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("save", [torch.save, write_legacy_bin], ids=["zip", "legacy"])
def test_a_pickle_with_code_is_refused_and_the_code_not_run(tmp_path, save):
    write_config(tmp_path)
    proof = tmp_path / "executed"
    save({**base_tensors(), "x": _Touches(str(proof))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than tensors; nothing of it was executed"):
        open_checkpoint(tmp_path)
    assert not proof.exists()


def test_a_bare_pickle_with_code_is_refused_and_the_code_not_run(tmp_path):
    write_config(tmp_path)
    proof = tmp_path / "executed"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Touches(str(proof)), protocol=2))
    with pytest.raises(CheckpointError, match="nothing of it was executed"):
        open_checkpoint(tmp_path)
    assert not proof.exists()


def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path):
    write_config(tmp_path)
    torch.save([torch.zeros(3)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds a list, not a dict of tensors"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_config(tmp_path)
    write_shards(tmp_path, ".safetensors", save_file)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names the shard 'part-1.safetensors'"):
        open_checkpoint(tmp_path)


def test_a_shard_outside_of_the_folder_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_config(folder)
    save_file(base_tensors(), tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(base_tensors(), "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not in"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_reported(tmp_path, content):
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not an index of shards"):
        open_checkpoint(tmp_path)


def test_a_shard_that_lacks_what_the_index_promises_is_reported(tmp_path):
    write_config(tmp_path)
    write_shards(tmp_path, ".safetensors", save_file)
    save_file({"other": torch.zeros(1)}, tmp_path / "part-0.safetensors")
    with pytest.raises(CheckpointError, match="which the index places there"):
        build_model(open_checkpoint(tmp_path), CPU, torch.float32)
