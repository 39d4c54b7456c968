"""Run by a Python that has vLLM: the program of docs/doors/vllm.md, then requests of our own.

Arguments: the page's program, a file of requests, a file for the answers.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Answer all requests in one batch, then try those that are to be refused one by one."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    program, source, target = sys.argv[1:]
    page = runpy.run_path(program)
    wanted = json.loads(Path(source).read_text())
    llm = page["load"]()
    shown = page["answer"](llm)
    outputs = llm.generate(
        [{"prompt_token_ids": one["prompt"]} for one in wanted["good"]],
        [SamplingParams(temperature=0, ignore_eos=True, **one["params"]) for one in wanted["good"]],
    )
    refused = []
    for params in wanted["bad"]:
        try:
            llm.generate([{"prompt_token_ids": [5]}], SamplingParams(**params))
            refused.append("")
        except VLLMValidationError as error:
            refused.append(str(error))
    again = llm.generate([{"prompt_token_ids": [5, 6]}], SamplingParams(temperature=0))
    answers = {
        "page": [list(output.outputs[0].token_ids) for output in shown],
        "good": [list(output.outputs[0].token_ids) for output in outputs],
        "bad": refused,
        "after": len(again[0].outputs[0].token_ids),
    }
    Path(target).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
