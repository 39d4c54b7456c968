"""What the project wants to reach beside each peer, and whether a run reached it.

A bar beside a peer has a physical limit too: the engine cannot be faster than its weights can be
read. Where that limit lies below the bar, no program can meet it on that machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Rates = Mapping[tuple[str, str], float]
SAME_WEIGHTS_PEERS = ("CTranslate2", "vLLM", "llama.cpp")
WEIGHTS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class Bar:
    """One promise: ``reached`` must be at least (or at most) ``wanted``.

    Attributes:
        reachable: the most that reading the weights at the measured speed allows, where known.
    """

    what: str
    wanted: float
    reached: float
    reachable: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the run reached it."""
        return self.reached <= self.wanted if self.at_most else self.reached >= self.wanted

    def cells(self) -> list[str]:
        """For a table."""
        sign = "<=" if self.at_most else ">="
        limit = "" if self.reachable is None else f"{self.reachable:.2f}"
        verdict = "met" if self.met else "not met"
        if not self.met and self.reachable is not None and self.reachable < self.wanted:
            verdict = "out of reach"
        return [self.what, f"{sign} {self.wanted:g}", f"{self.reached:.2f}", limit, verdict]

    def as_row(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self) | {"met": self.met}


BAR_COLUMNS = ["bar", "wanted", "reached", "at most, by bytes", ""]


def latency_bars(rates: Rates, floors: Rates, shares: Mapping[str, float]) -> list[Bar]:
    """Bars of one request; those whose ways did not run are left out.

    Args:
        rates: tokens per second by (way, weights).
        floors: tokens per second that the bytes allow, by (engine way, weights).
        shares: share of the measured read bandwidth that a decode step reaches, by weights.
    """
    bars = []

    def beside(mode: str, weights: str, peer: str, peer_weights: str, wanted: float) -> None:
        own, other = (f"engine {mode}", weights), (peer, peer_weights)
        if own in rates and other in rates:
            what = f"{mode} {weights} / {peer} {peer_weights}"
            limit = floors[own] / rates[other]
            bars.append(Bar(what, wanted, rates[own] / rates[other], limit))

    beside("Contrast", "float32", "IBM's way", "float32", 10)
    for weights in ("float32", "bfloat16"):
        if weights in shares:
            bars.append(Bar(f"share of read bandwidth, {weights}", 0.75, shares[weights], 1))
    beside("Original", "float32", "transformers", "float32", 3)
    known = [weights for weights in WEIGHTS if ("transformers", weights) in rates]
    if known:
        better = max(known, key=lambda weights: rates["transformers", weights])
        beside("Original", "bfloat16", "transformers", better, 5)
    for weights in WEIGHTS:
        for peer in SAME_WEIGHTS_PEERS:
            beside("Original", weights, peer, weights, 1.2)
    for weights in WEIGHTS:
        pair = [rates.get((f"engine {mode}", weights)) for mode in ("Original", "Contrast")]
        if pair[0] and pair[1]:
            what = f"time of Contrast / Original, {weights}"
            bars.append(Bar(what, 1.05, pair[0] / pair[1], at_most=True))
    return bars


def throughput_bars(rates: Rates, requests: int) -> list[Bar]:
    """Bars of many requests, from tokens per second by (way, weights)."""
    bars = []
    together = f"engine Original, {requests} together"
    for weights in WEIGHTS:
        if (together, weights) in rates and ("vLLM", weights) in rates:
            ratio = rates[together, weights] / rates["vLLM", weights]
            bars.append(Bar(f"{requests} requests {weights} / vLLM", 1, ratio))
        eight, one = (rates.get((f"engine Original, {n}", weights)) for n in ("8 together", "one"))
        if eight and one:
            bars.append(Bar(f"8 together / one, {weights}", 5, eight / one))
    return bars
