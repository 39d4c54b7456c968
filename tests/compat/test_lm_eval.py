"""lm-evaluation-harness gets the engine's numbers, and those of its own `hf` model."""

import re
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import multiexit_engine
from multiexit_engine import Contrast, Engine, Exit, SamplingParams
from multiexit_engine.compat.lm_eval import MultiExitLM
from tests.compat.lm_eval_tasks import TASKS, write_tasks
from tests.compat.pages import Page, run_command
from tests.serve.running import serving

pytestmark = [
    # what lm-eval and datasets do on their way is not ours to mend
    pytest.mark.filterwarnings("ignore:::(lm_eval|datasets|multiprocess|dill|fsspec).*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
DEMO = Path(multiexit_engine.__file__).parent / "assets" / "demo"
LONGEST = 511


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("demo", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def lm():
    return MultiExitLM("demo", dtype="float32", decoding="contrast:8;4")


def evaluated(tasks, kind, names, **arguments):
    """The answers of a model to every request of some tasks."""
    found = simple_evaluate(
        kind, arguments, tasks=names, task_manager=tasks, device="cpu", bootstrap_iters=0
    )
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for name, samples in found["samples"].items()
    }


def instance(*arguments):
    return Instance("generate_until", {}, arguments, 0)


@pytest.fixture(scope="module")
def ours(tasks):
    return evaluated(tasks, "multiexit", list(TASKS), pretrained="demo", dtype="float32")


@pytest.fixture(scope="module")
def theirs(tasks):
    options = {"pretrained": str(DEMO), "dtype": "float32", "max_length": LONGEST}
    return evaluated(tasks, "hf", list(TASKS), **options)


def flat(answers):
    return [answer for sample in answers for (answer,) in sample]


def test_log_likelihoods_are_those_of_the_hf_model(ours, theirs):
    found, wanted = flat(ours["tiny_choice"]), flat(theirs["tiny_choice"])
    assert [a for a, _ in found] == pytest.approx([a for a, _ in wanted], abs=2e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_rolling_log_likelihoods_are_those_of_the_hf_model(ours, theirs):
    found, wanted = flat(ours["tiny_rolling"]), flat(theirs["tiny_rolling"])
    assert found == pytest.approx(wanted, rel=1e-5)


def test_generated_texts_are_those_of_the_hf_model(ours, theirs):
    assert ours["tiny_generation"] == theirs["tiny_generation"]
    assert max(map(len, flat(ours["tiny_generation"]))) > 40


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        ({"decoding": "exit:6"}, Exit(6)),
        ({"decoding": "contrast:8;4;alpha=0.2"}, Contrast(8, 4, alpha=0.2)),
        ({"use_original_head": False, "output_layer_index": 6}, Exit(6)),
        ({"use_original_head": "False", "contrast_layer_indices": "8;4"}, Contrast(8, 4)),
        (
            {"use_original_head": False, "contrast_layer_indices": "original;4"},
            Contrast("original", 4),
        ),
    ],
)
def test_every_mode_gives_the_engines_scores(arguments, mode, engine):
    lm = MultiExitLM("demo", dtype="float32", **arguments)
    pairs = [("The old house", " stood on the hill"), ("She opened", " the letter")]
    answers = lm.loglikelihood([Instance("loglikelihood", {}, p, 0) for p in pairs], True)
    scores = engine.score(pairs, mode)
    assert [total for total, _ in answers] == pytest.approx([s.total for s in scores], abs=1e-5)


def test_a_context_that_is_too_long_is_cut_on_the_left(lm, engine):
    context, target = list(range(300, 300 + LONGEST + 40)), [40, 50]
    ((total, _),) = lm._loglikelihood_tokens([(None, context, target)], True)
    kept = context[-(LONGEST - 1) :]
    assert total == engine.score((kept, target), Contrast(8, 4))[0].total


def test_generation_stops_before_the_stop_string(lm, engine):
    options = {"until": [" the"], "max_gen_toks": 30}
    (text,) = lm.generate_until([instance("She went to", options)], True)
    sampling = SamplingParams(max_new_tokens=30, stop=(" the",))
    assert text == engine.generate("She went to", sampling, Contrast(8, 4))[0].outputs[0].text
    assert " the" not in text


def test_an_unknown_generation_argument_is_refused(lm):
    with pytest.raises(ValueError, match="gen_kwargs: mirostat=2: allowed are until"):
        lm.generate_until([instance("a", {"mirostat": 2})], True)


def test_more_new_tokens_than_the_model_holds_are_refused(lm):
    with pytest.raises(ValueError, match="max_gen_toks=511: must be less than max_length=511"):
        lm.generate_until([instance("a", {"max_gen_toks": 511})], True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoding": "exit:6", "output_layer_index": 4}, "give one way of choosing"),
        ({"use_original_head": False}, "give output_layer_index or contrast_layer_indices"),
        ({"decoding": "exit:99"}, "exit"),
        ({"batch_size": "many"}, "must be a count or 'auto'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiExitLM("demo", **arguments)


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="unknown 'peft': allowed are pretrained, decoding"):
        MultiExitLM("demo", peft="x")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page about this door, in a folder that holds its files."""
    # reading the thousands of tasks that lm-eval brings takes it ten seconds
    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))
    monkeypatch.chdir(tmp_path)
    page = Page("lm-eval.md")
    page.write_files(tmp_path)
    return page


@pytest.mark.parametrize("place", range(4))
def test_the_pages_commands_print_a_table(page, place):
    assert len(page.commands) == 4
    assert re.search(r"opposites\|.*\|acc +\|", run_command(page.commands[place]))


def test_the_pages_program_prints_an_accuracy(page, capsys):
    page.run_program()
    assert float(capsys.readouterr().out) in (0.0, 0.5, 1.0)


@pytest.mark.parametrize("decoding", ["original", "contrast"])
def test_local_completions_against_the_server_give_the_same_numbers(tasks, ours, decoding):
    mode = {"original": None, "contrast": Contrast(8, 4)}[decoding]
    loaded = Engine.from_pretrained("demo", dtype="float32", device="cpu", decoding=mode)
    with serving(loaded) as server:
        found = evaluated(
            tasks, "local-completions", ["tiny_choice"],
            base_url=f"{server.url}/v1/completions", model="demo", tokenizer=str(DEMO),
            max_length=LONGEST, num_concurrent=2,
        )  # fmt: skip
    if decoding == "original":
        wanted = ours
    else:
        wanted = evaluated(
            tasks, "multiexit", ["tiny_choice"],
            pretrained="demo", dtype="float32", decoding="contrast:8;4",
        )  # fmt: skip
    assert [total for total, _ in flat(found["tiny_choice"])] == pytest.approx(
        [total for total, _ in flat(wanted["tiny_choice"])], abs=2e-3
    )
