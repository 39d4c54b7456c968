"""Makes dola/golden.json with transformers 4.55, the last release with DoLa in its core.

Run from the repository's root where transformers 4.55 is installed:
``python -m tests.golden.make_dola_golden``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation import utils

from tests.golden.dola_recipe import CONFIGS, VOCAB, save_checkpoint

LAYERS = ["low", "high", [2], [0, 1, 2, 3, 4], [4, 1, 0]]
NUM_TOKENS = 24
chosen_layers: list[int] = []
select_contrast = utils._dola_select_contrast


def recording_select_contrast(layers, premature, final):
    """The original, noting which layer it took: the one whose logits give its result."""
    result = select_contrast(layers, premature, final)
    alone = {layer: select_contrast([layer], premature, final) for layer in layers}
    chosen_layers.append(next(k for k in layers if torch.equal(alone[k], result)))
    return result


def case(model, checkpoint: str, layers: str | list[int], penalty: float, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(1, VOCAB, (1, 5 + seed % 4), generator=generator)
    chosen_layers.clear()
    result = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        dola_layers=layers,
        repetition_penalty=penalty,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        trust_remote_code=True,
    )
    first = result.scores[0][0]
    return {
        "checkpoint": checkpoint,
        "dola_layers": layers,
        "repetition_penalty": penalty,
        "prompt": prompt[0].tolist(),
        "token_ids": result.sequences[0, prompt.shape[1] :].tolist(),
        "premature_layers": list(chosen_layers),
        "first_scores": {int(v): round(float(first[v]), 5) for v in first.isfinite().nonzero()},
    }


def main() -> None:
    assert transformers.__version__.startswith("4.55."), transformers.__version__
    utils._dola_select_contrast = recording_select_contrast
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in CONFIGS:
            path = save_checkpoint(checkpoint, Path(folder) / checkpoint)
            model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()
            cases += [
                case(model, checkpoint, layers, penalty, len(cases) + i)
                for layers in LAYERS
                for i, penalty in enumerate((1.0, 1.2))
            ]
    lines = ",\n".join(json.dumps(found) for found in cases)
    made = f'{{"transformers": "{transformers.__version__}", "cases": [\n{lines}\n]}}\n'
    (Path(__file__).parent / "dola" / "golden.json").write_text(made)


if __name__ == "__main__":
    main()
