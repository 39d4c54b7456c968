import math

import pytest

from multiexit_engine import Contrast, DoLa, Engine, Exit, FinishReason, SamplingParams
from multiexit_engine.errors import BackendUnavailable, RequestFailed
from tests.tiny import byte_tokenizer, save_gpt2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([1] * 1024, "1024 tokens: .* 1023"),
        ([1, 257], r"prompt\[1\]=257: .* 0\.\.256"),
        ([1, -1], r"prompt\[1\]=-1"),
        ([1, 2.5], "must be a string or a list of token ids"),
    ],
)
def test_a_bad_prompt_is_named(engine, prompt, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([[1, 2], prompt], SamplingParams(max_new_tokens=1))


def test_the_place_of_a_bad_prompt_is_named(engine):
    with pytest.raises(ValueError, match=r"prompts\[1\]: "):
        engine.generate([[1, 2], [999]])


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (Exit(3), "Exit.layer=3: this model has exits at layers 2, 4, 6"),
        (Contrast(6, 5), "Contrast.lower=5"),
        (Contrast(7, 2), "Contrast.upper=7"),
        (DoLa((2, 6)), r"DoLa.candidates=\(2, 6\): .* layers from 0 to 5"),
        (DoLa((0, 2), heads="exits"), "DoLa.candidates=0: this model has exits at layers 2, 4, 6"),
        ("contrast", "must be one of Original"),
    ],
)
def test_a_mode_that_the_model_lacks_is_named(engine, mode, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([1, 2], decoding=mode)


def test_original_cannot_be_the_lower_head():
    with pytest.raises(ValueError, match="Contrast.lower='original'"):
        Contrast(6, "original")


def test_a_temperature_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="temperature=nan"):
        SamplingParams(temperature=math.nan)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(stop_token_ids=(257,)), "stop_token_ids: token 257"),
        (SamplingParams(logit_bias={300: 1.0}), "logit_bias: token 300"),
        (SamplingParams(bad_words=((1, 300),)), "bad_words: token 300"),
        ({"temperature": 1}, "must be SamplingParams"),
    ],
)
def test_sampling_parameters_that_the_model_lacks_are_named(engine, params, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([1, 2], params)


@pytest.fixture(scope="module")
def engine_with_added_token(tmp_path_factory):
    """Of a checkpoint whose tokenizer got a token that its embeddings were not resized for."""
    folder = save_gpt2(tmp_path_factory.mktemp("model"))
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(folder)
    return Engine.from_pretrained(folder, dtype="float32", device="cpu")


def test_a_text_with_a_token_that_the_model_lacks_is_refused(engine_with_added_token):
    with pytest.raises(ValueError, match=r"prompt has the token '<think>'.* 257.* 0\.\.256"):
        engine_with_added_token.generate("so <think> then")
    with pytest.raises(ValueError, match=r"items\[0\] has the token '<think>'"):
        engine_with_added_token.score("so <think> then")


def test_a_bad_word_with_a_token_that_the_model_lacks_is_refused(engine_with_added_token):
    with pytest.raises(ValueError, match="bad_words='<think>' has the token '<think>'"):
        engine_with_added_token.generate([1], SamplingParams(bad_words=["<think>"]))


def test_a_bad_word_of_which_the_tokenizer_makes_nothing_is_refused(engine, monkeypatch):
    class Silent:
        def __call__(self, text, **_):
            return {"input_ids": []}

    monkeypatch.setattr(engine._intake, "_tokenizer", Silent())
    with pytest.raises(ValueError, match="bad_words=' ': the tokenizer makes no token of it"):
        engine.generate([1], SamplingParams(bad_words=[" "]))


def test_a_request_that_can_never_fit_is_refused(folder):
    engine = Engine.from_pretrained(folder, dtype="float32", kv_cache_memory=200_000)
    with pytest.raises(ValueError, match="blocks"):
        engine.generate([1] * 500, SamplingParams(max_new_tokens=400))
    assert engine.generate([1, 2], SamplingParams(max_new_tokens=2))[0].finished


def test_a_failing_contrast_function_ends_its_own_request_only(engine):
    def broken(upper, lower):
        raise RuntimeError("no such formula")

    modes = [Exit(4), Contrast(6, 2, function=broken), Exit(4)]
    params = SamplingParams(max_new_tokens=4)
    good, bad, other = engine.generate([[1, 2], [1, 2], [3]], params, modes)
    assert bad.outputs[0].finish_reason is FinishReason.ERROR
    assert "no such formula" in bad.error
    alone = engine.generate([1, 2], params, Exit(4))[0]
    assert good.outputs[0].token_ids == alone.outputs[0].token_ids
    assert len(other.outputs[0].token_ids) == 4


def test_scores_that_are_not_numbers_end_the_request_with_an_error(engine):
    mode = Contrast(6, 2, function=lambda upper, lower: upper * math.nan)
    (output,) = engine.generate([1, 2], SamplingParams(max_new_tokens=4), mode)
    assert output.outputs[0].finish_reason is FinishReason.ERROR and "NaN" in output.error


def test_a_failing_request_raises_while_it_is_streamed(engine):
    mode = Contrast(6, 2, function=lambda upper, lower: upper[:, :, :3])
    with pytest.raises(RequestFailed):
        list(engine.stream([1, 2], SamplingParams(), mode))


def test_text_needs_a_tokenizer(tmp_path):
    engine = Engine.from_pretrained(save_gpt2(tmp_path, with_tokenizer=False), dtype="float32")
    with pytest.raises(ValueError, match="has no tokenizer"):
        engine.generate("text")
    with pytest.raises(ValueError, match="stop_token_ids"):
        engine.generate([1], SamplingParams(stop=("a",)))
    assert len(engine.generate([1], SamplingParams(max_new_tokens=3))[0].outputs[0].token_ids) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int8"}, ValueError, "dtype='int8'"),
        ({"device": "tpu"}, ValueError, "device='tpu'"),
        ({"backend": "fast"}, ValueError, "backend='fast'"),
        ({"max_model_len": 4096}, ValueError, r"max_model_len=4096: this model allows 2\.\.1024"),
        ({"block_size": 0}, ValueError, "block_size=0"),
        ({"kv_cache_memory": 10}, ValueError, "kv_cache_memory=10: one block"),
        ({"kv_cache_memory": 2**60}, ValueError, "kv_cache_memory: .* 'cpu' does not give"),
        ({"quantization": "int3"}, ValueError, "quantization='int3': must be None, fp8, int4"),
        ({"decoding": Exit(3)}, ValueError, "exits at layers 2, 4, 6"),
    ],
)
def test_an_engine_option_without_meaning_is_refused(folder, options, error, message):
    with pytest.raises(error, match=message):
        Engine.from_pretrained(folder, **options)


def test_the_native_backend_needs_the_compiled_kernels(folder, monkeypatch):
    monkeypatch.setattr("multiexit_engine.ops.registry._load", lambda _: ImportError("no file"))
    with pytest.raises(BackendUnavailable, match="backend='native': .*no file"):
        Engine.from_pretrained(folder, backend="native", device="cpu")
    assert Engine.from_pretrained(folder, device="cpu").generate([1])


def test_as_many_parameters_as_prompts_are_needed(engine):
    with pytest.raises(ValueError, match="sampling has 2 items for 3 prompts"):
        engine.generate([[1]] * 3, [SamplingParams()] * 2)
