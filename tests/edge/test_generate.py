"""The verb `generate`: a bad prompt costs its own answer, and every answer comes back under the user's id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d3llm_ray.cli import main
from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.errors import InputError
from d3llm_ray.models import load_model
from d3llm_ray.tasks.files import read_problems

GOOD = "Tom has 5 apples. Tom buys 2 more. How many apples does Tom have now?"
HALF = {"prompt": "cut emoji \ud83d"}
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}hi"
FAILING = REFUSING.replace("raise_exception('no system role')", "1 / 0")


def generate(folder: Path, rows: list[dict[str, Any]], *words: str) -> tuple[int, list[dict[str, Any]]]:
    """(exit code, lines of the answers) of the verb on these rows of JSON Lines."""
    file, output = folder / "prompts.jsonl", folder / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = main(["generate", "--prompts", str(file), "--output", str(output), "--max-tokens", "16", *words])
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    return code, [json.loads(line) for line in lines]


@pytest.fixture
def model_of(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the verb load this model, with a chat template or a broken token of a test's own."""
    real = DiffusionLLM.from_pretrained

    def use(template: str | None = None, broken_text: str | None = None) -> DiffusionLLM:
        llm = real(tiny_checkpoint)
        assert llm.tokenizer is not None
        if template is not None:
            llm.tokenizer.chat_template = template
        if broken_text is not None:
            (token,) = set(llm.encode(GOOD + broken_text)) - set(llm.encode(GOOD))
            llm.model.embed_tokens.weight.data[token] = float("nan")
        monkeypatch.setattr(DiffusionLLM, "from_pretrained", lambda *_, **__: llm)
        return llm

    return use


@pytest.mark.parametrize(
    ("bad", "options", "reason"),
    [
        (HALF, {}, "half of a surrogate pair"),
        ({"prompt": "5 " * 300}, {}, "exceed the model's context"),
        ({"messages": [{"role": "system", "content": "hi"}]}, {"template": REFUSING}, "no system role"),
        (
            {"messages": [{"role": "system", "content": "hi"}]},
            {"template": FAILING},
            "division by zero",
        ),
        ({"prompt": GOOD + " Sara"}, {"broken_text": " Sara"}, "NaN or infinite"),
    ],
)
def test_a_bad_prompt_costs_its_own_answer_and_is_named(
    bad: dict[str, Any],
    options: dict[str, str],
    reason: str,
    model_of: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    llm = model_of(**options)
    rows = [{"prompt": GOOD, "id": "a"}, bad | {"id": "b"}, {"prompt": "2 + 2?", "id": 3}]
    code, lines = generate(tmp_path, rows)
    said = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert said.startswith("d3llm-ray: prompts: 1 of 3 not answered") and "row 2: " in said and reason in said
    assert [line["id"] for line in lines] == ["a", "b", 3]
    assert lines[1].keys() == {"id", "error"} and reason in lines[1]["error"]
    alone = llm.generate([GOOD, "2 + 2?"], max_tokens=16)
    assert [lines[0]["token_ids"], lines[2]["token_ids"]] == [output.token_ids for output in alone]
    assert "error" not in lines[0]


def test_one_prompt_alone_ends_in_one_line(model_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model_of(broken_text=" Sara")
    assert main(["generate", "--prompt", "cut \ud83d"]) == 2
    assert main(["generate", "--prompt", GOOD + " Sara"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "half of a surrogate pair" in said[0] and "NaN or infinite" in said[1]


def test_python_raises_unless_told_otherwise(tiny_checkpoint: Path) -> None:
    llm = DiffusionLLM.from_pretrained(tiny_checkpoint)
    prompts = [GOOD, HALF["prompt"]]
    with pytest.raises(InputError, match=r"^prompts\[1\]: messages.0: .* half of a surrogate pair"):
        llm.generate(prompts, max_tokens=8)
    with pytest.raises(InputError, match="^errors: got 'ignore'"):
        llm.generate(prompts, max_tokens=8, errors="ignore")  # type: ignore[arg-type]
    answered, failed = llm.generate(prompts, max_tokens=8, errors="return")
    assert answered == llm.generate([GOOD], max_tokens=8)[0] and answered.error is None
    assert failed.error is not None and failed.finish_reason == "error"


def test_ids_come_back_as_they_are(model_of: Any, tmp_path: Path) -> None:
    model_of()
    ids = ["row-1", 7, 0.5, "\ud83d", "\U0001f600", ""]
    code, lines = generate(tmp_path, [{"prompt": GOOD, "id": name} for name in ids])
    assert code == 0
    assert [line["id"] for line in lines] == ids
    hashed = read_problems(tmp_path / "prompts.jsonl")[0].id
    code, lines = generate(tmp_path, [{"prompt": GOOD}, {"prompt": GOOD, "id": None}, {"prompt": GOOD, "id": True}])
    assert [line["id"] for line in lines] == [hashed] * 3


def test_ids_of_parquet_and_of_twins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "id": [5, 6, None], "other": [1, 2, 3]}), file)
    problems = read_problems(file)
    assert [problem.user_id for problem in problems] == [5, 6, None]
    code, lines = generate(tmp_path, [{"prompt": "a", "id": 1}, {"prompt": "b"}, {"prompt": "c", "id": 1}])
    assert (code, lines) == (2, [])
    assert "rows 1 and 3 have the id 1" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--decoder", "d3llm", "--model", "tiny-ar"], ["--device", "cuda:99"]])
def test_what_does_not_fit_is_refused_before_any_weight_is_read(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"{DiffusionLLM.__module__}.{load_model.__name__}", lambda *_: pytest.fail("weights are read"))
    assert generate(tmp_path, [{"prompt": "a"}], *words) == (2, [])
    assert words[0][2:] in capsys.readouterr().err
