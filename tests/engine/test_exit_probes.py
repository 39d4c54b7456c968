"""Rows leave where a probe beside the model trusts their exit."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from multiexit_engine import EarlyExit, Engine, Exit, Original, SamplingParams
from multiexit_engine.checkpoint.probes import FILE_NAME
from tests.engine.test_early_exit import prompts, tokens
from tests.tiny import save_gpt2, save_probes

MODE = EarlyExit(0.5, "probe")


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A model whose probes pass about half of the rows."""
    return save_probes(save_gpt2(tmp_path_factory.mktemp("probed")), (2, 4))


@pytest.fixture(scope="module")
def engine(probed):
    return Engine.from_pretrained(probed, dtype="float32")


def chance(folder, layer, state):
    """Of float64 states before the final norm."""
    model = {name: part.double() for name, part in load_file(folder / "model.safetensors").items()}
    probe = {name: part.double() for name, part in load_file(folder / FILE_NAME).items()}
    scale, shift = (model[f"transformer.ln_f.{name}"] for name in ("weight", "bias"))
    normed = torch.nn.functional.layer_norm(state.double(), (64,), scale, shift, 1e-5)
    inner = torch.relu(normed @ probe[f"{layer}.up"].T + probe[f"{layer}.up_bias"])
    return torch.sigmoid(inner @ probe[f"{layer}.down"].T + probe[f"{layer}.down_bias"])[:, 0]


def test_confidences_are_the_probes_chances(probed, engine):
    sampling = SamplingParams(max_new_tokens=40, ignore_eos=True)
    (output,) = engine.generate([3, 1, 4], sampling, MODE)
    (completion,) = output.outputs
    text = [3, 1, 4, *completion.token_ids]
    found = engine.exit_readings(text, MODE)
    for place, layer in enumerate((2, 4)):
        states = _states(engine, text, layer)
        wanted = chance(probed, layer, states).float()
        torch.testing.assert_close(found.values[:, place], wanted, atol=1e-5, rtol=1e-4)
    passes = found.values[2:-1] >= 0.5
    layers = [2 if low else 4 if high else 6 for low, high in passes.tolist()]
    assert completion.exit_layers == layers and set(layers) == {2, 4, 6}
    values = [
        float(v[0] if layer == 2 else v[1])
        for v, layer in zip(found.values[2:-1], layers, strict=True)
    ]
    assert completion.confidences == pytest.approx(values, abs=1e-5)
    best = [engine.logits(text, Exit(layer)).argmax(-1).tolist() for layer in (2, 4)]
    best.append(engine.logits(text).argmax(-1).tolist())
    wanted_tokens = [best[layer // 2 - 1][2 + i] for i, layer in enumerate(layers)]
    assert completion.token_ids == wanted_tokens


def _states(engine, text, layer):
    """[tokens, hidden]: outputs of a layer, before the final norm."""
    model, caught = engine._core.runner.model, []
    norm = model.heads._final_norm
    model.heads._final_norm = lambda tap: caught.append(tap) or norm(tap)
    try:
        engine.logits(text, Exit(layer))
    finally:
        model.heads._final_norm = norm
    return caught[-1]


def test_thresholds_that_none_or_all_pass_give_the_tokens_of_one_head(engine):
    sampling = SamplingParams(max_new_tokens=30)
    for threshold, same in ((1.1, Original()), (0.0, Exit(2))):
        found = engine.generate(prompts(6), sampling, EarlyExit(threshold, "probe"))
        assert tokens(found) == tokens(engine.generate(prompts(6), sampling, same))


def test_rows_that_stay_read_no_head(engine, monkeypatch):
    heads, read = engine._core.runner.model.heads, []
    operands = type(heads).operands

    def counted(self, head, tap):
        read.append((head.layer, len(tap)))
        return operands(self, head, tap)

    monkeypatch.setattr(type(heads), "operands", counted)
    sampling = SamplingParams(max_new_tokens=30, ignore_eos=True)
    (output,) = engine.generate([3, 1, 4], sampling, MODE)
    assert read == [(layer, 1) for layer in output.outputs[0].exit_layers]


def test_scores_follow_the_probes(engine):
    text = prompts(1, 60)[0] + list(range(40))
    scored = engine.score(text, MODE)[0].token_logprobs[1:]
    values = engine.exit_readings(text, MODE).values[:-1]
    layers = [2 if low >= 0.5 else 4 if high >= 0.5 else 6 for low, high in values.tolist()]
    rows = {k: engine.logits(text, Exit(k)).log_softmax(-1) for k in (2, 4)}
    rows[6] = engine.logits(text).log_softmax(-1)
    wanted = [float(rows[k][i, text[i + 1]]) for i, k in enumerate(layers)]
    assert scored == pytest.approx(wanted, abs=1e-4)


def test_a_model_without_probes_says_how_to_make_them(tmp_path):
    other = Engine.from_pretrained(save_gpt2(tmp_path), dtype="float32")
    message = "measure='probe' at layer 2: .*exit_probes.safetensors is not there; run `multiexit"
    with pytest.raises(ValueError, match=message):
        other.generate([1, 2], decoding=MODE)


def test_probes_of_other_weights_are_refused(probed, tmp_path):
    other = save_gpt2(tmp_path, seed=1)
    shutil.copy(probed / FILE_NAME, other)
    with pytest.raises(ValueError, match="made for a model with other weights; run"):
        Engine.from_pretrained(other).generate([1, 2], decoding=MODE)


def test_an_exit_without_a_probe_is_refused(probed, tmp_path):
    folder = shutil.copytree(probed, tmp_path / "model")
    save_probes(folder, (4,))
    other = Engine.from_pretrained(folder, dtype="float32")
    with pytest.raises(ValueError, match=r"at layer 2: .* has probes at layers \[4\]; run"):
        other.generate([1, 2], decoding=MODE)
    assert other.generate([1, 2], decoding=replace(MODE, layers=(4,)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"no"), "is damaged or incomplete"),
        (lambda path: _without(path, "2.down"), "does not hold whole probes"),
        (lambda path: _without(path, "2.down", torch.zeros(1, 7)), "holds misshapen probes"),
    ],
    ids=["not a file", "a part lacks", "misshapen"],
)
def test_a_damaged_file_is_refused(probed, tmp_path, damage, message):
    folder = shutil.copytree(probed, tmp_path / "model")
    damage(folder / FILE_NAME)
    with pytest.raises(ValueError, match=f"{message}.*train probes` again"):
        Engine.from_pretrained(folder).generate([1, 2], decoding=MODE)


def _without(path, name, instead=None):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    parts = load_file(path)
    parts.pop(name)
    if instead is not None:
        parts[name] = instead
    save_file(parts, path, metadata)


def test_a_shortlist_is_refused():
    with pytest.raises(ValueError, match="None with measure='probe', which reads no distribution"):
        EarlyExit(0.5, "probe", shortlist=100)


def test_the_demo_model_has_probes():
    demo = Engine.from_pretrained("demo")
    (output,) = demo.generate(
        "The old house", SamplingParams(max_new_tokens=30), EarlyExit(0.75, "probe")
    )
    assert len(set(output.outputs[0].exit_layers)) > 1
