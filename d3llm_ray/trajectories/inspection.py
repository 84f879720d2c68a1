"""The verb `trajectories inspect`: what a trajectory folder holds, in figures, as pictures and played back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from pydantic import Field
from pydantic_settings import CliPositionalArg
from transformers import PreTrainedTokenizerBase

from d3llm_ray.config import Settings
from d3llm_ray.errors import InputError
from d3llm_ray.models import load_tokenizer, read_configs
from d3llm_ray.output_folder import check_folder, claim
from d3llm_ray.progress import Progress
from d3llm_ray.report import can_plot
from d3llm_ray.terminal import legible
from d3llm_ray.trajectories.play import Unmasking, play
from d3llm_ray.trajectories.reveals import Histogram, Reveals
from d3llm_ray.trajectories.schema import ERRORS, check_table, decode_metadata, open_dataset
from d3llm_ray.trajectories.shards import Totals
from d3llm_ray.trajectories.storage import Location

# Nothing is read ahead: memory stays the same however many rows there are.
SCAN: dict[str, Any] = {
    "batch_size": 4096,
    "batch_readahead": 1,
    "fragment_readahead": 1,
    "use_threads": False,
    "fragment_scan_options": pads.ParquetFragmentScanOptions(pre_buffer=False),
}
BAR_LENGTH = 40
EXAMPLES = 3  # ids and reasons that are named
MARKER = "inspect.yaml"


def on_terminal() -> bool:
    return sys.stdout.isatty()


class InspectSettings(Settings):
    """Show what a trajectory folder holds: figures and histograms of all rows, and one row's unmasking."""

    verb: ClassVar[str] = "trajectories inspect"

    path: CliPositionalArg[str] = Field(
        "runs/trajectories", description="finished trajectory folder or a file of it, any pyarrow.fs path"
    )
    row: int | str | None = Field(
        None, description="row to draw and play: its 0-based number or its prompt_id; null: the first with an order"
    )
    output: Path = Field(Path("runs/inspect"), description="folder for the pictures")
    play: bool = Field(default_factory=on_terminal, description="play the row's unmasking")
    delay_s: float = Field(0.15, ge=0.0, description="seconds a frame stays, on a terminal")
    bins: int = Field(20, ge=1, description="bins of a histogram, about")


def run(settings: InspectSettings, progress: Progress | None = None) -> str:
    """Draw and play one row and return the report of all rows, which are read in constant memory.

    Files in `settings.output` (where matplotlib is installed): `inspect.yaml` (these settings), `histograms.png` and
    `trajectory-PROMPT_ID.png`. Raises `InputError`, before rows are counted, for an output that cannot be written or is
    not ours, for a path that is missing, unfinished or of another schema, and for a row that is not there or does not
    know its order.
    """
    check_folder(settings.output, MARKER, InspectSettings)
    dataset = open_dataset(settings.path)
    check_table(dataset.schema.empty_table(), settings.path)
    row = _find_row(dataset, settings.row)
    metadata = decode_metadata(dataset.schema)
    tokenizer, stop_token_ids = _vocabulary(metadata)
    block_size = (metadata.get("decoder") or {}).get("block_size")
    totals, reveals = Totals(), Reveals(stop_token_ids, block_size, settings.bins)
    for rows in _batches(dataset, settings.path, progress or Progress()):
        totals.add(rows)
        reveals.add(rows)
    histograms = reveals.histograms()
    unmasking = None if row is None else Unmasking.of(row, tokenizer, block_size)
    pictures = _draw(settings, histograms, unmasking)
    if settings.play and unmasking is not None:
        play(unmasking, settings.delay_s, sys.stdout)
    facts = {
        **_source(settings.path, dataset, metadata),
        **_figures(totals.figures(), reveals, bool(stop_token_ids), block_size),
        **_errors(settings.path),
    }
    counted = "tokens before the first stop token" if stop_token_ids else "positions, the stop token is unknown"
    sections = [_aligned(facts), *(_bars(histogram, counted) for histogram in histograms)]
    sections += [_aligned(_shown(row))] if row is not None else []
    return "\n\n".join([*sections, *(["\n".join(map(str, pictures))] if pictures else [])])


