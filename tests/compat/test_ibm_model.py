"""AutoMultiExitModel behaves as IBM's and as transformers' models do."""

import re
import shutil

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, GPT2LMHeadModel
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from multiexit_engine import AutoMultiExitModel, MultiExitConfiguration
from multiexit_engine.errors import RequestFailed
from tests.golden.acd_checkpoints import CHECKPOINTS, checkpoint_with_tokenizer

README = """
from multiexit_engine import MultiExitConfiguration
from multiexit_engine import AutoMultiExitModel

multi_exit_config = MultiExitConfiguration(use_original_head=False, {exits})
model = AutoMultiExitModel.from_pretrained("{name}", multi_exit_config=multi_exit_config)

from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
prompt = tokenizer("humpty dumpty sat on", return_tensors='pt')
generated_ids = model.generate(**prompt, max_new_tokens=15)
print(tokenizer.batch_decode(generated_ids))
"""


def load(name="gpt2_layer", **fields):
    return AutoMultiExitModel.from_pretrained(
        str(CHECKPOINTS / name),
        multi_exit_config=MultiExitConfiguration(**fields),
        device_map="cpu",
    )


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def transformer():
    return GPT2LMHeadModel.from_pretrained(CHECKPOINTS / "gpt2_plain", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def plain():
    """The same checkpoint as ``transformer``."""
    return load("gpt2_plain")


IDS = torch.tensor([[0, 0, 21, 38, 122], [310, 322, 475, 290, 37]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def test_dola_layers_need_the_models_own_head():
    model = load(use_original_head=False, output_layer_index=3)
    with pytest.raises(ValueError, match="dola_layers='high': needs the model's own head"):
        model.generate(IDS, dola_layers="high")


@pytest.mark.parametrize("exits", ["contrast_layer_indices=(6, 3)", "output_layer_index=3"])
def test_ibms_readme_runs_with_other_import_lines(exits, tmp_path):
    folder = checkpoint_with_tokenizer("gpt2_layer", tmp_path)
    printed = []
    exec(README.format(name=folder, exits=exits), {"print": printed.append})
    assert len(printed[0]) == 1
    assert printed[0][0].startswith("humpty dumpty sat on")


@pytest.mark.parametrize("name", ["gpt2_released_format", "gpt_neo_released_format"])
def test_released_checkpoints_give_plain_tensors(name):
    """Their config says output_hidden_states=true, which makes IBM's own return a dictionary."""
    found = load(name, use_original_head=False, contrast_layer_indices="original;2").generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=4
    )
    assert found.dtype == torch.int64
    assert found.shape == (1, 7)


def test_the_parts_of_a_transformers_model_are_there(model):
    assert model.config.model_type == "gpt2"
    assert model.config.lm_head_layer_indices == [6, 4, 3, 2]
    assert model.device == torch.device("cpu")
    assert model.eval() is model
    assert model.to("cpu") is model
    assert model.engine.model_config.exit_layers == (2, 3, 4, 6)


def test_a_loaded_model_stays_on_its_device(model):
    with pytest.raises(ValueError, match=r"device_map='meta'"):
        model.to("meta")


def test_half_precision_files_are_computed_in_float32():
    assert load("llama_layer").engine.config.dtype == torch.float32


def test_fewer_exits_can_be_asked_for():
    narrow = load(use_original_head=False, output_layer_index=3, lm_head_layer_indices="3;2")
    assert narrow.engine.model_config.exit_layers == (2, 3)


def test_an_exit_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="5"):
        load(use_original_head=False, output_layer_index=5)


def test_missing_heads_are_refused():
    with pytest.raises(ValueError, match="LAYER_SPECIFIC_PROJECTION"):
        load("gpt2_cast", use_original_head=False, output_layer_index=3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"revisoin": "main"}, TypeError, "unknown option 'revisoin'.*revision"),
        ({"token": "x"}, TypeError, "HF_TOKEN"),
        ({"load_in_8bit": True}, TypeError, "unknown option 'load_in_8bit'"),
        ({"device_map": {"a": 0, "b": 1}}, ValueError, "must be one device"),
        ({"device_map": "cpu", "device": "cpu"}, ValueError, "give one of them"),
        ({"dtype": "float32", "torch_dtype": "float32"}, ValueError, "give one of them"),
        ({"dtype": "int4"}, ValueError, "dtype='int4'"),
    ],
)
def test_wrong_loading_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        AutoMultiExitModel.from_pretrained(
            str(CHECKPOINTS / "gpt2_layer"), MultiExitConfiguration(), **options
        )


def test_logits_hold_every_position_and_zeros_for_padding(plain, transformer):
    with torch.no_grad():
        wanted = transformer(IDS, attention_mask=MASK, position_ids=_positions(MASK)).logits
    found = plain(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found[MASK.bool()], wanted[MASK.bool()], atol=1e-4, rtol=1e-4)
    assert not found[~MASK.bool()].any()


def _positions(mask):
    return (mask.cumsum(-1) - 1).clamp_min(0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 12},
        {"max_new_tokens": 9, "eos_token_id": [206, 453], "pad_token_id": 7},
        {"max_new_tokens": 9, "eos_token_id": 460},
        {"max_new_tokens": 9, "eos_token_id": [460, 14], "min_new_tokens": 5},
        {"max_length": 14, "min_length": 8, "eos_token_id": [460, 14]},
        {"max_new_tokens": 9, "repetition_penalty": 1.5},
        {"max_new_tokens": 9, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 9, "bad_words_ids": [[460], [14, 259]]},
        {"max_new_tokens": 9, "bad_words_ids": [[460], [14]], "eos_token_id": 460},
        {"max_new_tokens": 9, "num_beams": 3},
        {"max_new_tokens": 9, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3},
        {"max_new_tokens": 9, "num_beams": 3, "early_stopping": True, "eos_token_id": [206, 460]},
        {"generation_config": GenerationConfig(max_new_tokens=6, repetition_penalty=1.2)},
        {"max_new_tokens": 9, "top_k": None, "use_cache": True},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_generate_equals_transformers(plain, transformer, options):
    with torch.no_grad():
        wanted = transformer.generate(IDS, attention_mask=MASK, **options)
    found = plain.generate(IDS, attention_mask=MASK, **options)
    assert found.tolist() == wanted.tolist()


