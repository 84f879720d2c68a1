"""Import trajectories in the published layout (the d3LLM project's `trajectory_data_*` datasets).

There, `trajectory` lists the whole sequence, prompt included, after every step: entry k holds
k + 1 revealed tokens. Everything it says fits one row of `schema.SCHEMA`; what it does not say (entropies, attempt,
temperature, seed) is null.

    python -m d3llm_ray.trajectories.importer --source FOLDER_OR_FILE --teacher DIR --output FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from pydantic import Field

from d3llm_ray import __version__
from d3llm_ray.config import Settings, parse, to_yaml
from d3llm_ray.errors import InputError, require
from d3llm_ray.models import Family, encode_chat, load_tokenizer, read_configs
from d3llm_ray.progress import Progress
from d3llm_ray.trajectories.prompts import prompt_id
from d3llm_ray.trajectories.publish import ERRORS, check_errors, summarise, write_files
from d3llm_ray.trajectories.schema import MAX_CANVAS, SCHEMA, build_table, check_table, with_metadata
from d3llm_ray.trajectories.storage import SUCCESS, Location

REQUIRED = ("prompt_ids", "trajectory")
OPTIONAL = ("question", "gt_answer", "llm_answer", "is_correct")
BATCH_ROWS = 32  # a published row is 0.4 MB

Encode = Callable[[str], list[int]]


class ImportSettings(Settings):
    """Turn published trajectories into ours, about 300 times smaller."""

    verb: ClassVar[str] = "import-trajectories"

    source: str = Field(description="Parquet file or folder with prompt_ids and trajectory, any pyarrow.fs path")
    teacher: str = Field(description="checkpoint folder of the model that made them: its mask token and tokenizer")
    output: str = Field(description="folder to write, any pyarrow.fs path")
    retemplate: bool = Field(
        True, description="tokenise `question` anew through the chat template; false keeps the published prompt_ids"
    )
    max_error_fraction: float = Field(0.05, ge=0.0, le=1.0, description="stop when more rows than this are malformed")
    rows_per_file: int = Field(50_000, ge=1, description="rows of one output file")


def reveal_steps(trajectory: Sequence[Sequence[int]], prompt_length: int, mask_id: int) -> tuple[list[int], list[int]]:
    """(response ids, step that revealed each of them) of one published trajectory of K whole sequences.

    Raises `InputError` when sequences differ in length, a position is never revealed, or one is masked again.
    """
    require(0 < len(trajectory) <= MAX_CANVAS, "trajectory", f"{len(trajectory)} steps", f"1 to {MAX_CANVAS} steps")
    lengths = {len(entry) for entry in trajectory}
    require(len(lengths) == 1, "trajectory", f"sequences of {sorted(lengths)} tokens", "one length")
    require(lengths.pop() > prompt_length, "trajectory", "no token behind the prompt", "a response")
    response = np.asarray(trajectory, dtype=np.int64)[:, prompt_length:]  # [K, canvas]
    revealed = response != mask_id
    require(bool(revealed[-1].all()), "trajectory", "a position masked to the end", "a finished decoding")
    require(bool((revealed[1:] >= revealed[:-1]).all()), "trajectory", "a position masked again", "reveals that stay")
    return response[-1].tolist(), np.argmax(revealed, axis=0).tolist()


def import_row(
    published: Mapping[str, Any], mask_id: int, generation: Mapping[str, Any], encode: Encode | None = None
) -> dict[str, Any]:
    """One published row as ours. `encode` tokenises its `question`; None keeps the published `prompt_ids`.

    The published prompt is tokenised without the chat template that training and decoding use. Our positions are
    relative to the response, so the prompt may be replaced under them. `InputError` for a malformed trajectory.
    """
    prompt_ids, question = list(published["prompt_ids"]), published.get("question")
    response_ids, steps = reveal_steps(published["trajectory"], len(prompt_ids), mask_id)
    # The published code calls an answer without a reference correct; here it is unjudged.
    reference = published.get("gt_answer") or None
    messages = None if question is None else [{"role": "user", "content": question}]
    return {
        "prompt_id": prompt_id(messages or prompt_ids, generation),
        "messages": messages,
        "prompt_ids": encode(question) if encode is not None and question is not None else prompt_ids,
        "response_ids": response_ids,
        "reveal_step": steps,
        "reference": reference,
        "answer": published.get("llm_answer"),
        "is_correct": published.get("is_correct") if reference is not None else None,
        "forwards": len(published["trajectory"]),
    }


def run(settings: ImportSettings, progress: Progress | None = None) -> str:
    """Import `settings.source` into the folder `settings.output`, laid out as a finished trajectory run; return it.

    A row met twice is kept once. Malformed rows go to `errors.jsonl`, up to `max_error_fraction` of all.
    """
    _, family = read_configs(settings.teacher)
    if family.mask_token_id is None:
        raise InputError(f"teacher: {settings.teacher!r} is causal; accepted: a masked-diffusion model (llada, dream)")
    encode = _template(settings.teacher, family) if settings.retemplate else None
    dataset, columns = _open(settings.source)
    generation = {"imported": True, "teacher": settings.teacher}
    total = dataset.count_rows()
    progress = progress or Progress()
    progress.start("import", total, "row")
    tables: list[pa.Table] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    for start, batch in _batches(dataset, columns):
        rows = []
        for number, published in enumerate(batch, start=start):
            try:
                row = import_row(published, family.mask_token_id, generation, encode)
            except InputError as error:
                errors.append({"row": number, "error": str(error)})
                continue
            if row["prompt_id"] not in seen:
                seen.add(row["prompt_id"])
                rows.append(row)
        tables.append(build_table(rows))
        progress.update(start + len(batch), errors=len(errors))
    progress.finish()
    check_errors(len(errors), total, settings.max_error_fraction, errors[0]["error"] if errors else "")
    metadata = {"family": family.name, "package": "d3llm-ray", "version": __version__, **generation}
    table = pa.concat_tables(tables).replace_schema_metadata(with_metadata(SCHEMA, metadata).metadata)
    check_table(table, settings.source)
    _write(settings, table, errors, duplicates=total - len(errors) - table.num_rows)
    return settings.output


def _template(teacher: str, family: Family) -> Encode:
    """Text to token ids through the teacher's chat template."""
    tokenizer = load_tokenizer(teacher, family)
    if tokenizer is None:
        raise InputError("retemplate: the teacher has no tokenizer; accepted: false, or a checkpoint with one")
    return lambda question: encode_chat(tokenizer, [{"role": "user", "content": question}])


