"""Import published distillation data: files in, a finished trajectory folder out, in constant memory.

What the layouts hold, and how a row becomes one of ours, is in `published`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal

from pydantic import Field

from d3llm_ray.config import Settings
from d3llm_ray.errors import IncompleteError, InputError, require
from d3llm_ray.models import load_tokenizer, read_configs
from d3llm_ray.output_folder import sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import Split
from d3llm_ray.trajectories.prompts import reason_of, writable
from d3llm_ray.trajectories.published import ChatTemplate, Imported, PublishedTeacher, import_answer, import_trajectory
from d3llm_ray.trajectories.published_files import ANSWER, BATCH_ROWS, PublishedRows, open_published
from d3llm_ray.trajectories.schema import MAX_CANVAS, build_table, file_metadata
from d3llm_ray.trajectories.shards import ShardWriter, check_errors, check_folder, missing_rows
from d3llm_ray.trajectories.storage import SUCCESS, Location

Convert = Callable[[Any], Imported]
ResponseKey = Literal["idx", "question"]


class ImportSettings(Settings):
    """Turn published distillation data into trajectory rows: d3LLM's trajectories, or dParallel's plain answers."""

    verb: ClassVar[str] = "trajectories import"

    source: str = Field(
        description="file, or folder of files, any pyarrow.fs path: Parquet, JSON Lines, or a saved `datasets` folder; "
        "with a column trajectory, or with question and llm_response"
    )
    split: Split = Field("train", description="split of a folder whose files are called after it")
    responses: str | None = Field(
        None,
        description="training set of these trajectories, as `source`: its llm_response is kept beside them; null: the "
        "source's own column, where it has one",
    )
    response_key: ResponseKey = Field(
        "idx",
        description="what joins them: idx, by default the number of the training set's row, or the text of question",
    )
    teacher: str = Field(description="zoo name or checkpoint folder of the model that made them, with its tokenizer")
    output: str = Field(description="folder to write, any pyarrow.fs path")
    retemplate: bool = Field(
        True, description="put `question` in the chat template as the prompt; false keeps the published tokens"
    )
    max_tokens: int = Field(256, ge=1, le=MAX_CANVAS, description="response positions of answers without a trajectory")
    max_error_fraction: float = Field(
        0.05, ge=0.0, le=1.0, description="stop when more rows than this are malformed; a single one stops it at 0 only"
    )
    rows_per_file: int = Field(50_000, ge=1, description="rows of one output file")


class Findings:
    """How the published rows looked, for the summary."""

    def __init__(self) -> None:
        self._forms: Counter[str] = Counter()
        self._responses: Counter[bool] = Counter()
        self._inferred = 0
        self._offsets: tuple[int, int] | None = None

    def add(self, imported: Imported, teacher: PublishedTeacher) -> None:
        if imported.row["reference_ids"] is not None:
            self._responses[imported.matches(teacher)] += 1
        self._forms[imported.form] += 1
        self._inferred += imported.inferred
        low, high = self._offsets or (imported.offset, imported.offset)
        self._offsets = min(low, imported.offset), max(high, imported.offset)

    def figures(self) -> dict[str, Any]:
        """Rows by published prompt: the question's own tokens, templated, neither; the prompt's growth in tokens.

        `inferred`: rows whose prompt_ids were missing or wrong, where the masks told the prompt's end. `responses`:
        rows with the training set's response, and how many of them are the teacher's answer.
        """
        forms = {form: self._forms[form] for form in ("raw", "templated", "other")}
        responses = {"rows": self._responses.total(), "same": self._responses[True]}
        return {"template": {**forms, "inferred": self._inferred, "offset": self._offsets}, "responses": responses}


class Responses:
    """The responses of a training set, by key; all in memory, some 100 MB of 100,000."""

    def __init__(self, source: PublishedRows, key: ResponseKey) -> None:
        accepted = "llm_response and, as they are joined by it, question"
        wanted = {"llm_response", *({"question"} if key == "question" else ())}
        require(wanted <= set(source.columns), "responses", f"columns {', '.join(source.columns)}", accepted)
        self._key = key
        self._rows: dict[Any, tuple[Any, Any]] = {}  # key -> question, response
        for number, row in enumerate(source.rows()):
            require(isinstance(row, Mapping), "responses", f"row {number + 1}: {str(row)[:80]}", "rows of columns")
            name = row.get(key, number if key == "idx" else None)
            require(key == "question" or name not in self._rows, "responses", f"idx {name!r} twice", "each once")
            self._rows.setdefault(name, (row.get("question"), row.get("llm_response")))

    def of(self, published: Mapping[str, Any]) -> str | None:
        """The response to a row of trajectories. `InputError` where none is known, or that of another question."""
        key, asked = published.get(self._key), published.get("question")
        require(key in self._rows, self._key, key, "one that `responses` has")
        question, response = self._rows[key]
        same = None in (question, asked) or str(question).strip() == str(asked).strip()
        require(same, "question", asked, f"that of `responses` at {self._key} {key!r}: {question!r}")
        if response is None or isinstance(response, str):
            return response
        raise InputError(f"responses: got {response!r} at {self._key} {key!r}; accepted: text")


@sole_writer
def run(settings: ImportSettings, progress: Progress | None = None) -> str:
    """Import `settings.source` into the folder `settings.output`, laid out as a finished trajectory run; return it.

    A row met twice is kept once. Malformed rows go to `errors.parquet`; `InputError` once they are more than
    `max_error_fraction` of all, else `IncompleteError` when the folder is finished.
    """
    output = Location.of(settings.output, "output")
    check_folder(output)
    finished = (output / SUCCESS).exists
    require(not finished, "output", settings.output, f"a folder without a finished run ({SUCCESS})")
    source = open_published(settings.source, settings.split, "source")
    teacher, metadata = _teacher(settings, source.columns)
    convert = _converter(settings, source.columns, teacher)
    writer = ShardWriter(output, metadata, settings.rows_per_file)
    findings, seen, failed, example = Findings(), set[int](), 0, ""
    progress = progress or Progress()
    published, done = source.rows(), 0
    with progress.stage("import", source.total):
        while batch := list(islice(published, BATCH_ROWS)):
            rows = []
            for number, row in enumerate(batch, start=done):
                try:
                    imported = convert(row)
                except Exception as error:  # a bad row costs itself only
                    reason = reason_of(error)
                    failed, example = failed + 1, example or f"row {number + 1}: {reason}"
                    writer.reject({"row": number, "id": _id(row), "error": reason})
                    continue
                identity = int(imported.row["prompt_id"], 16)
                if identity not in seen:
                    seen.add(identity)
                    findings.add(imported, teacher)
                    rows.append({**imported.row, "id": _id(row)})
            writer.write(build_table(rows))
            done += len(batch)
            check_errors(failed, source.total, settings.max_error_fraction, example)
            progress.update(done, errors=failed)
    writer.finish(settings, {"duplicates": done - failed - len(seen), **findings.figures()})
    missing = missing_rows(output, "source")
    if missing is not None:
        raise IncompleteError(missing)
    return settings.output


def _id(published: Any) -> str | None:
    """What the source calls a row: its `id`, else its `idx`."""
    names = [published.get(name) for name in ("id", "idx")] if isinstance(published, Mapping) else []
    return next((writable(str(name)) for name in names if isinstance(name, str | int)), None)


def _teacher(settings: ImportSettings, columns: list[str]) -> tuple[PublishedTeacher, dict[str, Any]]:
    """What the rows share, and the metadata of the files to be written."""
    shape, family = read_configs(settings.teacher)
    if family.mask_token_id is None:
        raise InputError(f"teacher: {settings.teacher!r} is causal; accepted: a masked-diffusion model (llada, dream)")
    tokenizer = load_tokenizer(settings.teacher, family)
    ordered = "trajectory" in columns
    accepted = "trajectory (d3LLM's layout), or question and llm_response (dParallel's)"
    require(ordered or set(ANSWER[:2]) <= set(columns), "source", f"columns {', '.join(columns)}", accepted)
    text = "a checkpoint with a tokenizer" + (", or retemplate: false" if ordered else "")
    needs_text = settings.retemplate or not ordered
    require(tokenizer is not None or not needs_text, "teacher", settings.teacher, text)
    require("question" in columns or not needs_text, "source", "no column question", "one, or retemplate: false")
    if settings.responses is not None:
        require(ordered, "responses", settings.responses, "null for a source that is a training set itself")
        require(tokenizer is not None, "teacher", settings.teacher, "a checkpoint with a tokenizer, or responses: null")
        accepted = f"a column {settings.response_key} (response_key)"
        require(settings.response_key in columns, "source", f"columns {', '.join(columns)}", accepted)
    generation = {"imported": True, "teacher": settings.teacher}
    template = None if tokenizer is None else ChatTemplate(tokenizer)
    teacher = PublishedTeacher(
        family, family.mask_token_id, shape.vocab_size, template, generation, settings.retemplate
    )
    return teacher, file_metadata(family.name, generation)


def _converter(settings: ImportSettings, columns: list[str], teacher: PublishedTeacher) -> Convert:
    """The layout's conversion of one row."""
    if "trajectory" not in columns:
        return partial(import_answer, teacher=teacher, max_tokens=settings.max_tokens)
    if settings.responses is None:
        return partial(import_trajectory, teacher=teacher)
    responses = Responses(open_published(settings.responses, settings.split, "responses"), settings.response_key)
    return partial(import_trajectory, teacher=teacher, response_of=responses.of)
