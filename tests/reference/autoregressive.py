"""Greedy decoding of a causal model: a prefill, then one token a forward."""

from __future__ import annotations

from .answer import Answer, Conventions, read_row
from .network import Network


def decode(
    network: Network,
    prompt_ids: list[int],
    size: int,
    *,
    conventions: Conventions,
    limit: int | None = None,
) -> Answer:
    ids = list(prompt_ids)
    store = network.store()
    computed = forwards = 0
    while forwards < (size if limit is None else limit):
        rows = network.forward(ids, computed, len(ids), store, lambda query, key: key <= query)
        computed = len(ids)
        forwards += 1
        ids.append(read_row(rows[computed - 1], conventions).token)
        if ids[-1] in conventions.stop_ids:
            break
    return Answer(ids[len(prompt_ids) :], forwards, list(range(forwards)))
