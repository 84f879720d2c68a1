from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from d3llm_ray.config import build
from d3llm_ray.errors import IncompleteError, InputError
from d3llm_ray.models.families import LAYOUTS
from d3llm_ray.progress import Progress
from d3llm_ray.trajectories import read_trajectories
from d3llm_ray.trajectories.importer import ImportSettings, run
from d3llm_ray.trajectories.published import ChatTemplate, reveal_steps
from d3llm_ray.trajectories.schema import TrajectoryRow, build_table, check_table

EOS, MASK = 1, 2  # of the embedded tokenizer


def publish(prompt: list[int], response: list[int], order: list[int], mask: int = MASK) -> list[list[int]]:
    """The published encoding, written from its description: the whole sequence after each reveal."""
    sequence, trajectory = prompt + [mask] * len(response), []
    for position in order:
        sequence = list(sequence)
        sequence[len(prompt) + position] = response[position]
        trajectory.append(sequence)
    return trajectory


def question_of(number: int) -> str:
    return f"Tom has {number} apples. How many apples does Tom have now?"


def published_row(number: int, prompt: list[int], canvas: int = 32) -> tuple[TrajectoryRow, list[int]]:
    rng = random.Random(number)
    response = [rng.randrange(10, 90) for _ in range(canvas)]
    order = [block + i for block in range(0, canvas, 8) for i in rng.sample(range(8), 8)]
    row = {
        "idx": number,
        "question": question_of(number),
        "prompt_ids": prompt,
        "trajectory": publish(prompt, response, order),
        "final_output": prompt + response,
        "llm_answer": "7",
        "gt_answer": "7" if number % 2 else "",
        "is_correct": True,
    }
    return row, order


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def raw(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def templated(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(rendered(text), add_special_tokens=False)["input_ids"]


@pytest.fixture
def imported(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., tuple[list[TrajectoryRow], TrajectoryRow]]:
    """`imported(rows, **settings) -> (our rows, summary)`."""

    def import_rows(rows: list[TrajectoryRow], **settings: Any) -> tuple[list[TrajectoryRow], TrajectoryRow]:
        source = write(tmp_path / "source.parquet", rows)
        values = {"source": str(source), "teacher": str(tiny_checkpoint), "output": str(tmp_path / "out")}
        folder = import_all(values | settings)
        return read_trajectories(folder).to_pylist(), json.loads((folder / "summary.json").read_text())

    return import_rows


def rendered(question: str) -> str:
    """LLaDA's chat format of one user message, as the embedded tokenizer has it (no line breaks)."""
    return (
        f"<|startoftext|><|start_header_id|>user<|end_header_id|>{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>"
    )


def write(path: Path, rows: list[TrajectoryRow]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_lines(path: Path, rows: list[TrajectoryRow]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def import_all(values: dict[str, Any]) -> Path:
    """The folder that `run` writes; when it has errors, they are what the call ends with."""
    folder = Path(values["output"])
    try:
        run(build(ImportSettings, values))
    except IncompleteError as error:
        errors = rejected(folder)
        assert str(error).startswith(f"source: {len(errors)} of ") and str(folder / "errors.parquet") in str(error)
        assert all(f"row {number + 1}" in str(error) and reason in str(error) for number, reason in errors)
    else:
        assert not (folder / "errors.parquet").exists()
    return folder


def rejected(folder: Path) -> list[tuple[int, str]]:
    return [(row["row"], row["error"]) for row in pq.read_table(folder / "errors.parquet").to_pylist()]


@pytest.mark.parametrize(
    ("response", "steps"),
    [
        ([[5, 2, 2], [5, 2, 7], [5, 6, 7]], [0, 2, 1]),
        ([[2, 2, 2], [5, 2, 2], [5, 2, 7], [5, 6, 7]], [0, 2, 1]),  # the canvas before decoding is no step
        ([[5, 2, 2], [5, 2, 7], [5, 6, 7], [5, 6, 7]], [0, 2, 1]),  # nor is a repeat of the last one
        ([[5, 2, 2], [5, 6, 7]], [0, 1, 1]),
    ],
)
def test_hand_made_orders(response: list[list[int]], steps: list[int]) -> None:
    assert reveal_steps(np.array(response), mask_id=2) == ([5, 6, 7], steps)


@pytest.mark.parametrize("kind", ["file", "folder", "lines", "datasets"])
def test_every_source_gives_the_published_order(
    tiny_checkpoint: Path, tmp_path: Path, raw: Callable[[str], list[int]], kind: str
) -> None:
    import datasets

    published = [published_row(number, raw(question_of(number))) for number in range(40)]
    rows = [row for row, _ in published]
    source = tmp_path / "published"
    if kind == "file":
        source = write(tmp_path / "published.parquet", rows)
    elif kind == "folder":
        source.mkdir()
        (source / "README.md").touch()
        write(source / "train-00000-of-00002.parquet", rows[:25])
        write(source / "train-00001-of-00002.parquet", rows[25:])
    elif kind == "lines":
        source = write_lines(tmp_path / "published.jsonl", rows)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(source, num_shards=2)
    values = {"source": str(source), "teacher": str(tiny_checkpoint), "output": str(tmp_path / "out")}
    folder = run(build(ImportSettings, values))
    table = read_trajectories(folder).to_pylist()
    assert len(table) == 40
    for row, (original, order) in zip(table, published, strict=True):
        assert row["response_ids"] == original["final_output"][len(original["prompt_ids"]) :]
        assert [row["reveal_step"][position] for position in order] == list(range(32))
        assert row["messages"] == [{"role": "user", "content": original["question"]}]
        judged = bool(original["gt_answer"])
        assert (row["reference"], row["is_correct"]) == (("7", True) if judged else (None, None))
        assert row["forwards"] == 32 and row["answer"] == "7" and row["id"] == str(original["idx"])
        assert row["seed"] is None and row["reveal_entropy"] is None


def test_template_offset_is_found_and_rebased(
    imported: Callable[..., tuple[list[TrajectoryRow], TrajectoryRow]],
    raw: Callable[[str], list[int]],
    templated: Callable[[str], list[int]],
) -> None:
    prompts = [raw(question_of(0)), raw(question_of(1)), templated(question_of(2)), [50, 51, 52]]
    rows, summary = imported([published_row(number, prompt)[0] for number, prompt in enumerate(prompts)])
    assert [row["prompt_ids"] for row in rows] == [templated(question_of(number)) for number in range(4)]
    growth = [len(templated(question_of(number))) - len(prompt) for number, prompt in enumerate(prompts)]
    assert growth[0] == growth[1] == 8 and growth[2] == 0 and growth[3] > 8
    assert summary["template"] == {"raw": 2, "templated": 1, "other": 1, "inferred": 0, "offset": [0, growth[3]]}


def test_published_prompts_stay_without_retemplate(
    imported: Callable[..., tuple[list[TrajectoryRow], TrajectoryRow]], raw: Callable[[str], list[int]]
) -> None:
    prompts = [raw(question_of(0)), [50, 51, 52]]
    source = [published_row(number, prompt)[0] for number, prompt in enumerate(prompts)]
    rows, summary = imported(source, retemplate=False)
    assert [row["prompt_ids"] for row in rows] == prompts
    assert summary["template"] == {"raw": 1, "templated": 0, "other": 1, "inferred": 0, "offset": [0, 0]}


@pytest.mark.parametrize("start", ["<|startoftext|>", ""])
def test_rendered_question_is_not_templated_again(
    imported: Callable[..., tuple[list[TrajectoryRow], TrajectoryRow]],
    raw: Callable[[str], list[int]],
    templated: Callable[[str], list[int]],
    start: str,
) -> None:
    text = start + rendered(question_of(3)).removeprefix("<|startoftext|>")
    ((row,), summary) = imported([{**published_row(3, raw(text))[0], "question": text}])
    assert row["prompt_ids"] == templated(question_of(3))
    assert row["messages"] == [{"role": "user", "content": question_of(3)}]
    assert summary["template"]["templated" if start else "raw"] == 1
    assert summary["template"]["offset"] == ([0, 0] if start else [1, 1])


@pytest.mark.parametrize(
    ("model_type", "before", "after"),
    [
        (
            "llada",
            "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("Dream", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_published_templates_are_recognised(tiny_checkpoint: Path, model_type: str, before: str, after: str) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    tokenizer.chat_template = LAYOUTS[model_type].chat_template
    template = ChatTemplate(tokenizer)
    plain, wrapped = template.apply(question_of(3)), template.apply(before + question_of(3) + after)
    assert wrapped.messages == plain.messages == [{"role": "user", "content": question_of(3)}]
    assert wrapped.templated == plain.templated and wrapped.raw != plain.raw


@pytest.mark.parametrize("kind", ["system", "turns", "no header"])
def test_question_rendered_in_another_way_is_kept_as_it_is(
    imported: Callable[..., tuple[list[TrajectoryRow], TrajectoryRow]], raw: Callable[[str], list[int]], kind: str
) -> None:
    text = rendered(question_of(3))
    if kind == "system":
        system = "<|start_header_id|>system<|end_header_id|>Tom has apples.<|eot_id|>"
        text = text.replace("<|startoftext|>", f"<|startoftext|>{system}")
    elif kind == "turns":
        text += "7<|eot_id|>" + rendered(question_of(4)).removeprefix("<|startoftext|>")
    else:
        text = text.removesuffix("<|start_header_id|>assistant<|end_header_id|>")
    ((row,), _) = imported([{**published_row(3, raw(text))[0], "question": text}])
    assert row["prompt_ids"] == raw(text) and row["messages"] is None


@pytest.mark.parametrize("prompt_ids", [None, [99], "short"])
def test_wrong_prompt_ids_are_replaced_by_what_the_masks_tell(
    imported: Callable[..., tuple[list[TrajectoryRow], TrajectoryRow]], raw: Callable[[str], list[int]], prompt_ids: Any
) -> None:
    prompt, response = raw(question_of(1)), [5, 6, 7]
    row = published_row(1, prompt)[0] | {"trajectory": publish(prompt, response, [1, 0, 2]), "final_output": None}
    given = prompt[:-3] if prompt_ids == "short" else prompt_ids
    ((ours,), summary) = imported([row | {"prompt_ids": given}], retemplate=False)
    assert (ours["prompt_ids"], ours["response_ids"], ours["reveal_step"]) == (prompt, response, [1, 0, 2])
    assert summary["template"]["inferred"] == 1


def test_first_position_revealed_first_needs_the_question_to_tell(
    imported: Callable[..., tuple[list[TrajectoryRow], TrajectoryRow]], raw: Callable[[str], list[int]]
) -> None:
    known, unknown = raw(question_of(1)), [50, 51, 52]
    rows = [
        published_row(number, prompt)[0] | {"trajectory": publish(prompt, [5, 6], [0, 1]), "final_output": None}
        for number, prompt in ((1, known), (2, unknown))
    ]
    ours, summary = imported([row | {"prompt_ids": [99]} for row in rows], max_error_fraction=0.5)
    assert [(row["response_ids"], row["reveal_step"]) for row in ours] == [([5, 6], [0, 1])]
    assert summary["errors"] == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"trajectory": []}, "trajectory: got 'no steps'"),
        ({"trajectory": [[9, 5, 2], [9, 5]]}, "sequences of [2, 3] tokens"),
        ({"trajectory": [[9], [9]]}, "sequences of [1] tokens"),
        ({"trajectory": [[9, 5, 2], [9, 5, 9999]]}, "ids 2 to 9999"),
        ({"trajectory": [[9, 2, 5]]}, "a position masked to the end"),
        ({"trajectory": [[9, 5, 2], [9, 2, 6], [9, 5, 6]]}, "a position masked again"),
        ({"trajectory": [[9, 5, 2], [9, 6, 7]]}, "a revealed token that changes"),
        ({"trajectory": [[9, 5, 2, 2], [9, 5, 2, 2], [9, 5, 6, 7]]}, "a step without a reveal"),
        ({"trajectory": [[9, 2, 5], [8, 6, 5]]}, "a prompt token that changes"),
        ({"trajectory": [[2, 5, 2], [9, 5, 6]], "prompt_ids": [2]}, "prompt_ids: got 'none that fit"),
        ({"trajectory": [[9, 5, 2], [9, 5, 6]], "final_output": [9, 5, 7]}, "final_output: got 'another sequence'"),
        ({"trajectory": [[9, 5, 2], [9, 5, 6]], "question": None}, "question: got None"),
    ],
)
def test_what_is_no_order_is_refused_with_its_reason(
    tiny_checkpoint: Path, tmp_path: Path, change: TrajectoryRow, reason: str
) -> None:
    good = {"prompt_ids": [9], "question": question_of(1), "trajectory": [[9, 5, 2], [9, 5, 6]]}
    bad = good | {"question": question_of(2)} | change
    source = write_lines(tmp_path / "rows.jsonl", [good, bad])
    values = {"source": str(source), "teacher": str(tiny_checkpoint), "output": str(tmp_path / "out")}
    folder = import_all(values | {"max_error_fraction": 0.5})
    assert [row["response_ids"] for row in read_trajectories(folder).to_pylist()] == [[5, 6]]
    ((number, error),) = rejected(folder)
    assert number == 1 and reason in error and "accepted: " in error


def test_line_that_is_not_json_is_a_refused_row(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [published_row(1, [9])[0]])
    source.write_text(source.read_text() + '{"question": "cut o')
    values = {"source": str(source), "teacher": str(tiny_checkpoint), "output": str(tmp_path / "out")}
    folder = import_all(values | {"max_error_fraction": 0.5})
    ((number, error),) = rejected(folder)
    assert number == 1 and '{"question": "cut o' in error


def test_too_many_refused_rows_stop_before_the_marker(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [published_row(number, [9])[0] for number in range(40)]
    for row in rows[:6]:
        row["trajectory"] = row["trajectory"][:-1]
        row["final_output"] = None
    values = {"source": str(write(tmp_path / "rows.parquet", rows)), "teacher": str(tiny_checkpoint)}
    output = tmp_path / "out"
    with pytest.raises(InputError, match="6 of 40 gave no trajectory, for example: row 1: .* masked to the end"):
        run(build(ImportSettings, {**values, "output": str(output), "max_error_fraction": 0.149}))
    assert not (output / "_SUCCESS").exists()
    import_all({**values, "output": str(output), "max_error_fraction": 0.15})
    assert read_trajectories(output).num_rows == 34
    with pytest.raises(InputError, match="output: .* without a finished run"):
        run(build(ImportSettings, {**values, "output": str(output)}))


def test_repeated_prompt_is_one_row(imported: Callable[..., tuple[list[TrajectoryRow], TrajectoryRow]]) -> None:
    source = [published_row(number, [9])[0] for number in (1, 2, 1, 3)]
    source[3]["final_output"] = [9]
    rows, summary = imported(source, max_error_fraction=0.25)
    assert [row["messages"][0]["content"] for row in rows] == [question_of(1), question_of(2)]
    assert (summary["rows"], summary["duplicates"], summary["errors"]) == (2, 1, 1)


def test_answers_without_trajectories(
    imported: Callable[..., tuple[list[TrajectoryRow], TrajectoryRow]],
    raw: Callable[[str], list[int]],
    templated: Callable[[str], list[int]],
) -> None:
    answers = ["Tom has 7 apples. #### 7", "Tom has 7 apples. #### 7", "#### 3<|eot_id|>", "Tom has apples."]
    references = ["7", "8", None, ""]
    source = [
        {"question": question_of(number), "llm_response": answer, "gt_answer": reference}
        for number, (answer, reference) in enumerate(zip(answers, references, strict=True))
    ]
    rows, summary = imported(source, max_tokens=16)
    ends = [[*raw(answer), EOS] for answer in answers]
    ends[2].pop()  # it brings its own stop token
    assert [row["response_ids"] for row in rows] == [ids + [EOS] * (16 - len(ids)) for ids in ends]
    assert [row["prompt_ids"] for row in rows] == [templated(question_of(number)) for number in range(4)]
    assert [row["answer"] for row in rows] == ["7", "7", "3", None]
    assert [row["is_correct"] for row in rows] == [True, False, None, None]
    assert all(row["reveal_step"] is None and row["forwards"] is None for row in rows)
    assert [row["reference_ids"] for row in rows] == [raw(answer) for answer in answers]
    assert (summary["judged"], summary["correct"]) == (2, 1)


@pytest.mark.parametrize("way", ["own column", "row number", "idx", "question"])
def test_trajectories_keep_the_training_sets_response(
    imported: Callable[..., tuple[list[TrajectoryRow], TrajectoryRow]],
    raw: Callable[[str], list[int]],
    tmp_path: Path,
    way: str,
) -> None:
    """The trajectory gives the order of other tokens; a response that ends itself is cut at its stop token."""
    texts = ["Tom has 7 apples. #### 7", "#### 3<|endoftext|> 4", None, ""]
    published = [published_row(number, raw(question_of(number)))[0] for number in range(4)]
    same = raw("#### 3")
    stopped = [*same, EOS, *[5] * (31 - len(same))]  # the second one's trajectory is its response, and goes on
    published[1] |= {"trajectory": publish([9], stopped, list(range(32))), "prompt_ids": [9], "final_output": None}
    rows = [{"idx": n, "question": question_of(n), "llm_response": text} for n, text in enumerate(texts)]
    if way == "own column":
        chosen = {}
        published = [row | {"llm_response": text} for row, text in zip(published, texts, strict=True)]
    else:
        chosen = {
            "responses": str(tmp_path / "training.parquet"),
            "response_key": "question" if way == "question" else "idx",
        }
        if way == "row number":
            rows = [{name: value for name, value in row.items() if name != "idx"} for row in rows]
        write(tmp_path / "training.parquet", rows if way == "row number" else rows[::-1])
    ours, summary = imported(published, **chosen)
    assert [row["reference_ids"] for row in ours] == [raw(texts[0]), same, None, None]
    assert [row["response_ids"][:8] for row in ours] == [row["trajectory"][-1][-32:][:8] for row in published]
    assert summary["responses"] == {"rows": 2, "same": 1}


@pytest.mark.parametrize(
    ("rows", "key", "reason"),
    [
        ([{"question": question_of(0), "llm_response": "7"}], "idx", "idx: got 1; accepted: one that"),
        ([{"question": question_of(n), "llm_response": "7"} for n in (0, 5)], "idx", "question: got 'Tom has 1 apples"),
        ([{"question": question_of(0), "llm_response": "7"}], "question", "question: got 'Tom has 1 apples"),
        ([{"question": question_of(n), "llm_response": t} for n, t in ((0, "7"), (1, 8))], "idx", "responses: got 8"),
    ],
)
def test_row_without_its_response_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, rows: list[TrajectoryRow], key: str, reason: str
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [published_row(number, [9])[0] for number in range(2)])
    values = {"source": str(source), "responses": str(write_lines(tmp_path / "training.jsonl", rows))}
    values |= {"teacher": str(tiny_checkpoint), "output": str(tmp_path / "out"), "response_key": key}
    folder = import_all(values | {"max_error_fraction": 0.5})
    ((number, error),) = rejected(folder)
    assert number == 1 and error.startswith(reason)
    assert read_trajectories(folder)["reference_ids"].null_count == 0


@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        ([{"idx": 0, "answer": "7"}], {}, "responses: got 'columns idx, answer'; accepted: llm_response"),
        ([{"llm_response": "7"}], {"response_key": "question"}, "responses: got 'columns llm_response'"),
        ([{"idx": 0, "llm_response": "7"}] * 2, {}, "responses: got 'idx 0 twice'"),
        ([], {}, "responses: .*training.jsonl is empty"),
        ([{"idx": 0, "llm_response": "7"}], {"source": "answers.jsonl"}, "responses: .* a training set itself"),
    ],
)
def test_training_sets_that_do_not_fit_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, rows: list[TrajectoryRow], values: dict[str, str], message: str
) -> None:
    write_lines(tmp_path / "rows.jsonl", [published_row(0, [9])[0]])
    write_lines(tmp_path / "answers.jsonl", [{"question": "?", "llm_response": "7"}])
    training = write_lines(tmp_path / "training.jsonl", rows)
    source = tmp_path / values.pop("source", "rows.jsonl")
    values |= {"source": str(source), "responses": str(training), "teacher": str(tiny_checkpoint)}
    with pytest.raises(InputError, match=message):
        run(build(ImportSettings, {**values, "output": str(tmp_path / "out")}))