def test_padding_is_found_without_a_mask(plain, transformer):
    ids = torch.where(MASK.bool(), IDS, 9)
    options = {"pad_token_id": 9, "eos_token_id": 8, "max_new_tokens": 6}
    assert plain.generate(ids, **options).tolist() == transformer.generate(ids, **options).tolist()


def test_without_a_prompt_the_first_token_begins_the_text(plain, transformer):
    found = plain.generate(max_new_tokens=5)
    assert found.tolist() == transformer.generate(max_new_tokens=5).tolist()


def test_the_dictionary_form_holds_beams_and_scores(plain, transformer):
    options = {"max_new_tokens": 8, "num_beams": 3, "return_dict_in_generate": True}
    found = plain.generate(IDS, attention_mask=MASK, **options)
    wanted = transformer.generate(IDS, attention_mask=MASK, output_scores=True, **options)
    assert isinstance(found, GenerateBeamDecoderOnlyOutput)
    assert found.sequences.tolist() == wanted.sequences.tolist()
    torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores, atol=1e-4, rtol=0)


def test_the_dictionary_form_of_greedy_search_holds_sequences(plain):
    found = plain.generate(IDS, max_new_tokens=3, return_dict_in_generate=True)
    assert isinstance(found, GenerateDecoderOnlyOutput)
    assert found.sequences.shape == (2, 8)


def test_samples_repeat_with_the_same_seed(plain):
    options = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 3, "top_k": 0}
    first = plain.generate(IDS, attention_mask=MASK, seed=5, **options)
    assert first.shape == (6, 13)
    assert plain.generate(IDS, attention_mask=MASK, seed=5, **options).tolist() == first.tolist()
    assert plain.generate(IDS, attention_mask=MASK, seed=6, **options).tolist() != first.tolist()
    assert len(set(map(tuple, first[:3].tolist()))) == 3


def test_samples_without_a_seed_follow_torchs_generator(plain):
    options = {"do_sample": True, "max_new_tokens": 8}
    torch.manual_seed(3)
    first = plain.generate(IDS[1:], **options)
    second = plain.generate(IDS[1:], **options)
    torch.manual_seed(3)
    assert plain.generate(IDS[1:], **options).tolist() == first.tolist()
    assert second.tolist() != first.tolist()


def test_equal_rows_of_a_seeded_batch_differ(plain):
    found = plain.generate(IDS[1:].repeat(2, 1), do_sample=True, top_k=0, seed=0)
    assert found[0].tolist() != found[1].tolist()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_token": 3}, TypeError, "unknown option 'max_new_token'.*max_new_tokens"),
        ({"streamer": object()}, TypeError, "unknown option 'streamer'"),
        ({"output_scores": True}, ValueError, "output_scores=True.*does not offer"),
        ({"penalty_alpha": 0.6}, ValueError, "penalty_alpha=0.6"),
        ({"prompt_lookup_num_tokens": 3}, ValueError, "prompt_lookup_num_tokens=3"),
        ({"do_sample": True, "num_beams": 2}, ValueError, "do_sample=True with num_beams=2"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences=2"),
        ({"max_length": 5}, ValueError, "max_length=5"),
        ({"top_p": 1.5, "do_sample": True}, ValueError, "top_p=1.5"),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, "attention_mask of shape"),
        ({"attention_mask": MASK.flip(-1)}, ValueError, "padding_side='left'"),
    ],
)
def test_wrong_generation_options_are_named(plain, options, error, message):
    with pytest.raises(error, match=message):
        plain.generate(IDS, **options)


def test_sampling_options_without_sampling_warn(plain):
    with pytest.warns(UserWarning, match="temperature: no effect without do_sample=True"):
        plain.generate(IDS, temperature=0.7, max_new_tokens=1)


def test_input_ids_are_a_matrix_of_integers(plain):
    with pytest.raises(ValueError, match=re.escape("shape [5]")):
        plain.generate(IDS[0])


def test_a_failing_contrast_function_raises():
    def broken(upper, lower):
        raise ZeroDivisionError("no mass left")

    broken_model = load(
        use_original_head=False, contrast_layer_indices=(6, 3), contrast_function=broken
    )
    with pytest.raises(RequestFailed, match="no mass left"):
        broken_model.generate(IDS, max_new_tokens=2)


def test_generation_defaults_of_the_checkpoint_are_kept(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINTS / "gpt2_plain", folder)
    GenerationConfig(max_new_tokens=3, repetition_penalty=1.4, eos_token_id=1).save_pretrained(
        folder
    )
    ours = AutoMultiExitModel.from_pretrained(str(folder), MultiExitConfiguration())
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    assert ours.generate(IDS).tolist() == theirs.generate(IDS).tolist()


def test_a_tokenizers_output_is_accepted_whole(tmp_path):
    folder = checkpoint_with_tokenizer("gpt2_layer", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(["one", "a longer text"], padding=True, return_tensors="pt")
    found = load().generate(**batch, max_new_tokens=2)
    assert found.shape == (2, len("a longer text") + 2)
