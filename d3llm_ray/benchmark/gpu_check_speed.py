"""Speed of the published shapes with each switch on and off, and of one distillation step."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache, partial

import torch

from d3llm_ray.benchmark.gpu_check_base import CheckPart, Figures, Target, Unavailable
from d3llm_ray.benchmark.gpu_check_switches import static_shapes, switched
from d3llm_ray.benchmark.machine import Machine, data_sheet, measure_machine
from d3llm_ray.benchmark.measure import decoding_row, engine_for, measure
from d3llm_ray.benchmark.plan import MEASURED, BenchmarkPlan
from d3llm_ray.benchmark.workload import prepare
from d3llm_ray.device import peak_memory
from d3llm_ray.models.attention import choose_attention
from d3llm_ray.progress import Progress

SHAPES = ("llada-8b", "dream-7b")
BATCHES = (1, 8, 32)
BASE = "all on"
SWITCHES = (BASE, "no CUDA graphs", "no Triton kernel", "sdpa", "suffix recomputed")
TPF = 9.11  # tokens a forward, of the paper's LLaDA student on GSM8K (arXiv:2601.07568)
SPEED, STEP = "benchmark matrix", "distillation step"


def parts(quick: bool) -> Iterator[CheckPart]:
    for shape in ("tiny-llada",) if quick else SHAPES:
        for batch in (2,) if quick else BATCHES:
            for switch in SWITCHES:
                name = f"speed-{shape}-batch-{batch}-{switch.lower().replace(' ', '-')}"
                yield CheckPart(name, SPEED, 20.0 + 1.5 * batch, partial(measure_cell, shape, batch, switch))
    yield CheckPart("step", STEP, 120.0, measure_distillation)


def measure_cell(shape: str, batch: int, switch: str, target: Target) -> Figures:
    """Decode one batch of synthetic prompts at a scripted pace, with everything on but one switch."""
    flash = target.cuda and importlib.util.find_spec("flash_attn") is not None
    if switch == "sdpa" and not flash:
        raise Unavailable("flash-attn is not installed: sdpa is what every cell has run")
    workload = prepare(_plan(shape, batch, switch, target))
    model = workload.load()
    model.use_attention(choose_attention("sdpa" if switch == "sdpa" else "auto", target.device))
    if target.cuda:
        torch.cuda.reset_peak_memory_stats(target.device)
    with switched(triton=switch != "no Triton kernel"):
        engine = engine_for(workload, model, cuda_graphs=switch != "no CUDA graphs")
        (taken,) = measure(workload, engine, Progress(quiet=True))
    machines = _machines(target, workload.dtype)
    rows = {kind: decoding_row(workload, machine, taken) for kind, machine in machines.items()}
    row = rows[MEASURED]
    return {
        "shape": shape,
        "batch": batch,
        "switch": switch,
        "attention": "flash-attn" if flash and switch != "sdpa" else "sdpa",
        "static_shapes": static_shapes(engine),
        "tps": row.tps,
        "tps_low": row.tps_low,
        "tps_high": row.tps_high,
        "tpf": row.tpf,
        "ms": row.ms,
        "phases_ms": row.phases_ms,
        "overhead": row.overhead,
        "roofline_percent": {kind: limited.roofline_percent for kind, limited in rows.items()},
        "machines": {kind: str(machine) for kind, machine in machines.items()},
        "peak_memory": peak_memory(target.device),
    }


def measure_distillation(target: Target) -> Figures:
    """One optimizer step of the 8B shape: the published recipe's micro-batch."""
    if importlib.util.find_spec("peft") is None:
        raise Unavailable("peft is not installed (python -m pip install peft)")
    from d3llm_ray.benchmark.step import measure_step
    from d3llm_ray.benchmark.step_plan import StepPlan

    device, sheet = str(target.device), data_sheet(target.device)
    if target.quick:
        sizes = {"micro_batch_size": 1, "prompt_tokens": 4, "answer_tokens": 8, "window": 4, "lora_rank": 2}
        plan = StepPlan(**sizes, warmup_steps=1, steps=1, precision="float32", device=device)  # type: ignore[arg-type]
    else:
        plan = StepPlan(shape="llada-8b", device=device, machine=MEASURED if sheet is None else sheet.name)
    report = measure_step(plan)
    (row,), memory = report.rows, report.memory
    return {**row.to_dict(), "losses": list(row.losses), "peak": str(report.roofline), "memory": dict(memory)}


def _plan(shape: str, batch: int, switch: str, target: Target) -> BenchmarkPlan:
    return BenchmarkPlan(
        model=shape if target.quick else None,
        shape=None if target.quick else shape,
        prompt_tokens=8 if target.quick else 144,
        count=batch,
        decoders=("d3llm",),
        suffixes=("recompute" if switch == "suffix recomputed" else "cached",),
        batch_sizes=(batch,),
        max_tokens=(16 if target.quick else 256,),
        scripted_tpf=TPF,
        rounds=1 if target.quick else 3,
        dtype="float32" if target.quick else "bfloat16",
        device=str(target.device),
    )


def _machines(target: Target, dtype: torch.dtype) -> dict[str, Machine]:
    sheet = data_sheet(target.device)
    machines = {MEASURED: _measured(str(target.device), dtype)}
    return machines if sheet is None else {"data sheet": sheet, **machines}


@cache
def _measured(device: str, dtype: torch.dtype) -> Machine:
    return measure_machine(torch.device(device), dtype)