def _find_row(dataset: pads.Dataset, wanted: int | str | None) -> dict[str, Any] | None:
    """The row to show; None when nothing in particular is `wanted` and no row knows its order."""
    if wanted is None:
        number = _first(dataset, "reveal_step", pc.is_valid)
        return None if number is None else _row_at(dataset, number)
    text, count = str(wanted), dataset.count_rows()
    is_number = text.isdecimal() and int(text) < count  # an id of digits alone is larger than any number of rows
    number = int(text) if is_number else _first(dataset, "prompt_id", lambda ids: pc.equal(ids, text))
    if number is None:
        ids = [_row_at(dataset, example)["prompt_id"] for example in range(min(count, EXAMPLES))]
        accepted = f"0 to {count - 1}, or a prompt_id such as {', '.join(ids)}" if ids else "nothing: there are no rows"
        raise InputError(f"row: got {wanted!r}; accepted: {accepted}")
    row = _row_at(dataset, number)
    if row["reveal_step"] is None:
        raise InputError(f"row: {wanted!r} has no reveal_step and cannot be drawn; accepted: a row that has one")
    return row


def _first(dataset: pads.Dataset, column: str, test: Callable[[pa.Array], pa.Array]) -> int | None:
    """The number of the first row whose value in `column` passes."""
    start = 0
    for batch in dataset.to_batches(columns=[column], **SCAN):
        index = pc.index(test(batch[column]), True).as_py()
        if index >= 0:
            return int(start + index)
        start += batch.num_rows
    return None


def _row_at(dataset: pads.Dataset, number: int) -> dict[str, Any]:
    for fragment in dataset.get_fragments():
        if number < (count := fragment.count_rows()):
            break
        number -= count
    for batch in fragment.to_batches(**SCAN):
        if number < batch.num_rows:
            break
        number -= batch.num_rows
    row: dict[str, Any] = batch.slice(number, 1).to_pylist()[0]
    return row


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[PreTrainedTokenizerBase | None, tuple[int, ...]]:
    """(tokenizer, stop token ids) of the teacher that the metadata name, as far as it can be read from here."""
    try:
        _, family = read_configs(str(metadata.get("teacher")))
        return load_tokenizer(str(metadata["teacher"]), family), family.stop_token_ids
    except InputError:
        return None, ()


def _batches(dataset: pads.Dataset, path: str, progress: Progress) -> Iterator[pa.Table]:
    done = 0
    with progress.stage("inspect", dataset.count_rows()):
        for batch in dataset.to_batches(**SCAN):
            rows = pa.Table.from_batches([batch])
            check_table(rows, path)
            yield rows
            done += rows.num_rows
            progress.update(done)


def _draw(settings: InspectSettings, histograms: list[Histogram], unmasking: Unmasking | None) -> list[Path]:
    """The pictures that were written: those that there is something for."""
    if not (histograms or unmasking) or not can_plot(settings.output):  # the report does without
        return []
    from d3llm_ray.trajectories.plots import plot_histograms, plot_unmasking

    output = settings.output
    claim(output, MARKER, settings)
    pictures = []
    if histograms:
        pictures.append(output / "histograms.png")
        plot_histograms(histograms, pictures[-1])
    if unmasking is not None:
        pictures.append(output / f"trajectory-{unmasking.prompt_id}.png")
        plot_unmasking(unmasking, pictures[-1])
    return pictures


