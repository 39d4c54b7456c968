"""Requests with a source: told apart, aborted, ended, badly made."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from multiexit_engine import (
    Engine,
    FinishReason,
    SamplingParams,
)
from multiexit_engine.cli.app import app
from tests.tiny import byte_tokenizer

BART = Path(__file__).parents[1] / "golden" / "elmer" / "t1"
DIRECT = {
    "lm_head_layer_indices": (1, 2, 3, 4),
    "vocab_projection_mode": "SHARED_PROJECTION_DIRECT",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    copy = tmp_path_factory.mktemp("bart") / "t1"
    shutil.copytree(BART, copy)
    byte_tokenizer().save_pretrained(copy)
    return copy


def new_engine(folder, **options):
    return Engine.from_pretrained(
        folder, architecture="bart", dtype="float32", device="cpu", **DIRECT, **options
    )


@pytest.fixture(scope="module")
def engine(folder):
    return new_engine(folder)


def tokens(output):
    return [completion.token_ids for completion in output.outputs]


def test_equal_beginnings_after_other_sources_share_nothing(folder):
    engine = new_engine(folder, block_size=2)
    params = SamplingParams(max_new_tokens=9, ignore_eos=True)
    sources = [[5, 6, 7], [300, 20]]
    fresh = [tokens(new_engine(folder).generate([s], params)[0]) for s in sources]
    assert [tokens(engine.generate([s], params)[0]) for s in sources * 2] == fresh * 2


def test_an_aborted_request_gives_its_source_blocks_back(engine):
    name = engine.add_request([5] * 40, SamplingParams(max_new_tokens=30, ignore_eos=True, n=1))
    engine.step()
    assert engine.stats().num_free_kv_blocks < engine.stats().num_kv_blocks - 2
    assert engine.abort(name).outputs[0].finish_reason is FinishReason.ABORT
    assert engine.stats().num_free_kv_blocks == engine.stats().num_kv_blocks


def test_the_token_forced_by_the_checkpoint_ends_full_outputs(engine):
    source = [9, 8, 7]
    forced = engine.generate([source], SamplingParams(max_new_tokens=5))[0].outputs[0]
    free = engine.generate([source], SamplingParams(max_new_tokens=5, ignore_eos=True))[0]
    assert forced.token_ids[-1] == 2
    assert free.outputs[0].token_ids[-1] != 2


@pytest.mark.parametrize(
    ("source", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([5] * 65, {}, "65 tokens: the encoder of this model reads 64"),
        ([5, 400], {}, r"prompt\[1\]=400"),
        ([5], {"prompt_logprobs": 1}, "the encoder reads the prompt"),
        ([5], {"forced_bos_token_id": 400}, "forced_bos_token_id: token 400"),
    ],
)
def test_what_cannot_run_is_named(engine, source, params, message):
    with pytest.raises(ValueError, match=message):
        engine.generate([source], SamplingParams(max_new_tokens=2, **params))


def test_what_needs_a_single_text_is_refused_by_name(engine):
    with pytest.raises(ValueError, match="encoder-decoder scores \\(source, target\\) tuples"):
        engine.score([[1, 2, 3]])
    with pytest.raises(ValueError, match="this reads one text"):
        engine.logits([1, 2, 3])
    with pytest.raises(ValueError, match=r"items\[0\]\[1\] has 64 tokens: .* 63"):
        engine.score([([1], [5] * 64)])


def test_a_source_that_can_never_fit_is_named(folder):
    engine = new_engine(folder, block_size=2, kv_cache_memory=20 * 4 * 2 * 2 * 64 * 4)
    with pytest.raises(ValueError, match="beside a source of 40 .* need 25 KV blocks"):
        engine.generate([[5] * 40], SamplingParams(max_new_tokens=9))


def test_the_output_shows_the_source_as_its_prompt(engine):
    output = engine.generate(["abc"], SamplingParams(max_new_tokens=4))[0]
    assert output.prompt == "abc"
    assert output.prompt_token_ids == engine.tokenizer("abc")["input_ids"]


def test_the_command_line_generates(folder):
    ran = CliRunner().invoke(
        app,
        ["generate", "abc", "--model", str(folder), "--architecture", "bart"]
        + ["--max-new-tokens", "5"],
    )
    assert ran.exit_code == 0, ran.output
