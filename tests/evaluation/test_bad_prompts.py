"""`evaluate` from the command line with a real model: a bad prompt costs its own answer, whatever is bad about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from d3llm_ray.cli import main
from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.tasks import read_problems

GOOD = "Tom has 5 apples. Tom buys 2 more. How many apples does Tom have now?"
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages[0].content }}"
)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "cut emoji \ud83d"}, "half of a surrogate pair"),
    ({"messages": [{"role": "system", "content": "hi"}]}, "no system role"),
    ({"prompt": GOOD + " Sara"}, "NaN or infinite"),
    ({"prompt": "5 " * 300}, "exceed the model's context"),
]


def test_each_kind_of_bad_prompt_costs_its_own_answer(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = DiffusionLLM.from_pretrained(tiny_checkpoint)
    assert llm.tokenizer is not None
    llm.tokenizer.chat_template = TEMPLATE
    (token,) = set(llm.encode(GOOD + " Sara")) - set(llm.encode(GOOD))
    llm.model.embed_tokens.weight.data[token] = float("nan")
    monkeypatch.setattr(DiffusionLLM, "from_pretrained", lambda *_, **__: llm)
    rows = [{"prompt": GOOD}, *(row for row, _ in BAD), {"prompt": "2 + 2?"}]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row | {"reference": "7", "id": f"q{n}"}) + "\n" for n, row in enumerate(rows)))
    words = ["--models", str(tiny_checkpoint), "--decoders", "d3llm", "--tasks", str(file), "--max-tokens", "16"]
    assert main(["evaluate", *words, "--warmup", "6", "--output", str(tmp_path / "report")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    for place, (_, reason) in enumerate(BAD, start=2):
        assert f"problem {place} ('q{place - 1}'): " in said and reason in said
    (samples,) = (tmp_path / "report" / "samples").iterdir()
    lines = pq.read_table(samples).to_pylist()
    (row,) = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert (row["problems"], row["errors"]) == (6, 4)
    alone = llm.generate([GOOD, "2 + 2?"], max_tokens=16)
    assert [(lines[n]["text"], lines[n]["forwards"]) for n in (0, 5)] == [(o.text, o.forwards) for o in alone]
    assert [line["user_id"] for line in lines] == [f"q{n}" for n in range(6)]


def test_python_expands_paths_as_settings_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TASKS", str(tmp_path))
    for name in ("~/test.jsonl", "$TASKS/test.jsonl", "${TASKS}/test.jsonl", Path("~/test.jsonl")):
        assert [problem.messages[0]["content"] for problem in read_problems(name)] == ["a"]
