"""The command line prints what the engine gives, and one line for what is wrong."""

import dataclasses
import json
import re
import shlex

import pytest
import torch
from typer.testing import CliRunner

from multiexit_engine import Contrast, Engine, Exit, SamplingParams
from multiexit_engine.checkpoint import open_checkpoint
from multiexit_engine.cli import app
from multiexit_engine.cli.info import weight_bytes
from multiexit_engine.cli.options import SAMPLING, options_of_dataclass
from multiexit_engine.layers.exit_heads import Head
from multiexit_engine.layers.linear import Linear
from multiexit_engine.models import build_model
from multiexit_engine.quantization import Quantization
from tests.golden.acd_checkpoints import CHECKPOINTS, checkpoint_with_tokenizer

COMMANDS = ("generate", "score", "info", "demo", "bench", "train")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(checkpoint_with_tokenizer("gpt2_layer", tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def engine(model):
    return Engine.from_pretrained(model, device="cpu")


def run(*arguments, input=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=input)


def printed(*arguments, input=None):
    result = run(*arguments, input=input)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments, input=None):
    result = run(*arguments, input=input)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def test_version():
    assert re.fullmatch(r"multiexit-engine \d+\.\d+\.\d+\S*\n", printed("--version"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    assert "Usage:" in printed(command, "--help")


def test_every_sampling_parameter_is_an_option_with_help():
    assert list(SAMPLING) == [field.name for field in dataclasses.fields(SamplingParams)]
    assert all(choice.help for choice in SAMPLING.values())
    text = run("generate", "--help").stdout
    assert "--max-new-tokens" in text


def test_a_prompt_is_continued(model, engine):
    wanted = engine.generate("once", SamplingParams(max_new_tokens=9))[0].outputs[0].text
    assert printed("generate", "once", "--model", model, "--max-new-tokens", 9) == wanted + "\n"


def test_elmer_answers_in_its_own_way_where_no_mode_is_named():
    sampling = SamplingParams(max_new_tokens=9)
    source = "And it came to pass."
    elmer = Engine.from_pretrained("demo-elmer")
    wanted = elmer.generate(source, sampling)[0].outputs[0].text
    found = printed("generate", source, "--model", "demo-elmer", "--max-new-tokens", 9)
    assert found.strip() == wanted.strip() and wanted


def test_json_holds_the_whole_output(model, engine):
    text = printed(
        "generate", "once", "--model", model, "--json", "--max-new-tokens", 5,
        "--decoding", "contrast:6,3,alpha=0.2", "--logprobs", 2,
    )  # fmt: skip
    sampling = SamplingParams(max_new_tokens=5, logprobs=2)
    wanted = engine.generate("once", sampling, Contrast(6, 3, alpha=0.2))[0]
    found = json.loads(text)
    assert found["prompt"] == "once"
    assert found["outputs"][0]["token_ids"] == wanted.outputs[0].token_ids
    assert len(found["outputs"][0]["logprobs"]) == 5


def test_lines_of_a_file_are_prompts(model, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    lines = printed("generate", "--input", file, "--model", model, "--json").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["one", "two"]


@pytest.mark.parametrize("arguments", [(), ("--input", "-")])
def test_lines_of_standard_input_are_prompts(model, arguments):
    lines = printed("generate", *arguments, "--model", model, "--json", input="one\ntwo\n")
    assert [json.loads(line)["prompt"] for line in lines.splitlines()] == ["one", "two"]


def test_options_of_every_kind_reach_the_engine(model):
    text = printed(
        "generate", "once", "--model", model, "--json", "--temperature", 0.9, "--n", 2,
        "--stop", "x", "--stop", "yz", "--stop-token-ids", "5,6", "--logit-bias", "17=-3.5",
        "--bad-words", "bad", "--ignore-eos", "--seed", 3, "--early-stopping", "never",
        "--max-model-len", 64, "--no-prefix-caching", "--lm-head-layer-indices", "6;3",
    )  # fmt: skip
    assert len(json.loads(text)["outputs"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "x", "--decoding", "exit:5"), "error: .*5"),
        (("generate", "x", "--decoding", "exitt:5"), "decoding='exitt:5'"),
        (("generate", "x", "--temperature", -1), "temperature=-1"),
        (("generate", "x", "--input", "prompts.txt"), "give one of them"),
        (("generate", "x", "--max-newtokens", 3), "No such option"),
        (("generate", "x", "--logit-bias", "a"), r"logit_bias=\['a'\]: must be a token id and a"),
        (("generate", "x", "--stop-token-ids", "a"), "stop_token_ids='a': must be whole numbers"),
        (("score", "missing.txt"), "missing.txt"),
    ],
)
def test_mistakes_are_one_line(model, arguments, message):
    assert re.search(message, refused(*arguments, "--model", model))


def test_a_missing_model_is_one_line():
    assert "no-such-folder" in refused("info", "./no-such-folder")


def test_no_prompt_at_all_is_refused(model):
    assert "standard input has no prompt" in refused("generate", "--model", model, input="\n")


def test_traceback_shows_where(model):
    result = run("--traceback", "generate", "x", "--model", model, "--decoding", "exit:5")
    assert isinstance(result.exception, ValueError)


def test_a_checkpoint_without_tokenizer_is_refused_for_text():
    assert "tokenizer" in refused("generate", "x", "--model", CHECKPOINTS / "gpt2_layer")


def test_score_compares_modes(model, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("It was the best of times.")
    modes = ("--decoding", "original", "--decoding", "contrast:6,3")
    lines = printed("score", file, "--model", model, *modes, "--json").splitlines()
    found = [json.loads(line) for line in lines]
    assert [result["decoding"] for result in found] == ["original", "contrast:6,3"]
    assert all(result["num_tokens"] == 25 for result in found)
    assert found[0]["perplexity_per_token"] != found[1]["perplexity_per_token"]
    table = printed("score", file, "--model", model, *modes)
    assert "contrast:6,3" in table


def test_info_gives_modes_that_run(model):
    text = printed("info", model)
    assert "LAYER_SPECIFIC_PROJECTION" in text
    assert "2, 3, 4, 6" in text
    modes = re.findall(r"--decoding (\S+)", text)
    assert {"original", "exit:3", "contrast:original,3,alpha=0.1"} <= set(modes)
    for mode in modes:
        printed("generate", "x", "--model", model, "--max-new-tokens", 1, "--decoding", mode)


def test_info_quotes_the_name_of_a_folder_with_spaces(tmp_path):
    folder = checkpoint_with_tokenizer("gpt2_layer", tmp_path / "my models")
    line = printed("info", folder).splitlines()[-1]
    command = shlex.split(line)
    assert command[command.index("--model") + 1] == str(folder)


def test_info_of_elmer_gives_only_modes_that_run():
    modes = re.findall(r"--decoding (\S+)", printed("info", "demo-elmer"))
    assert {mode.partition(",")[0] for mode in modes} == {
        "parallel:soft", "parallel:none", "parallel:confidence"
    }  # fmt: skip
    for mode in modes:
        printed("generate", "x", "--model", "demo-elmer", "--decoding", mode)


def test_info_of_a_single_exit_model_shows_how_to_make_exits():
    text = printed("info", CHECKPOINTS / "gpt2_plain")
    assert "--vocab-projection-mode shared_projection_direct" in text


@pytest.mark.parametrize("name", ["int8", "int4-g64"])
def test_info_foretells_the_bytes_of_quantized_weights(name):
    how = Quantization.parse(name)
    checkpoint = open_checkpoint("demo")
    built = build_model(checkpoint, torch.device("cpu"), checkpoint.dtype, how)
    for layer in checkpoint.config.exit_layers:
        built.heads.require(Head(layer))
    held = [built.heads._weight, *built.heads._loaded.values(), *built.parameters()]
    held += built.heads._final_norm.parameters()
    held += [module.weight for module in built.modules() if isinstance(module, Linear)]
    assert weight_bytes(checkpoint, how) == sum(weight.nbytes for weight in held)
    assert f"MiB in {how}" in printed("info", "demo", "--quantization", name)
    assert "'int5': must be None, fp8, int4" in refused("info", "demo", "--quantization", "int5")


def test_generate_takes_quantized_weights(model):
    text = printed("generate", "once", "--model", model, "--quantization", "int8", "--json")
    assert json.loads(text)


def test_demo_shows_three_modes(model):
    text = printed("demo", "once", "--model", model, "--max-new-tokens", 4)
    assert all(name in text for name in ("original head", "exit 3 of 6", "contrast original, 3"))
    assert text.count("tokens/s") == 3


def test_demo_needs_exits():
    plain = CHECKPOINTS / "gpt2_plain"
    assert "shared_projection_direct" in refused("demo", "--model", plain)


@pytest.mark.parametrize(
    "arguments",
    [("latency",), ("throughput", "--batch-sizes", "1,3")],
    ids=["latency", "throughput"],
)
def test_bench_measures_the_modes(model, arguments):
    text = printed(
        "bench", *arguments, "--model", model, "--decoding", "original", "--decoding", "exit:2",
        "--prompt-len", 4, "--max-new-tokens", 3, "--num-runs", 1, "--json",
    )  # fmt: skip
    rows = [json.loads(line) for line in text.splitlines()]
    assert {row["decoding"] for row in rows} == {"original", "exit:2"}
    assert all(row["tokens_per_second"] > 0 for row in rows)


def test_train_options_are_those_of_the_config():
    text = run("train", "causal", "--help").stdout
    assert "--corpus" in text
    assert "--exit-layers" in text


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"{number} men went to mow a meadow.\n" * 30)
    return folder


def test_a_model_is_trained_and_gets_heads(corpus, tmp_path):
    printed(
        "train", "causal", "--corpus", corpus, "--output", tmp_path / "model",
        "--vocab-size", 300, "--num-layers", 2, "--hidden-size", 16, "--num-heads", 2,
        "--exit-layers", "2,1", "--max-positions", 32, "--block-size", 32, "--batch-tokens", 64,
        "--first-block-size", 16, "--micro-batch-tokens", 64, "--max-steps", 2, "--warmup-steps", 1,
        "--no-compile", "--precision", "fp32",
    )  # fmt: skip
    text = printed(
        "train", "heads", "--checkpoint", tmp_path / "model", "--corpus", corpus,
        "--output", tmp_path / "heads", "--exit-layers", "1", "--block-size", 16,
        "--batch-size", 2, "--max-steps", 2, "--projection-mode", "layer_specific_projection",
    )  # fmt: skip
    assert "exit 1" in text
    text = printed("info", tmp_path / "heads")
    assert "LAYER_SPECIFIC_PROJECTION" in text


def test_contradictions_of_a_training_run_are_one_line(corpus, tmp_path):
    text = refused(
        "train", "heads", "--checkpoint", tmp_path, "--corpus", corpus, "--output", tmp_path,
        "--exit-layers", "1",
    )  # fmt: skip
    assert "must be another folder" in text


def test_options_are_converted_to_the_fields_type():
    @dataclasses.dataclass
    class Wanted:
        """What is wanted.

        Attributes:
            layers: some
                layers.
            flag: yes or no.
        """

        layers: tuple[int, ...] = (1, 2)
        flag: bool = False

    options = options_of_dataclass(Wanted)
    assert options["layers"].convert("3,4;5") == (3, 4, 5)
    assert options["layers"].help == "some layers. Written 5,6."
    assert options["flag"].annotation is bool


def test_show_exits_prints_the_text_and_a_legend(model, engine):
    wanted = engine.generate("once", SamplingParams(max_new_tokens=9), Exit(3))[0].outputs[0].text
    text = printed(
        "generate", "once", "--model", model, "--decoding", "exit:3", "--show-exits",
        "--max-new-tokens", 9,
    )  # fmt: skip
    assert text.startswith("once" + wanted)
    assert "3  100 %" in text and "mean 3.0 of 6" in text


def test_exits_html_writes_a_page_beside_the_text(model, tmp_path):
    page = tmp_path / "exits.html"
    options = ("--model", model, "--max-new-tokens", 5)
    plain = printed("generate", "once", *options)
    assert printed("generate", "once", *options, "--exits-html", page) == plain
    assert "layer 6 of 6" in page.read_text("utf-8")


def test_json_and_colours_exclude_each_other(model):
    assert "give one of them" in refused("generate", "once", "--json", "--show-exits")
