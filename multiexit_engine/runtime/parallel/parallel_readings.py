"""What the tested layers of a mode measure at every position of an answer, whoever would have left.

Knows nothing of thresholds or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multiexit_engine.decoding.parallel import tested_layers
from multiexit_engine.models.elmer import ElmerModel
from multiexit_engine.ops import PackedSources, PackedTexts, head_statistics
from multiexit_engine.parallel_mode import Parallel
from multiexit_engine.runtime.early_exit.exit_readings import ExitReadings
from multiexit_engine.transfer import to_device


def read_parallel_exits(
    model: ElmerModel, source: Sequence[int], mode: Parallel, length: int
) -> ExitReadings:
    """Run all layers on all positions of one answer, and measure after each tested layer.

    Args:
        model: whose answer it is.
        source: token ids, at least one.
        mode: "confidence", whose measure, ``layers`` and ``gate_bias`` count.
        length: positions.
    """
    last = model.config.num_layers
    exits = tested_layers(mode, last)
    start = model.start(length)
    encoded = model.encode(to_device(source, start.embedded.device), [len(source)])
    keys_values = model.cross_span(encoded, range(last))
    texts, hidden = PackedTexts([length], [length], None), start.attended
    values, tokens, states = [], [], []
    for layer in range(last):
        sources = PackedSources(keys_values[:, layer : layer + 1], [len(source)], [length])
        span = range(layer, layer + 1)
        hidden = model.run(hidden, span, texts, sources, is_attended=layer == 0)
        if layer + 1 not in (*exits, last):
            continue
        normed, weight, bias = model.predict(hidden)
        found = head_statistics(normed, weight, bias)
        tokens.append(found.tokens)
        if layer + 1 == last:
            break
        if not mode.gate_bias and bias is not None:
            found = head_statistics(normed, weight)
        is_entropy = mode.measure == "entropy"
        values.append(found.entropy if is_entropy else found.log_probs.exp())
        states.append(normed)
    return ExitReadings(
        exits, torch.stack(values, 1), torch.stack(tokens, 1), torch.stack(states, 1)
    )
