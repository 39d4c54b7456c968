import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from multiexit_engine.train.elmer import read_elmer_network, train_elmer
from multiexit_engine.train.elmer_config import ElmerProgress, ElmerTrainingConfig
from tests.train.tiny_elmer import tiny_elmer_training, write_verses


class Interruption(Exception):
    """Stands for whatever ends a run early."""


def losses_of(data: Path, output: Path, **changes: object) -> list[float]:
    """The loss of every step."""
    losses: list[float] = []
    train_elmer(
        tiny_elmer_training(data, output, **changes), lambda state: losses.append(state.loss)
    )
    return losses


@pytest.fixture(autouse=True)
def every_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiexit_engine.train.elmer_loop.LOG_EVERY_STEPS", 1)


def test_a_resumed_run_gives_the_losses_and_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    data = write_verses(tmp_path / "verses.tsv")

    def interrupt(state: ElmerProgress) -> None:
        if state.step == 5:
            raise Interruption

    whole_losses = losses_of(data, tmp_path / "whole")
    with pytest.raises(Interruption):
        train_elmer(tiny_elmer_training(data, tmp_path / "halves"), interrupt)
    # the last saved state is that of step 3, still in pre-training
    assert losses_of(data, tmp_path / "halves", resume=True) == whole_losses[3:]
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    halves = load_file(tmp_path / "halves" / "model.safetensors")
    torch.testing.assert_close(halves, whole, rtol=0, atol=0)


def test_both_parts_and_both_objectives_take_their_turns(tmp_path: Path) -> None:
    data = write_verses(tmp_path / "verses.tsv")
    parts: list[str] = []
    train_elmer(
        tiny_elmer_training(data, tmp_path / "model", pretraining_steps=2, finetuning_steps=4),
        lambda state: parts.append(state.part),
    )
    assert parts == ["pre-training"] * 2 + ["hard", "soft"] * 2


def test_a_run_without_data_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data: no file"):
        ElmerTrainingConfig(data=(), output=tmp_path)


def test_training_more_than_halves_the_loss(tmp_path: Path) -> None:
    data = write_verses(tmp_path / "verses.tsv")
    losses = losses_of(data, tmp_path / "model", pretraining_steps=0, finetuning_steps=60)
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


def test_the_folder_opens_as_a_bart_with_elmers_extra_weight(tmp_path: Path) -> None:
    data = write_verses(tmp_path / "verses.tsv")
    train_elmer(tiny_elmer_training(data, tmp_path / "model"))
    bart = BartForConditionalGeneration(BartConfig.from_pretrained(tmp_path / "model"))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    missing, unexpected = bart.load_state_dict(
        {name: tensor.float() for name, tensor in weights.items()}, strict=False
    )
    assert unexpected == ["concat_head.weight"]
    # tied to the one table
    assert set(missing) <= {
        "lm_head.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
    }
    network = read_elmer_network(tmp_path / "model")
    ids = torch.tensor([[0, 9, 12, 7, 2]])
    with torch.no_grad():
        ours = network.encode(ids, ids >= 0)
        theirs = bart.eval().model.encoder(ids).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_tokenizer_of_the_folder_opens_in_transformers(tmp_path: Path) -> None:
    data = write_verses(tmp_path / "verses.tsv")
    train_elmer(tiny_elmer_training(data, tmp_path / "model", finetuning_steps=0))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    ids = tokenizer("thou hath")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "thou hath"
    assert tokenizer.mask_token_id == len(tokenizer) - 1


def test_the_report_stands_beside_the_model(tmp_path: Path) -> None:
    data = write_verses(tmp_path / "verses.tsv")
    report = train_elmer(tiny_elmer_training(data, tmp_path / "model"))
    content = json.loads((tmp_path / "model" / "training_report.json").read_text())
    assert content["modes"]["soft"]["bleu"] == report.modes["soft"].bleu
    assert (report.training_pairs, report.validation_pairs) == (59, 1)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_tokens": 60}, "max_tokens"),
        ({"literal_count": 0}, "literal_count"),
        ({"num_heads": 3}, "num_heads"),
        ({"label_share": 1.5}, "label_share"),
        ({"length_slack": -0.1}, "length_slack"),
        ({"batch_tokens": 40}, "batch_tokens"),
    ],
)
def test_a_contradictory_config_names_the_field(
    tmp_path: Path, changes: dict[str, object], field: str
) -> None:
    with pytest.raises(ValueError, match=field):
        tiny_elmer_training(tmp_path, tmp_path, **changes)


def test_pairs_that_are_all_too_long_are_refused(tmp_path: Path) -> None:
    data = write_verses(tmp_path / "verses.tsv")
    with pytest.raises(ValueError, match="raise max_tokens"):
        train_elmer(tiny_elmer_training(data, tmp_path / "model", max_tokens=2))
