"""Which replica of a Ray Serve application gets a request: that which saw its prefix before.

Knows request bodies and Ray Serve's router interface; nothing of engines.
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

GENERATING_PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})
# A token of English is some four characters long.
CHARACTERS_PER_TOKEN = 4


def prefix_key(path: str, body: bytes, num_tokens: int) -> str | None:
    """What requests with the same beginning of a prompt have in common.

    Args:
        path: of the HTTP request.
        body: its JSON; one that is wrong is left for the server to refuse.
        num_tokens: how much of the prompt counts: as many token ids, or four times as many
            characters.

    Returns:
        A digest, or None for a request without a prompt.
    """
    if path not in GENERATING_PATHS:
        return None
    try:
        given = json.loads(body)
        prompt = given["messages"] if "messages" in given else given["prompt"]
        beginning = _beginning(prompt, num_tokens)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    return hashlib.sha256(beginning.encode("utf-8", "replace")).hexdigest()


def _beginning(prompt: Any, num_tokens: int) -> str:
    """Of several prompts in one request the first one's."""
    num_characters = num_tokens * CHARACTERS_PER_TOKEN
    match prompt:
        case str():
            return prompt[:num_characters]
        case [int(), *_]:
            return repr(prompt[:num_tokens])
        case [dict(), *_]:
            return "\n".join(f"{m['role']}: {m['content']}" for m in prompt)[:num_characters]
        case _:
            return _beginning(prompt[0], num_tokens)


def by_preference(key: str, names: list[str]) -> list[str]:
    """Some replicas in the order in which a key prefers them (rendezvous hashing).

    The order of the others stays when one comes or goes, so only the lost replica's keys move
    (Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996).
    """
    return sorted(names, key=lambda name: hashlib.sha256(f"{key}/{name}".encode()).digest())


class PrefixRouter(RequestRouter):
    """Sends requests with the same ``prefix`` argument to the same replica.

    A replica with ``max_ongoing_requests`` is passed over for the next in the key's order. Requests
    without a prefix go to the emptier of all replicas, those with a ``place`` to the replica that
    stands there in the order of names: so each of them can be asked in turn. Nothing is remembered,
    so several proxies agree without talking to each other.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the preferred first."""
        asked = {} if pending_request is None else pending_request.kwargs
        if (place := asked.get("place")) is not None:
            in_order = sorted(candidate_replicas, key=lambda one: one.replica_id.unique_id)
            return [[in_order[place % len(in_order)]]]
        key = asked.get("prefix")
        if key is None:
            return [random.sample(candidate_replicas, len(candidate_replicas))]
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[named[name]] for name in by_preference(key, list(named))]
