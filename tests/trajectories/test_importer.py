from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d3llm_ray.config import build
from d3llm_ray.errors import InputError
from d3llm_ray.models import encode_chat, load_tokenizer, read_configs
from d3llm_ray.trajectories import read_trajectories
from d3llm_ray.trajectories.importer import ImportSettings, reveal_steps, run

MASK = 2  # the embedded tokenizer's mask token


def publish(prompt: list[int], response: list[int], order: list[int], mask: int = MASK) -> list[list[int]]:
    """The published encoding, written from its description: the whole sequence after each reveal."""
    sequence, trajectory = prompt + [mask] * len(response), []
    for position in order:
        sequence = list(sequence)
        sequence[len(prompt) + position] = response[position]
        trajectory.append(sequence)
    return trajectory


def published_row(number: int, canvas: int = 32) -> tuple[dict[str, Any], list[int]]:
    rng = random.Random(number)
    prompt = [rng.randrange(10, 90) for _ in range(rng.randrange(3, 9))]
    response = [rng.randrange(10, 90) for _ in range(canvas)]
    order = [block + i for block in range(0, canvas, 8) for i in rng.sample(range(8), 8)]
    row = {
        "idx": number,
        "question": f"Tom has {number} apples. How many apples does Tom have now?",
        "prompt_ids": prompt,
        "trajectory": publish(prompt, response, order),
        "final_output": prompt + response,
        "llm_answer": "7",
        "gt_answer": "7" if number % 2 else "",
        "is_correct": True,
    }
    return row, order


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_hand_made_trajectory() -> None:
    assert reveal_steps([[9, 5, 2, 2], [9, 5, 2, 7], [9, 5, 6, 7]], 1, mask_id=2) == ([5, 6, 7], [0, 2, 1])


@pytest.mark.parametrize("retemplate", [True, False])
def test_round_trip(tiny_checkpoint: Path, tmp_path: Path, retemplate: bool) -> None:
    published = [published_row(number) for number in range(40)]
    source = write(tmp_path / "published.parquet", [row for row, _ in published])
    values = {"source": str(source), "teacher": str(tiny_checkpoint), "output": str(tmp_path / "out")}
    table = read_trajectories(run(build(ImportSettings, {**values, "retemplate": retemplate})))
    assert table.num_rows == 40
    tokenizer = load_tokenizer(tiny_checkpoint, read_configs(tiny_checkpoint)[1])
    assert tokenizer is not None
    for row, (original, order) in zip(table.to_pylist(), published, strict=True):
        assert row["response_ids"] == original["final_output"][len(original["prompt_ids"]) :]
        assert [row["reveal_step"][position] for position in order] == list(range(32))
        templated = encode_chat(tokenizer, [{"role": "user", "content": original["question"]}])
        assert row["prompt_ids"] == (templated if retemplate else original["prompt_ids"])
        judged = bool(original["gt_answer"])
        assert (row["reference"], row["is_correct"]) == (("7", True) if judged else (None, None))
        assert row["forwards"] == 32 and row["seed"] is None and row["reveal_entropy"] is None


@pytest.mark.parametrize(
    ("trajectory", "message"),
    [
        ([], "0 steps"),
        ([[9, 5], [9, 5, 6]], "sequences of [2, 3] tokens"),
        ([[9]], "no token behind the prompt"),
        ([[9, 2, 5]], "a position masked to the end"),
        ([[9, 5, 2], [9, 2, 6], [9, 5, 6]], "a position masked again"),
    ],
)
def test_malformed_trajectories_are_named(trajectory: list[list[int]], message: str) -> None:
    with pytest.raises(InputError) as caught:
        reveal_steps(trajectory, 1, mask_id=2)
    assert message in str(caught.value)


def test_few_malformed_rows_are_listed_and_many_stop_the_import(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [published_row(number)[0] for number in range(40)]
    rows[7]["trajectory"] = rows[7]["trajectory"][:-1]
    values = {"teacher": str(tiny_checkpoint), "source": str(write(tmp_path / "few.parquet", rows))}
    folder = Path(run(build(ImportSettings, {**values, "output": str(tmp_path / "few")})))
    assert read_trajectories(folder).num_rows == 39
    assert [json.loads(line)["row"] for line in (folder / "errors.jsonl").read_text().splitlines()] == [7]
    for row in rows[:5]:
        row["trajectory"] = row["trajectory"][:-1]
    values["source"] = str(write(tmp_path / "many.parquet", rows))
    with pytest.raises(InputError, match="6 of 40 could not be decoded"):
        run(build(ImportSettings, {**values, "output": str(tmp_path / "many")}))
    assert not (tmp_path / "many").exists()


def test_source_without_trajectories_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "other.parquet", [{"prompt_ids": [1]}])
    values = {"source": str(source), "teacher": str(tiny_checkpoint), "output": str(tmp_path / "out")}
    with pytest.raises(InputError, match="a dataset with a column 'trajectory'"):
        run(build(ImportSettings, values))
