"""The mode of non-autoregressive decoding: all tokens of an answer at once, each with its exit.

Plain data. Values are checked here as far as they can be without a model; what a checkpoint allows
is checked by ``runtime.parallel_intake``. Knows nothing of tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from multiexit_engine.checks import is_finite, is_int, reject

Length: TypeAlias = int | float | tuple[int | float, ...] | None
EXITS = ("none", "soft", "confidence", "prescribed")


@dataclass(frozen=True, slots=True)
class Parallel:
    """Non-autoregressive decoding: one pass gives all tokens, each may leave at its own layer.

    For encoder-decoders whose decoder reads all positions at once (ELMER). The decoder's input is
    [BOS] and then [MASK] at every other place; position i gives token i. Greedy. Exact: an exited
    position keeps its state, from which the layers above make its keys and values.

    Attributes:
        exit: where positions leave. "none": after the last layer. "soft": likewise, but every
            layer's prediction is fed to the next one through ``concat_head``. "confidence": after
            the first tested layer whose own prediction is sure enough; the last layer takes the
            rest. "prescribed": after the layers given in ``layers``.
        measure: what "confidence" compares: "entropy" of the prediction, in nats, which must be at
            most ``threshold``; "max_prob", the largest probability, which must be at least that.
        threshold: of "confidence".
        layers: for "confidence" the 1-based layers that are tested, by default all; for
            "prescribed" the 1-based exit layer of every position.
        length: positions, the one of the ending token included. A whole number is taken as it is;
            a fraction times the tokens of the source, rounded up; several are computed beside each
            other, and the one whose tokens are most likely on average is kept. None:
            ``max_new_tokens``, or with "prescribed" as many as ``layers`` has.
        collapse_repeats: in the text, neighbouring words that are equal become one word; the
            tokens stay as they are.
        refine: further passes. Each keeps the tokens with the largest probability, whose states
            stay frozen, and computes the others again; their share falls evenly to zero.
        gate_bias: whether what "confidence" tests includes the bias that the checkpoint may add to
            logits; tokens always do.
        gate_chance: the least chance of being sure enough, as probes beside the model give it, at
            which "confidence" tests a position at all; others stay. Above 0, below 1; None tests
            all. ``multiexit train gates`` makes the probes.
        gate_gain: with ``gate_chance``, what the tests of an answer at a layer must be expected to
            spare: the sum over the positions to be tested of chance times layers above. Where it is
            less, none of them is tested there. None: vocab_size / hidden_size, about what
            reading the head costs beside the layers; 0 tests for any gain.

    Source: Li et al. 2022, arXiv:2210.13304, and ELMER's code; ``refine`` follows the schedule of
        Mask-Predict, Ghazvininejad et al. 2019, arXiv:1904.09324, section 4.
    """

    exit: Literal["none", "soft", "confidence", "prescribed"] = "none"
    measure: Literal["entropy", "max_prob"] = "entropy"
    threshold: float | None = None
    layers: tuple[int, ...] | None = None
    length: Length = None
    collapse_repeats: bool = False
    refine: int = 0
    gate_bias: bool = True
    gate_chance: float | None = None
    gate_gain: float | None = None

    def __post_init__(self) -> None:
        self._normalise()
        if self.exit not in EXITS:
            raise reject("Parallel.exit", self.exit, "one of " + ", ".join(map(repr, EXITS)))
        if self.measure not in ("entropy", "max_prob"):
            raise reject("Parallel.measure", self.measure, "'entropy' or 'max_prob'")
        self._check_threshold()
        self._check_layers()
        self._check_length()
        if not isinstance(self.collapse_repeats, bool):
            raise reject("Parallel.collapse_repeats", self.collapse_repeats, "True or False")
        if not isinstance(self.gate_bias, bool):
            raise reject("Parallel.gate_bias", self.gate_bias, "True or False")
        if not self.gate_bias and self.exit != "confidence":
            raise reject("Parallel.gate_bias", False, "True unless exit='confidence'")
        self._check_chance()
        self._check_gain()
        if not is_int(self.refine) or self.refine < 0:
            raise reject("Parallel.refine", self.refine, "a number of passes, 0 or more")
        if self.refine and self.exit == "soft":
            raise reject("Parallel.refine", self.refine, "0 with 'soft', which freezes nothing")

    def _normalise(self) -> None:
        """Accept any list where a tuple is stored, and a single item in its place."""
        layers: Any = self.layers
        if isinstance(layers, list) or is_int(layers):
            layers = tuple(layers) if isinstance(layers, list) else (layers,)
            object.__setattr__(self, "layers", layers)
        length: Any = self.length
        if isinstance(length, list | tuple):
            single = len(length) == 1
            object.__setattr__(self, "length", length[0] if single else tuple(length))

    @property
    def lengths(self) -> tuple[int | float, ...]:
        """What ``length`` names, none for None."""
        if self.length is None:
            return ()
        return self.length if isinstance(self.length, tuple) else (self.length,)

    def target_lens(self, num_source: int, cap: int) -> tuple[int, ...]:
        """Positions of each candidate, ascending and different.

        Args:
            num_source: tokens of the source.
            cap: for ``length=None``.
        """
        if self.length is None:
            return (len(self.layers) if self.exit == "prescribed" and self.layers else cap,)
        # a ratio such as 1.1 times 10 must not become 12 by the last bit of a float
        found = {
            n if isinstance(n, int) else max(1, math.ceil(n * num_source - 1e-9))
            for n in self.lengths
        }
        return tuple(sorted(found))

    def _check_threshold(self) -> None:
        if self.exit != "confidence":
            if self.threshold is not None:
                raise reject("Parallel.threshold", self.threshold, "None unless exit='confidence'")
        elif not is_finite(self.threshold):
            raise reject("Parallel.threshold", self.threshold, "a number for exit='confidence'")

    def _check_chance(self) -> None:
        chance = self.gate_chance
        if chance is None:
            return
        if self.exit != "confidence":
            raise reject("Parallel.gate_chance", chance, "None unless exit='confidence'")
        if not is_finite(chance) or not 0 < chance < 1:
            raise reject("Parallel.gate_chance", chance, "a number above 0 and below 1, or None")

    def _check_gain(self) -> None:
        gain = self.gate_gain
        if gain is None:
            return
        if self.gate_chance is None:
            raise reject("Parallel.gate_gain", gain, "None without gate_chance")
        if not is_finite(gain) or gain < 0:
            raise reject("Parallel.gate_gain", gain, "a number of layers, 0 or more, or None")

    def _check_layers(self) -> None:
        layers = self.layers
        if layers is None:
            if self.exit == "prescribed":
                raise reject("Parallel.layers", None, "a layer for each position, 1 or more")
            return
        if self.exit in ("none", "soft"):
            raise reject("Parallel.layers", layers, f"None with exit={self.exit!r}")
        if not isinstance(layers, tuple) or not layers or not all(map(_is_count, layers)):
            raise reject("Parallel.layers", layers, "layer numbers, 1 or more")
        if self.exit == "confidence" and len(set(layers)) < len(layers):
            raise reject("Parallel.layers", layers, "different layers")

    def _check_length(self) -> None:
        if self.length == ():
            raise reject("Parallel.length", self.length, "at least one length, or None")
        for value in self.lengths:
            is_ratio = isinstance(value, float) and math.isfinite(value) and value > 0
            if not is_ratio and not _is_count(value):
                allowed = "1 or more positions, a fraction of the source (1.0), or several of them"
                raise reject("Parallel.length", value, allowed)
        if self.exit != "prescribed" or self.layers is None or self.length is None:
            return
        if self.length != len(self.layers):
            allowed = f"None or {len(self.layers)}, the number of the prescribed layers"
            raise reject("Parallel.length", self.length, allowed)


def _is_count(value: object) -> bool:
    return is_int(value) and value >= 1  # type: ignore[operator]
