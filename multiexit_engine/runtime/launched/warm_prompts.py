"""Which prompts an engine reads beforehand: they compile what runs outside of captures.

Plain data. Knows nothing of steps or of kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from multiexit_engine.params import DecodingMode, Parallel, SamplingParams

# lengths that kernels tell apart
LENGTHS = (1, 12, 24, 48, 96, 400)


def warm_prompts(
    mode: DecodingMode, sampling: Sequence[SamplingParams], longest: int
) -> Iterator[tuple[list[int], SamplingParams]]:
    """Prompts, and what is asked for: one token each. None where prompts are captured, too.

    Args:
        mode: of the requests.
        sampling: what requests ask for besides greedy tokens.
        longest: prompt that the model reads.
    """
    if isinstance(mode, Parallel):
        return
    for params in [SamplingParams(), *sampling]:
        own = replace(params, max_new_tokens=1, min_new_tokens=0, ignore_eos=True)
        for number, length in enumerate(sorted({min(each, longest) for each in LENGTHS})):
            # no prompt begins like another, whose blocks would be taken for it
            yield [number] * length, own
