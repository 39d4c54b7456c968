"""Run by a Python that has vLLM: one batch of requests on one checkpoint.

Arguments: a file of what is wanted, a file for the token ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Answer all requests together."""
    from vllm import LLM, SamplingParams

    source, target = sys.argv[1:]
    wanted = json.loads(Path(source).read_text())
    llm = LLM(wanted["model"], dtype="float32", tokenizer=wanted["tokenizer"], **wanted["options"])
    outputs = llm.generate(
        [{"prompt_token_ids": one["prompt"]} for one in wanted["good"]],
        [SamplingParams(temperature=0, ignore_eos=True, **one["params"]) for one in wanted["good"]],
    )
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    Path(target).write_text(json.dumps(ids))


if __name__ == "__main__":  # vLLM starts processes of its own
    main()