def _source(path: str, dataset: pads.Dataset, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Where the rows are and what made them."""
    size = sum(info.size for info in Location.of(path).filesystem.get_file_info(dataset.files))
    rows, files = dataset.count_rows(), len(dataset.files)
    decoder = metadata.get("decoder") or {}
    options = ", ".join(f"{name} {value}" for name, value in decoder.items() if name != "decoder" and value is not None)
    return {
        "path": os.fspath(path),
        "rows": str(rows),
        "size": f"{size / 1e6:.3g} MB in {files} file{'s' * (files != 1)}, {size / max(1, rows):.0f} bytes a row",
        "teacher": f"{metadata.get('teacher', 'unknown')} ({metadata.get('family', 'family unknown')})",
        "decoder": f"{decoder['decoder']}: {options}"
        if "decoder" in decoder
        else "unknown (imported rows do not tell)",
    }


def _figures(figures: Mapping[str, Any], reveals: Reveals, stops: bool, block_size: int | None) -> dict[str, str]:
    """What the rows say together, and which columns do not tell."""
    if not figures["rows"]:
        return {}
    canvases = reveals.canvases
    lengths = f"{min(canvases)}" if len(canvases) == 1 else f"{min(canvases)} to {max(canvases)}"
    judged, correct = figures["judged"], figures["correct"]
    attempts = ", ".join(f"{number}: {count}" for number, count in enumerate(figures["correct_at_attempt"]))
    lines = {
        "canvas": f"{lengths} positions",
        "correct": f"{correct} of {judged} judged ({figures['accuracy']:.1f} %)" if judged else "no row is judged",
        "correct at attempt": attempts or "unknown",
    }
    if reveals.forwards:
        rate = reveals.positions / reveals.forwards
        name = "tokens per forward" if stops else "positions per forward"
        counted = "tokens before the first stop token" if stops else "revealed positions, the stop token is unknown"
        lines["forwards"] = f"{figures['mean_forwards']:.1f} a row"
        lines[name] = f"{rate:.2f} ({counted})"
    if reveals.order is not None:
        where = f"blocks of {block_size}" if block_size else "the canvas, the block size is unknown"
        lines["order"] = (
            f"{reveals.order:.2f}: Goodman-Kruskal gamma of position and step within {where}; 1 is left to right, "
            "0 no order, -1 right to left"
        )
    missing = ", ".join(f"{name} in {count} rows" for name, count in reveals.untold.items() if count)
    return {**lines, **({"not known": missing} if missing else {})}


def _errors(path: str) -> dict[str, str]:
    """How many prompts gave no row, and the reasons that came most often."""
    file = Location.of(path) / ERRORS
    if not file.exists:
        return {"errors": "0"}
    reasons = pads.dataset(file.path, filesystem=file.filesystem, format="parquet").to_table(columns=["error"])["error"]
    counts = pc.value_counts(reasons).to_pylist()
    counts.sort(key=lambda item: -item["counts"])
    often = "; ".join(f"{item['counts']} x {legible(item['values'])}" for item in counts[:EXAMPLES])
    return {"errors": f"{len(reasons)}, most often: {often}"}


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    """The row that was drawn."""
    verdict = {True: "correct", False: "wrong", None: "not judged"}[row["is_correct"]]
    last = row["messages"][-1]["content"] if row["messages"] else f"{len(row['prompt_ids'])} token ids"
    return {
        "row": row["prompt_id"],
        "prompt": legible(last),
        "answer": f"{legible(str(row['answer']))} ({verdict}, reference {legible(str(row['reference']))})",
    }


def _aligned(facts: Mapping[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _bars(histogram: Histogram, counted: str) -> str:
    """A line a bin: where it begins and ends, its share, the share up to its end, and a bar of its count."""
    total = histogram.counts.sum()
    edges = [f"{edge:g}" for edge in histogram.edges.round(6)]
    width = max(map(len, edges))
    title = f"{histogram.title}{f', {histogram.unit}' if histogram.unit else ''} ({total} {counted})"
    lines = [title, f"{'':{2 * width + 3}}   share   up to"]
    rows = zip(edges[:-1], edges[1:], histogram.counts, histogram.counts.cumsum(), strict=True)
    for low, high, count, below in rows:
        bar = "█" * round(BAR_LENGTH * count / histogram.counts.max()) or ("▏" if count else "")
        lines.append(f"{low:>{width}} - {high:>{width}}  {count / total:6.1%}  {below / total:6.1%}  {bar}".rstrip())
    return "\n".join(lines)