def test_text_that_cannot_be_written_costs_its_own_row(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [published_row(number, [9])[0] for number in range(6)]
    half = "cut \ud83d"
    rows[1] |= {"question": half}
    rows[2] |= {"llm_response": half}
    rows[3] |= {"gt_answer": half}
    rows[4] |= {"llm_answer": half}
    rows[5] |= {"id": half}
    source = write_lines(tmp_path / "rows.jsonl", rows)
    values = {"source": str(source), "teacher": str(tiny_checkpoint), "output": str(tmp_path / "out")}
    folder = import_all(values | {"max_error_fraction": 1.0})
    assert read_trajectories(folder)["id"].to_pylist() == ["0", "cut \\ud83d"]
    reason = "got half of a surrogate pair at character 4; accepted: text that can be written as UTF-8"
    names = ["question", "llm_response", "gt_answer", "llm_answer"]
    assert rejected(folder) == [(number, f"{name}: {reason}") for number, name in enumerate(names, start=1)]


def test_bytes_that_are_no_text_cost_their_own_row(tiny_checkpoint: Path, tmp_path: Path) -> None:
    table = pa.table({"question": pa.array([b"Tom", b"Tom \xff"]), "llm_response": ["7", "7"]})
    strings = pa.Array.from_buffers(pa.string(), 2, table["question"].chunk(0).buffers())
    pq.write_table(table.set_column(0, "question", strings), tmp_path / "rows.parquet")
    values = {"source": str(tmp_path / "rows.parquet"), "teacher": str(tiny_checkpoint), "max_error_fraction": 0.5}
    folder = import_all({**values, "output": str(tmp_path / "out"), "max_tokens": 16})
    ((number, error),) = rejected(folder)
    assert number == 1 and "text that is not UTF-8" in error and read_trajectories(folder).num_rows == 1


def test_messages_that_the_template_refuses_cost_their_own_row(tiny_checkpoint: Path, tmp_path: Path) -> None:
    teacher = shutil.copytree(tiny_checkpoint, tmp_path / "teacher")
    (teacher / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if 'apples' not in m.content %}"
        "{{ raise_exception('fruit only') }}{% endif %}<|start_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
    )
    rows = [{"question": text, "llm_response": "7"} for text in ("apples", "cars")]
    values = {"source": str(write_lines(tmp_path / "rows.jsonl", rows)), "teacher": str(teacher)}
    folder = import_all({**values, "output": str(tmp_path / "out"), "max_error_fraction": 0.5, "max_tokens": 16})
    ((number, error),) = rejected(folder)
    assert number == 1 and "chat template refuses them: fruit only" in error


