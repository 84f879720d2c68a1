"""Rows of a served model: what users see of it at one load, and the offline engine at the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from d3llm_ray.benchmark.exchange import Answered, Exchange, Passage
from d3llm_ray.benchmark.ratios import Ratio
from d3llm_ray.benchmark.report import Columns, between
from d3llm_ray.benchmark.rows import spread

QUANTILES = (0.5, 0.9, 0.99)
OFFLINE = "offline"

# How every figure is counted, in every report: a number without its rule cannot be compared.
COUNTING = {
    "N clients": "each asks again as soon as it is answered; the last requests of a pass find fewer neighbours",
    "R requests/s": "arrivals of a Poisson process; a request counts from when it was due",
    "offline, N at a time": "the engine in this process, as many requests in it at a time; token ids in and "
    "out, no tokenizer, no HTTP; as many threads as a replica has CPUs",
    "first_s": "seconds to the first text, of streams; quantiles over the answered requests of all rounds",
    "total_s": "seconds to the end of the answer; quantiles as above",
    "tps": "tokens of all answers, without stop tokens / seconds of the pass: median, least and greatest of the rounds",
    "user_tps": "tokens of an answer / its seconds; median over the answers",
    "tpf": "tokens of all answers / forwards that they were in",
    "good_share": "requests answered with first_s and total_s within the SLO / requests sent, errors included",
    "good_rate": "the same requests a second",
    "errors": "requests without an answer: HTTP status, timeout, connection (refused or lost) or broken (a stream "
    "without [DONE])",
    "client_cpu": "processor seconds of this process / seconds of the pass, greatest of the rounds: near 1 the client "
    "is what was measured",
    "identical": "answers with the text, finish reason, tokens and forwards of the offline engine's",
    "of_offline": "tps / the offline engine's with as many requests at a time, in the same round",
    "added_ms": "median of total_s - the offline engine's in the same round: what HTTP, Ray Serve and the client add",
    "floor_ms": "median round trip of GET /health, one at a time right before each round of a load: what any answer "
    "takes on its way, without an engine; with several models the router answers, without the way from it to a replica",
}


@dataclass(frozen=True)
class Slo:
    """What a user is content with, in seconds."""

    first_s: float
    total_s: float

    def holds(self, exchange: Exchange) -> bool:
        first = exchange.seconds if exchange.first_seconds is None else exchange.first_seconds
        return exchange.answer is not None and first <= self.first_s and exchange.seconds <= self.total_s


@dataclass(frozen=True)
class ServingRow:
    """Figures of one load; counting rules in `COUNTING`. None: there is nothing to measure or to compare with."""

    name: str
    kind: str  # "closed", "open" or "offline"
    load: float  # clients, or requests a second
    sent: int
    answered: int
    errors: Mapping[str, int]
    prompt_tokens: int
    tokens: int
    forwards: int
    tpf: float | None
    tps: float
    tps_low: float
    tps_high: float
    user_tps: float | None
    first_s: Mapping[str, float] | None
    total_s: Mapping[str, float] | None
    good_share: float
    good_rate: float
    client_cpu: float
    identical: int | None
    added_ms: tuple[float, float, float] | None  # median, least and greatest of the rounds
    floor_ms: tuple[float, float, float] | None  # the same of the rounds' medians
    seconds: tuple[float, ...]  # of the rounds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def serving_row(
    name: str,
    kind: str,
    load: float,
    rounds: Sequence[Passage],
    slo: Slo,
    expected: Mapping[int, Answered] | None = None,
    offline: Sequence[Passage] = (),
    floor: Sequence[float] = (),
) -> ServingRow:
    """The figures of a load's rounds. `expected`: answers by prompt; `offline`: the engine's rounds at the load.

    `floor`: for each round the median round trip of a request that is answered at once, in seconds.
    """
    exchanges = [exchange for passage in rounds for exchange in passage.exchanges]
    answered = [exchange for exchange in exchanges if exchange.answer is not None]
    answers = [exchange.answer for exchange in answered if exchange.answer is not None]
    tps, tps_low, tps_high = spread([passage.tps for passage in rounds])
    tokens, forwards = sum(a.tokens for a in answers), sum(a.forwards for a in answers)
    good, seconds = sum(map(slo.holds, exchanges)), sum(passage.seconds for passage in rounds)
    first = [exchange.first_seconds for exchange in answered if exchange.first_seconds is not None]
    speeds = [e.answer.tokens / e.seconds for e in answered if e.answer is not None]
    added = [1e3 * (_median(mine) - _median(engine)) for mine, engine in zip(rounds, offline, strict=False)]
    return ServingRow(
        name=name,
        kind=kind,
        load=load,
        sent=len(exchanges),
        answered=len(answered),
        errors=dict(Counter(exchange.status for exchange in exchanges if exchange.answer is None)),
        prompt_tokens=sum(a.prompt_tokens for a in answers),
        tokens=tokens,
        forwards=forwards,
        tpf=tokens / forwards if forwards else None,
        tps=tps,
        tps_low=tps_low,
        tps_high=tps_high,
        user_tps=float(np.median(speeds)) if speeds else None,
        first_s=_quantiles(first),
        total_s=_quantiles([exchange.seconds for exchange in answered]),
        good_share=good / len(exchanges) if exchanges else 0.0,
        good_rate=good / seconds,
        client_cpu=max(passage.client_seconds / passage.seconds for passage in rounds),
        identical=None if expected is None else sum(same_answer(e, expected[e.prompt]) for e in answered),
        added_ms=spread(added) if added and answered else None,
        floor_ms=spread([1e3 * seconds for seconds in floor]) if floor else None,
        seconds=tuple(passage.seconds for passage in rounds),
    )


def same_answer(exchange: Exchange, expected: Answered) -> bool:
    """Whether an answer is the one expected, in all that the server tells of it."""
    got = exchange.answer
    names = ("text", "finish_reason", "prompt_tokens", "tokens", "forwards")
    return got is not None and all(getattr(got, name) == getattr(expected, name) for name in names)


def same_tokens(exchange: Exchange, expected: Answered) -> bool:
    """Whether also each of the answer's tokens was revealed by the forward, and as the one, that was expected.

    Behind its end a canvas is not compared: offline it is filled up when the answer is complete.
    """
    if exchange.answer is None or not same_answer(exchange, expected):
        return False
    told, positions = exchange.answer.revealed, range(expected.tokens)
    return all(position in told and told[position] == expected.revealed.get(position) for position in positions)


def of_offline(served: Mapping[str, Sequence[Passage]], offline: Mapping[str, Sequence[Passage]]) -> Iterator[Ratio]:
    """Tokens a second over the offline engine's, for every load that both were measured at."""
    for name in served.keys() & offline.keys():
        pairs = zip(served[name], offline[name], strict=True)
        yield Ratio("of_offline", f"{name}: tokens/s / offline", *spread([mine.tps / its.tps for mine, its in pairs]))


