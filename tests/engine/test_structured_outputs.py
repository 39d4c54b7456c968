"""Every text has the form that its request asks for: any mode, any batch, drafted or preempted."""

import asyncio
import json
import re
import threading
from dataclasses import replace

import pytest
import torch
from jsonschema_rs import validator_for

from multiexit_engine import (
    AsyncEngine,
    Contrast,
    DoLa,
    EarlyExit,
    Engine,
    Exit,
    Original,
    SamplingParams,
    SelfSpeculative,
    StructuredOutputs,
)
from multiexit_engine.grammar import GrammarCompiler
from tests.tiny import byte_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog", "Größe"]},
        "ages": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 99},
            "maxItems": 2,
        },
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}
REGEX = r"[a-f]{3,9}-(\d{2}|xyz)\."
FORMS = {
    "regex": StructuredOutputs(regex=REGEX),
    "choice": StructuredOutputs(choice=["yes", "no", "no, thanks", 'a "b" \\']),
    "json": StructuredOutputs(json=SCHEMA),
    "lark": StructuredOutputs(grammar='start: "(" start ")" | /[xy]{1,5}/'),
    "gbnf": StructuredOutputs(grammar='root ::= "a" ("b" | "c")+ "."'),
}
MODES = [
    Original(),
    Exit(2),
    Contrast(6, 2),
    Contrast("original", 4, alpha=0.5),
    Contrast(6, 2, function=torch.sub),
    DoLa((0, 2, 4), relative_top=0.9),
    EarlyExit(0.3, layers=(2, 4)),
    EarlyExit(0.3, kv="copy"),
    SelfSpeculative(2, 4),
    SelfSpeculative(4, 3, Contrast(6, 2)),
    SelfSpeculative(2, 5, DoLa((2, 4))),
]
PROMPTS = [[5, 6, 7], "Once upon", [200]]
WARM = SamplingParams(max_new_tokens=150, temperature=1.5, top_k=0, seed=1)
fits_schema = validator_for(SCHEMA).is_valid


def has_form(name, text):
    match name:
        case "regex":
            return re.fullmatch(REGEX, text)
        case "choice":
            return text in FORMS["choice"].choice
        case "json":
            return fits_schema(json.loads(text))
        case "lark":
            return re.fullmatch(r"[xy]{1,5}", text.strip("()")) and text.count("(") == text.count(
                ")"
            )
        case "gbnf":
            return re.fullmatch("a[bc]+[.]", text)


@pytest.mark.parametrize("mode", MODES, ids=range(len(MODES)))
def test_every_whole_text_has_its_form_in_any_batch(engine, mode):
    samplings = [replace(WARM, structured_outputs=form) for form in FORMS.values()]
    greedy = [replace(sampling, temperature=0.0) for sampling in samplings]
    outputs = engine.generate(
        [PROMPTS[i % 3] for i in range(10)], [*samplings, *greedy], [mode] * 10
    )
    for name, output in zip([*FORMS, *FORMS], outputs, strict=True):
        (found,) = output.outputs
        assert output.error is None
        if found.finish_reason == "length":
            assert name in ("lark", "gbnf"), "only these allow texts of any length"
            assert len(found.token_ids) == 150
        else:
            assert found.finish_reason == "stop"
            assert has_form(name, found.text), (name, found.text)


@pytest.mark.parametrize("mode", MODES, ids=range(len(MODES)))
def test_a_text_does_not_depend_on_its_batch(engine, mode):
    sampling = replace(WARM, structured_outputs=FORMS["regex"])
    (alone,) = engine.generate("Once", sampling, mode)
    others = [SamplingParams(max_new_tokens=30), replace(WARM, structured_outputs=FORMS["json"])]
    company = engine.generate(["Once", [3], [4, 5]], [sampling, *others], [mode, None, mode])
    assert company[0].outputs == alone.outputs


@pytest.mark.parametrize("target", [Original(), Contrast(6, 2), DoLa((0, 2, 4))], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", FORMS)
def test_drafts_change_nothing(engine, target, temperature, name):
    sampling = replace(WARM, temperature=temperature, structured_outputs=FORMS[name])
    (plain,) = engine.generate("Once", sampling, target)
    (drafted,) = engine.generate("Once", sampling, SelfSpeculative(2, 4, target))
    assert drafted.outputs[0].token_ids == plain.outputs[0].token_ids
    assert drafted.outputs[0].finish_reason == plain.outputs[0].finish_reason


def test_several_continuations_have_a_state_each(engine):
    sampling = replace(WARM, n=6, structured_outputs=FORMS["regex"])
    (output,) = engine.generate("Once", sampling)
    texts = [completion.text for completion in output.outputs]
    assert all(has_form("regex", text) for text in texts)
    assert len(set(texts)) > 3


@pytest.mark.parametrize(
    "mode",
    [Original(), SelfSpeculative(2, 3), EarlyExit(0.3), EarlyExit(0.3, kv="copy"), DoLa((2, 4))],
    ids=str,
)
def test_preempted_texts_are_the_same(folder, engine, mode):
    samplings = [replace(WARM, seed=i, structured_outputs=FORMS["json"]) for i in range(8)]
    given = [[i] * 20 for i in range(8)]
    wanted = engine.generate(given, samplings, mode)
    small = Engine.from_pretrained(
        folder, dtype="float32", device="cpu", block_size=8, kv_cache_memory=24 * 6 * 2 * 8 * 64 * 4
    )
    found = small.generate(given, samplings, mode)
    assert small.stats().num_preemptions > 0
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in wanted]


