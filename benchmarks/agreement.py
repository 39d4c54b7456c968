"""Whether two ways gave the same tokens, and if not, whether rounding explains it.

Ways that compute one model in float32 must agree on greedy tokens except where the two best tokens
lie within rounding of each other. Without this check a table may compare different models.
"""

from __future__ import annotations

from collections.abc import Sequence

from ways import Way

from multiexit_engine import DecodingMode, Engine, SamplingParams

ROUNDING = 1e-3


def common_length(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are the same before the first that differs."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def describe(ours: Way, theirs: Way, gaps: dict[tuple[int, int], float]) -> str:
    """For a table: "equal", or how many requests part where, and how close the top two were."""
    lengths = [common_length(a, b) for a, b in zip(ours.tokens, theirs.tokens, strict=True)]
    parted = [
        (request, length)
        for request, length in enumerate(lengths)
        if length < max(len(ours.tokens[request]), len(theirs.tokens[request]))
    ]
    if not parted:
        return "equal"
    known = [gaps[place] for place in parted if place in gaps]
    where = f"first {min(length for _, length in parted)} equal"
    if len(lengths) > 1:
        where = f"{len(lengths) - len(parted)} of {len(lengths)} equal"
    if not known:
        return where
    verdict = "rounding" if max(known) < ROUNDING else "DIFFERS"
    return f"{where}, then top two {max(known):.0e} apart: {verdict}"


def gaps_where_they_part(
    engine: Engine, mode: DecodingMode, prompts: list[list[int]], ours: Way, theirs: Way
) -> dict[tuple[int, int], float]:
    """Difference of the two best log-probabilities, by (request, place) of the first difference."""
    gaps = {}
    for request, (a, b) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
        place = common_length(a, b)
        if place == len(a):
            continue
        params = SamplingParams(max_new_tokens=1, logprobs=2, ignore_eos=True)
        output = engine.generate(prompts[request] + a[:place], params, mode)[0].outputs[0]
        assert output.logprobs is not None
        ranked = sorted((found.logprob for found in output.logprobs[0].values()), reverse=True)
        gaps[request, place] = ranked[0] - ranked[1]
    return gaps