def _median(passage: Passage) -> float:
    return float(np.median([exchange.seconds for exchange in passage.answered] or [0.0]))


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = np.quantile(values, QUANTILES).tolist()
    return {f"p{100 * quantile:g}": value for quantile, value in zip(QUANTILES, found, strict=True)}


def _shown(values: Mapping[str, float] | None) -> str:
    return "-" if values is None else " / ".join(f"{value:.3f}" for value in values.values())


def _errors(row: ServingRow) -> str:
    return ", ".join(f"{count} x {status}" for status, count in sorted(row.errors.items())) or "0"


COLUMNS: Columns[ServingRow] = (
    ("load", lambda row: row.name),
    ("sent", lambda row: str(row.sent)),
    ("errors", _errors),
    ("first text s, p50 / p90 / p99", lambda row: _shown(row.first_s)),
    ("total s, p50 / p90 / p99", lambda row: _shown(row.total_s)),
    ("added ms", lambda row: "-" if row.added_ms is None else between(*row.added_ms)),
    ("floor ms", lambda row: "-" if row.floor_ms is None else between(*row.floor_ms)),
    ("tokens/s", lambda row: between(row.tps, row.tps_low, row.tps_high)),
    ("tokens/s a user", lambda row: "-" if row.user_tps is None else f"{row.user_tps:.1f}"),
    ("TPF", lambda row: "-" if row.tpf is None else f"{row.tpf:.2f}"),
    ("within SLO", lambda row: f"{100 * row.good_share:.1f} %"),
    ("good/s", lambda row: f"{row.good_rate:.1f}"),
    ("identical", lambda row: "-" if row.identical is None else f"{row.identical} of {row.answered}"),
    ("client CPU", lambda row: f"{row.client_cpu:.2f}"),
)