def test_the_text_ends_where_nothing_can_follow(engine):
    (output,) = engine.generate(
        "Once", SamplingParams(structured_outputs={"choice": ["abc"]}, max_new_tokens=50)
    )
    (found,) = output.outputs
    assert (found.text, found.finish_reason) == ("abc", "stop")
    assert len(found.token_ids) == 3, "no token is spent on saying that it ends"


def test_a_stream_adds_up_to_the_text(engine):
    sampling = replace(WARM, structured_outputs=FORMS["json"])
    pieces = list(engine.stream("Once", sampling))
    assert "".join(p.text for p in pieces) == engine.generate("Once", sampling)[0].outputs[0].text


def test_the_shipped_model_writes_json():
    demo = Engine.from_pretrained("demo", dtype="float32", device="cpu", kv_cache_memory=2**25)
    sampling = SamplingParams(max_new_tokens=80, structured_outputs={"json": SCHEMA})
    for mode in (Original(), Contrast(8, 4), SelfSpeculative(4, 3)):
        (output,) = demo.generate("The old house", sampling, mode)
        assert output.outputs[0].finish_reason == "stop"
        assert fits_schema(json.loads(output.outputs[0].text))
    assert demo.stats().num_accepted_tokens > 0


def test_what_other_parameters_forbid_ends_the_request_alone(engine):
    stuck = SamplingParams(
        structured_outputs={"choice": ["abc"]}, bad_words=("b",), max_new_tokens=9
    )
    bad, good = engine.generate(["Once", "Once"], [stuck, SamplingParams(max_new_tokens=9)])
    assert bad.outputs[0].finish_reason == "error"
    assert "structured_outputs and its other parameters together leave no token" in bad.error
    assert good.outputs[0].finish_reason == "length"


def test_the_state_of_a_text_survives_looking_at_drafts():
    tokenizer = byte_tokenizer()
    grammar = GrammarCompiler(tokenizer, 257, [256]).grammar(StructuredOutputs(regex="abc|abd"))
    ids = tokenizer("abc")["input_ids"]
    before = grammar.allowed()
    assert grammar.allowed(ids[:2]) not in (before, None)
    assert grammar.allowed(ids) is None, "nothing follows the end"
    assert grammar.allowed(ids[1:]) is None, "these drafts break the grammar"
    assert grammar.allowed() == before
    assert not grammar.is_complete


@pytest.mark.parametrize(
    "value, message",
    [
        ({}, "nothing given; give one of json, json_object, regex, choice, grammar"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice given"),
        ({"regexp": "a"}, "no field 'regexp'"),
        ({"choice": []}, "choice has 0 items"),
        ({"choice": ["a", ""]}, "choice=''"),
        ({"choice": "abc"}, "choice='abc'"),
        ({"json": "{"}, "json: the text is not JSON"),
        ({"json": "[1]"}, "json=.*a JSON schema that is an object"),
        ({"json": {"a": {1}}}, "cannot be written as JSON"),
        ({"regex": 5}, "regex=5: must be a string"),
        ("nonsense", "structured_outputs: the text is not JSON"),
        (5, "structured_outputs=5"),
    ],
)
def test_a_wrong_form_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(structured_outputs=value)


@pytest.mark.parametrize(
    "value, message",
    [
        ({"regex": "(a"}, "regex: .*unclosed group"),
        ({"json": {"type": "nonsense"}}, "json: .*nonsense"),
        ({"grammar": "start: other"}, 'grammar: .*unknown name: "other"'),
        ({"grammar": 'root ::= "a'}, "grammar: Failed to convert"),
    ],
)
def test_a_form_that_cannot_be_compiled_is_refused_before_work(engine, value, message):
    steps = engine.stats().num_steps
    with pytest.raises(ValueError, match=message):
        engine.generate("Once", SamplingParams(structured_outputs=value))
    assert engine.stats().num_steps == steps


def test_a_token_that_is_forced_is_refused(engine):
    sampling = SamplingParams(structured_outputs={"regex": "a"}, forced_eos_token_id=256)
    with pytest.raises(ValueError, match="structured_outputs: forced_eos_token_id=256"):
        engine.generate("Once", sampling)


@pytest.mark.parametrize("other", [{"num_beams": 2}, {"ignore_eos": True}])
def test_what_contradicts_a_form_is_refused(other):
    with pytest.raises(ValueError, match=f"{next(iter(other))}=.* with structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"}, **other)


def test_a_model_without_a_tokenizer_says_so():
    with pytest.raises(ValueError, match="the checkpoint has no tokenizer"):
        GrammarCompiler(None, 257, [256]).grammar(StructuredOutputs(regex="a"))


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ValueError, match="needs the package 'llguidance': pip install"):
        GrammarCompiler(byte_tokenizer(), 257, [256]).grammar(StructuredOutputs(regex="a"))


def test_grammars_are_compiled_outside_the_engines_thread(folder, monkeypatch):
    threads = []
    compile_one = GrammarCompiler._llguidance_tokens

    def watched(self):
        threads.append(threading.current_thread().name)
        return compile_one(self)

    monkeypatch.setattr(GrammarCompiler, "_llguidance_tokens", watched)

    async def run():
        async with AsyncEngine.from_pretrained(folder, dtype="float32", device="cpu") as front:
            sampling = replace(WARM, structured_outputs=FORMS["regex"])
            return await asyncio.gather(*[front.generate("Once", sampling) for _ in range(3)])

    outputs = asyncio.run(run())
    assert all(has_form("regex", output.outputs[0].text) for output in outputs)
    assert threads and "engine" not in threads
