"""How the figures of decoding are counted, and what its table shows."""

from __future__ import annotations

from d3llm_ray.benchmark.profile import PHASES
from d3llm_ray.benchmark.report import Columns, between
from d3llm_ray.benchmark.rows import BenchmarkRow

COUNTING = {
    "tokens": "tokens before the first stop token, summed over all requests; with synthetic prompts or a scripted TPF "
    "stop tokens mean nothing and every answer fills its canvas",
    "forwards": "model forwards in which a request took part, prefill and refresh included, summed over all requests",
    "steps": "batched forwards, each of all active requests; ms, phases_ms, flops, bytes and roofline_ms are means "
    "over these",
    "tpf": "tokens / forwards",
    "tps": "tokens / seconds; seconds is the wall clock of one pass over all requests at most batch_size at a time, "
    "prefill included, device synchronised, median of the rounds after an untimed pass",
    "phases_ms": "from the untimed pass, with the device synchronised between the phases",
    "flops": "2 x body weights x computed positions + 2 x LM head weights x scored rows + 4 x layers x hidden size x "
    "window x keys, masked pairs included",
    "bytes": "weights once a forward, keys and values of every attended position once, logits written and read once",
    "roofline_percent": "100 x roofline_ms / ms; roofline_ms is max(flops / peak, bytes / bandwidth) of each forward",
    "overhead": "time of an engine step / time of the bare model (forward and LM head on the scored rows) run on the "
    "same windows right behind it; median, first and third quartile of all steps of a pass",
    "ratios": "of tokens/s: median, least and greatest over the rounds, each of two figures from the same round",
    "memory": "bytes; the engine's plan, and peak: of PyTorch's allocations on a GPU, otherwise of the whole process",
}


COLUMNS: Columns[BenchmarkRow] = (
    ("decoder", lambda row: row.label),
    ("batch", lambda row: str(row.batch_size)),
    ("canvas", lambda row: str(row.max_tokens)),
    ("tokens/s", lambda row: between(row.tps, row.tps_low, row.tps_high)),
    ("TPF", lambda row: f"{row.tpf:.2f}"),
    ("ms/forward", lambda row: f"{row.ms:.2f}"),
    *((f"{phase} ms", lambda row, phase=phase: f"{row.phases_ms[phase]:.2f}") for phase in PHASES),
    ("window", lambda row: f"{row.window:.0f}"),
    ("GFLOP", lambda row: f"{row.flops / 1e9:.4g}"),
    ("GB", lambda row: f"{row.bytes / 1e9:.4g}"),
    ("roofline", lambda row: f"{row.roofline_percent:.1f} %"),
)
