"""Configs, sources, tokenizers, and configs that are wrong."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from multiexit_engine.checkpoint import open_checkpoint, source
from multiexit_engine.errors import CheckpointError
from tests.checkpoint.harness import CONFIG, base_tensors, write, write_config
from tests.models.harness import LLAMA_LIKE, save, transformers_model


def test_shape_and_dtype_are_read(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path))
    config = checkpoint.config
    assert (config.model_type, config.vocab_size, config.hidden_size) == ("gpt2", 13, 8)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (
        4, 2, 2, 4,
    )  # fmt: skip
    assert (config.max_position_embeddings, config.attention_windows) == (16, (None,) * 4)
    assert (config.tie_word_embeddings, config.bos_token_id, config.rope) == (True, 7, None)
    assert checkpoint.dtype is torch.float32
    assert checkpoint.folder == tmp_path


def test_windows_of_gpt_neo(tmp_path):
    values = {
        "model_type": "gpt_neo", "vocab_size": 13, "hidden_size": 8, "num_layers": 3,
        "num_heads": 2, "window_size": 5, "attention_types": [[["local", "global", "local"], 1]],
    }  # fmt: skip
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert open_checkpoint(tmp_path).config.attention_windows == (5, None, 5)


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2.0}, None])
def test_old_and_new_names_of_rotary_options_mean_the_same(tmp_path, scaling):
    save(transformers_model("llama", LLAMA_LIKE), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"]
    path.write_text(json.dumps({**values, "rope_theta": 77.0, "rope_scaling": scaling}))
    old = open_checkpoint(tmp_path).config.rope
    kind = {"rope_type": "linear", "factor": 2.0} if scaling else {"rope_type": "default"}
    path.write_text(json.dumps({**values, "rope_parameters": {**kind, "rope_theta": 77.0}}))
    new = open_checkpoint(tmp_path).config.rope
    assert old == new and old.inv_freq[0] == (0.5 if scaling else 1.0)


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [
        (7, "no file", (7,)),
        ([7, 3], "no file", (7, 3)),
        (None, "no file", ()),
        (7, 3, (3,)),
        (7, [3, 5, 3], (3, 5)),
        (7, None, (7,)),
        (None, 0, (0,)),
    ],
)
def test_ending_tokens(tmp_path, config_eos, generation_eos, expected):
    write(tmp_path, eos_token_id=config_eos)
    if generation_eos != "no file":
        generation = json.dumps({"eos_token_id": generation_eos})
        (tmp_path / "generation_config.json").write_text(generation)
    assert open_checkpoint(tmp_path).config.eos_token_ids == expected


def test_an_ending_token_that_is_no_id_is_reported(tmp_path):
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(CheckpointError, match="eos_token_id='</s>'"):
        open_checkpoint(tmp_path)


def test_architecture_replaces_the_model_type(tmp_path):
    write(tmp_path, model_type="my_gpt")
    with pytest.raises(CheckpointError, match="'my_gpt' is not supported; supported are gpt2"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path, architecture="gpt2").config.model_type == "gpt2"


def test_an_unknown_architecture_names_those_that_are_known(tmp_path):
    with pytest.raises(CheckpointError, match="architecture='opt': allowed are gpt2, gpt_neo"):
        open_checkpoint(write(tmp_path), architecture="opt")


def test_the_architectures_field_is_not_believed(tmp_path):
    write(tmp_path, architectures=["MultiHeadLlama"])
    assert open_checkpoint(tmp_path).config.model_type == "gpt2"


def test_a_config_without_model_type_says_what_to_do(tmp_path):
    write(tmp_path)
    values = {k: v for k, v in CONFIG.items() if k != "model_type"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="no model_type: give architecture="):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[1]", "holds a list"), ("\xff", "not valid JSON")],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_malformed_json_is_reported(tmp_path, file, content, message):
    write(tmp_path)
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embd": "wide"}, "n_embd"),
        ({"n_head": 3}, "8 is not a multiple of the 3"),
        ({"n_head": 0}, "num_attention_heads=0 must be"),
        ({"n_layer": None}, "n_layer"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"model_type": "gpt_neo", "hidden_size": 8, "num_layers": 3}, "attention_types"),
    ],
)
def test_bad_values_of_the_config_are_named(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path, **change))


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            "rope_type='longrope'.*supported are default",
        ),
        ({"rope_type": "imagined"}, "rope_type='imagined'.*supported are default"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_type": "yarn"}, "factor"),
    ],
)
def test_rotary_options_that_the_engine_lacks_are_named(tmp_path, rope, message):
    save(transformers_model("llama", LLAMA_LIKE), tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["rope_parameters"] = {"rope_theta": 1e4, **rope}
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "what is this?"])
def test_a_folder_that_is_not_there_is_no_hub_id(name):
    with pytest.raises(CheckpointError, match="there is no folder"):
        open_checkpoint(name)


def test_a_file_is_not_its_folder(tmp_path):
    write(tmp_path)
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_a_folder_without_config_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="has no config.json"):
        open_checkpoint(tmp_path)


def test_a_local_folder_has_no_revision(tmp_path):
    with pytest.raises(ValueError, match="revision='main'.*local folder"):
        open_checkpoint(write(tmp_path), revision="main")


def test_a_local_folder_wins_over_the_hub(tmp_path, monkeypatch):
    (tmp_path / "ibm" / "model").mkdir(parents=True)
    write(tmp_path / "ibm" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "snapshot_download", None)
    assert open_checkpoint("ibm/model").config.hidden_size == 8


class FakeHub:
    """Gives a folder, and keeps what it was asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.asked = []

    def __call__(self, name, *, revision, allow_patterns):
        self.asked.append((name, revision, allow_patterns))
        return str(self.folder)

    @property
    def asked_for_pickles(self):
        return any("pytorch_model.bin" in patterns for *_, patterns in self.asked)