def _open(source: str) -> tuple[pads.Dataset, list[str]]:
    location = Location.of(source, "source")
    require(location.exists, "source", source, "a Parquet file or folder that exists")
    try:
        dataset = pads.dataset(location.path, filesystem=location.filesystem, format="parquet")
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"source: {source!r} is not Parquet: {error}") from error
    found = dataset.schema.names
    for name in REQUIRED:
        require(name in found, "source", f"columns {', '.join(found)}", f"a dataset with a column {name!r}")
    return dataset, [name for name in (*REQUIRED, *OPTIONAL) if name in found]


def _batches(dataset: pads.Dataset, columns: list[str]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number of the first row, rows), a few at a time: a published dataset is larger than memory."""
    start = 0
    for batch in dataset.to_batches(columns=columns, batch_size=BATCH_ROWS, batch_readahead=1, fragment_readahead=1):
        yield start, batch.to_pylist()
        start += batch.num_rows


def _write(settings: ImportSettings, table: pa.Table, errors: list[dict[str, Any]], duplicates: int) -> None:
    output = Location.of(settings.output, "output")
    output.make_folder()
    write_files(output, table, settings.rows_per_file)
    if errors:
        (output / ERRORS).write_text("".join(json.dumps(error) + "\n" for error in errors))
    summary = {**summarise(table), "errors": len(errors), "duplicates": duplicates}
    (output / "settings.yaml").write_text(to_yaml(settings))
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (output / SUCCESS).write_text("")


def main() -> int:
    try:
        settings, print_only = parse(ImportSettings, sys.argv[1:], prog="python -m d3llm_ray.trajectories.importer")
        print(to_yaml(settings) if print_only else run(settings))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
