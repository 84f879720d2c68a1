"""The GPU check's findings: one JSON, and Markdown for docs/benchmarks.md."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from d3llm_ray.benchmark.gpu_check_base import Target
from d3llm_ray.benchmark.gpu_check_speed import BASE, SPEED, STEP
from d3llm_ray.benchmark.profile import PHASES
from d3llm_ray.benchmark.report import between
from d3llm_ray.report import WrittenReport, digest, machine, table, versions

PACKAGE = Path(__file__).parents[1]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class GpuCheckReport(WrittenReport):
    """`facts` of the machine, records of the parts that have ended, names of those that have not."""

    facts: Record
    parts: Sequence[Record]
    left: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        return {**self.facts, "left": list(self.left), "parts": [dict(record) for record in self.parts]}

    def to_markdown(self) -> str:
        facts = self.facts
        packages = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
        lines = [
            f"**{facts['card']}**, driver {facts['driver'] or 'unknown'}, {facts['date'][:10]}, commit "
            f"{facts['commit'] or 'unknown'} (sources {facts['sources']}); {packages}.",
        ]
        if facts["quick"]:
            lines.append("Toy sizes: this proves nothing but that the check itself runs.")
        if self.left:
            lines.append(f"**{len(self.left)} parts are left**: {', '.join(self.left)}.")
        parts = ["\n\n".join(lines) + "\n", self._checks(), *self._speeds(), *self._step()]
        return "\n".join(parts)

    def _checks(self) -> str:
        cells = (
            [r["part"], r["section"], r["status"], _told(r), f"{r.get('seconds', 0):.0f}"]
            for r in self.parts
            if r["section"] not in (SPEED, STEP) or r["status"] != "passed"
        )
        return table(["part", "what", "status", "figures or reason", "s"], cells, left=4)

    def _speeds(self) -> Iterator[str]:
        cells = [r["figures"] for r in self.parts if r["section"] == SPEED and r["status"] == "passed"]
        if not cells:
            return
        bases = {(cell["shape"], cell["batch"]): cell["tps"] for cell in cells if cell["switch"] == BASE}
        kinds = list(cells[0]["roofline_percent"])
        header = ["shape", "switches", "attention", "batch", "tokens/s", "of all on", "TPF", "ms/forward"]
        header += [*(f"{phase} ms" for phase in PHASES), *(f"roofline ({kind})" for kind in kinds), "peak GiB"]
        rows = []
        for cell in cells:
            base = bases.get((cell["shape"], cell["batch"]))
            rows.append(
                [
                    *(cell[name] for name in ("shape", "switch", "attention")),
                    str(cell["batch"]),
                    between(cell["tps"], cell["tps_low"], cell["tps_high"]),
                    f"{cell['tps'] / base:.2f}" if base else "-",
                    f"{cell['tpf']:.2f}",
                    f"{cell['ms']:.2f}",
                    *(f"{cell['phases_ms'][phase]:.2f}" for phase in PHASES),
                    *(f"{cell['roofline_percent'][kind]:.1f} %" for kind in kinds),
                    f"{cell['peak_memory'] / 2**30:.1f}",
                ]
            )
        yield table(header, rows, left=3)
        yield "".join(f"- {kind}: {text}\n" for kind, text in cells[0]["machines"].items())

    def _step(self) -> Iterator[str]:
        header = ["step of", "step ms", "tokens", "tokens/s", "MFU", "HFU", "peak GiB", "planned GiB"]
        rows = []
        for record in self.parts:
            if record["section"] == STEP and record["status"] == "passed":
                step = record["figures"]
                rows.append(
                    [
                        step["model"],
                        between(*(1e3 * step[name] for name in ("seconds", "seconds_low", "seconds_high"))),
                        str(step["tokens"]),
                        f"{step['tokens_per_second']:.0f}",
                        *(f"{100 * step[name]:.1f} %" for name in ("mfu", "hfu")),
                        *(f"{step['memory'][name] / 2**30:.2f}" for name in ("peak", "planned")),
                    ]
                )
        if rows:
            yield table(header, rows, left=1)


def _told(record: Record) -> str:
    if record.get("reason"):
        return str(record["reason"]).replace("|", "/")
    figures = ((name.replace("_", " "), value) for name, value in record["figures"].items())
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures
    )


def facts_of(target: Target) -> dict[str, Any]:
    """Card, driver, versions, commit and date. `sources` is a digest of the package: it needs no git."""
    files = sorted(PACKAGE.rglob("*.py"))
    packages = {
        **versions(),
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in ("triton", "flash-attn", "peft")},
    }
    return {
        "card": torch.cuda.get_device_name(target.device) if target.cuda else machine()["processor"],
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if target.cuda else None,
        "commit": _said("git", "-C", str(PACKAGE), "describe", "--always", "--dirty"),
        "sources": digest([[str(path.relative_to(PACKAGE)), path.read_text()] for path in files]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": target.quick,
        "versions": packages,
        "machine": machine(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """The first line that a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