def test_split_of_a_snapshot_is_read_from_data(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    (tmp_path / "snapshot" / "README.md").write_text("---\n---\n")
    for number, split in enumerate(("test", "train")):
        rows = [{"question": question_of(number), "llm_response": "7"}]
        write(tmp_path / "snapshot" / "data" / f"{split}-00000-of-00001.parquet", rows)
    values = {"source": str(tmp_path / "snapshot"), "teacher": str(tiny_checkpoint), "max_tokens": 16}
    for number, split in enumerate(("test", "train")):
        folder = import_all({**values, "output": str(tmp_path / split), "split": split})
        assert read_trajectories(folder)["messages"].to_pylist() == [[{"role": "user", "content": question_of(number)}]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forwards": 2}, "has forwards but no reveal_step"),
        ({"reveal_entropy": [0.0, 0.0]}, "has reveal_entropy but no reveal_step"),
        ({"forwards": None, "reveal_step": [0, 1]}, "has reveal_step but no forwards"),
    ],
)
def test_half_an_order_is_refused(change: TrajectoryRow, message: str) -> None:
    unordered = {"prompt_id": "0" * 16, "prompt_ids": [9], "response_ids": [5, 6]}
    check_table(build_table([unordered, {**unordered, "reveal_step": [0, 1], "forwards": 2}]), "test")
    with pytest.raises(InputError, match=message):
        check_table(build_table([unordered, unordered | change]), "test")