def test_a_hub_id_with_safetensors_fetches_no_pickle(tmp_path, monkeypatch):
    hub = FakeHub(write(tmp_path))
    monkeypatch.setattr(source, "snapshot_download", hub)
    open_checkpoint("ibm/model", revision="v1")
    assert hub.asked[0][:2] == ("ibm/model", "v1") and not hub.asked_for_pickles


def test_a_hub_id_without_safetensors_fetches_the_pickle(tmp_path, monkeypatch):
    write_config(tmp_path)
    torch.save(base_tensors(), tmp_path / "pytorch_model.bin")
    hub = FakeHub(tmp_path)
    monkeypatch.setattr(source, "snapshot_download", hub)
    open_checkpoint("ibm/model")
    assert hub.asked_for_pickles


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch):
    def out_of_reach(*_args, **_options):
        raise ConnectionError("no route")

    monkeypatch.setattr(source, "snapshot_download", out_of_reach)
    with pytest.raises(CheckpointError, match="'ibm/model'.*no route.*give its folder"):
        open_checkpoint("ibm/model")


@pytest.mark.parametrize("name", source.SHIPPED)
def test_a_missing_demo_says_so(tmp_path, monkeypatch, name):
    monkeypatch.setattr(source, "ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match=f"{name} is not installed"):
        open_checkpoint(name)


def test_the_demo_is_the_folder_in_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "ASSETS", tmp_path)
    folder = tmp_path / "demo"
    folder.mkdir()
    write(folder)
    assert open_checkpoint("demo").folder == folder


def test_no_tokenizer_files_give_none(tmp_path):
    assert open_checkpoint(write(tmp_path)).load_tokenizer() is None


def test_the_tokenizer_is_loaded(tmp_path):
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    tokenizer = open_checkpoint(write(tmp_path)).load_tokenizer()
    assert tokenizer.convert_tokens_to_ids("b") == 2


def test_a_damaged_tokenizer_is_reported(tmp_path):
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer in .* cannot be read"):
        open_checkpoint(tmp_path).load_tokenizer()