def test_answer_that_does_not_fit_the_canvas_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, raw: Callable[[str], list[int]]
) -> None:
    answer = "Tom has 7 apples. #### 7"
    rows = [{"question": question_of(n), "llm_response": text} for n, text in enumerate([answer, "7 " + answer, ""])]
    values = {"source": str(write(tmp_path / "rows.parquet", rows)), "teacher": str(tiny_checkpoint)}
    values |= {"output": str(tmp_path / "out"), "max_error_fraction": 1.0, "max_tokens": len(raw(answer)) + 1}
    folder = import_all(values)
    assert read_trajectories(folder).num_rows == 1
    (long, empty) = rejected(folder)
    assert long[0] == 1 and f"{len(raw(answer)) + 2} tokens, stop token included" in long[1]
    assert empty == (2, "llm_response: got ''; accepted: text")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"rows.parquet": [{"prompt_ids": [1]}]}, "columns prompt_ids.*trajectory .*, or question and llm_response"),
        ({"rows.jsonl": [{"trajectory": [[9, 5]]}]}, "no column question.*retemplate: false"),
        ({"rows.jsonl": [{"question": "a"}], "rows.parquet": [{"question": "a"}]}, "a folder of one kind of files"),
        ({"rows.jsonl": [[1]]}, "JSON Lines, one object a line"),
        ({}, "no data files"),
    ],
)
def test_sources_that_do_not_fit_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, files: dict[str, list[Any]], message: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, rows in files.items():
        (write if name.endswith(".parquet") else write_lines)(source / name, rows)
    values = {"source": str(source), "teacher": str(tiny_checkpoint), "output": str(tmp_path / "out")}
    with pytest.raises(InputError, match=message):
        run(build(ImportSettings, values))
    assert not (tmp_path / "out").exists()


def test_unreadable_files_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    values = {"teacher": str(tiny_checkpoint), "output": str(tmp_path / "out")}
    for name in ("rows.parquet", "rows.arrow", "rows.csv"):
        (tmp_path / name).write_text("neither of them")
        with pytest.raises(InputError, match="^source: "):
            run(build(ImportSettings, {**values, "source": str(tmp_path / name)}))


class Peak(Progress):
    """Traced bytes (Python, numpy, Arrow) at their highest, as seen after every batch."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.bytes = 0

    def update(self, done: int, **figures: float | int | str) -> None:
        self.bytes = max(self.bytes, tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes())


@pytest.mark.parametrize("kind", ["parquet", "lines"])
def test_memory_does_not_grow_with_the_rows(tiny_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    def peak(count: int) -> int:
        rows = [published_row(number, [9] * 32, canvas=96)[0] for number in range(count)]
        name = f"{count}.{'parquet' if kind == 'parquet' else 'jsonl'}"
        source = (write if kind == "parquet" else write_lines)(tmp_path / name, rows)
        del rows
        values = {"source": str(source), "teacher": str(tiny_checkpoint), "output": str(tmp_path / f"out-{count}")}
        progress = Peak()
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        run(build(ImportSettings, values), progress)
        tracemalloc.stop()
        return progress.bytes - before

    # 98 KB a row: 128 rows more are 12.5 MB; ours are 1 KB each.
    assert peak(160) - peak(32) < 3e6
