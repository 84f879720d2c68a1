"""The prompts of published tasks are those of lm-eval, letter by letter, on the real data."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from d3llm_ray.tasks import Problem, load_task

DATA = Path(__file__).parents[3] / "shared" / "benchmarks"
PACKAGE = importlib.util.find_spec("lm_eval")
pytestmark = [
    pytest.mark.skipif(PACKAGE is None, reason="lm-eval is not installed"),
    pytest.mark.skipif(not DATA.is_dir(), reason="the benchmarks are not here (../shared/benchmarks)"),
]
ALL = 10_000


class Reader(yaml.SafeLoader):
    """Reads a task's YAML file; a function that it names is not imported: it may ask the Hub."""


Reader.add_constructor("!function", lambda loader, node: f"{node.value}")


def rows(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").split("\n") if line]


def functions(file: Path, *names: str) -> list[Any]:
    """Some functions of a module, without what else it imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    found: dict[str, Any] = {}
    exec(compile(tree, str(file), "exec"), found)
    return [found[name] for name in names]


def read(path: Path) -> dict[str, Any]:
    """A task's YAML file on top of the one that it includes."""
    config: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Reader)
    included = config.pop("include", None)
    return (read(path.with_name(included)) if included else {}) | config


def harness(file: str, data: dict[str, list[dict[str, Any]]], shots: int) -> Any:
    """lm-eval's own task of one of its YAML files, on rows of ours, for its prompts alone."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    assert PACKAGE is not None and PACKAGE.origin is not None
    path = Path(PACKAGE.origin).parent / "tasks" / file
    config = read(path)
    for key in ("metric_list", "filter_list", "process_docs", "process_results", "tag", "unsafe_code", "metadata"):
        config.pop(key, None)
    utils = path.with_name("utils.py")
    if utils.is_file() and "samples" in config.get("fewshot_config", {}):
        config["fewshot_config"]["samples"] = functions(utils, "list_fewshot_samples")[0]()
    if config["doc_to_text"] == "utils.doc_to_text":
        config["doc_to_text"] = functions(utils, "doc_to_text")[0]
    splits = {split: datasets.Dataset.from_list(found) for split, found in data.items()}
    config |= {"num_fewshot": shots, "custom_dataset": lambda **_: splits, "metric_list": [{"metric": "exact_match"}]}
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(1234)  # the default of `lm-eval run`
    return task


def messages_as_they_are(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    return json.dumps([{"role": one["role"], "content": one["content"]} for one in messages])


def rendered(task: Any, multiturn: bool, chat: bool) -> list[str]:
    """What lm-eval gives the model for every row, in the order of a run in one process."""
    return [
        task.fewshot_context(
            row,
            task.config.num_fewshot,
            apply_chat_template=chat,
            fewshot_as_multiturn=multiturn,
            chat_template=messages_as_they_are if chat else None,
            gen_prefix=task.doc_to_prefix(row),
        )
        for row in task.test_docs()
    ]


def ours(problem: Problem, chat: bool) -> str:
    if not chat:
        assert problem.text is not None
        return problem.text + problem.prefix
    assert problem.text is None
    begun = [{"role": "assistant", "content": problem.prefix}] if problem.prefix else []
    return messages_as_they_are([*problem.messages, *begun])


def gsm8k() -> dict[str, list[dict[str, Any]]]:
    return {"test": rows("gsm8k_test.jsonl"), "train": rows("gsm8k_train.jsonl")}


def math500() -> dict[str, list[dict[str, Any]]]:
    return {name: [row | {"few_shot": None} for row in rows("math500.jsonl")] for name in ("test", "train")}


def humaneval() -> dict[str, list[dict[str, Any]]]:
    return {"test": rows("humaneval.jsonl")}


def mbpp() -> dict[str, list[dict[str, Any]]]:
    return {"test": [row for row in rows("mbpp.jsonl") if 11 <= row["task_id"] <= 510]}


CASES: dict[str, tuple[str, Callable[[], dict[str, list[dict[str, Any]]]], int, bool, int]] = {
    "gsm8k": ("gsm8k/gsm8k-cot-zeroshot.yaml", gsm8k, 0, True, 1319),
    "gsm8k-raw": ("gsm8k/gsm8k-cot-zeroshot.yaml", gsm8k, 0, False, 1319),
    "gsm8k-1shot": ("gsm8k/gsm8k-cot.yaml", gsm8k, 1, True, 1319),
    "long-gsm8k": ("gsm8k/gsm8k.yaml", gsm8k, 5, True, 1319),
    "long-gsm8k-raw": ("gsm8k/gsm8k.yaml", gsm8k, 5, False, 1319),
    "math500": ("minerva_math/minerva_math_algebra.yaml", math500, 0, True, 500),
    "math500-raw": ("minerva_math/minerva_math_algebra.yaml", math500, 4, False, 500),
    "humaneval-raw": ("humaneval/humaneval.yaml", humaneval, 0, False, 164),
    "humaneval-instruct": ("humaneval/humaneval_instruct.yaml", humaneval, 0, True, 164),
    "mbpp": ("mbpp/mbpp.yaml", mbpp, 3, True, 500),
    "mbpp-raw": ("mbpp/mbpp.yaml", mbpp, 3, False, 500),
    "mbpp-instruct": ("mbpp/mbpp_instruct.yaml", mbpp, 0, True, 500),
}
STOPS_OF_THEIR_OWN = {"mbpp-instruct"}  # lm-eval 0.4.13 has none; the published evaluation ends at the fence


def compare(name: str, count: int) -> None:
    file, data, shots, chat, _ = CASES[name]
    found = data()
    theirs = harness(file, found | {"test": found["test"][:count]}, shots)
    task = load_task(name, DATA)
    problems = task.problems("test", count)
    assert [ours(problem, chat) for problem in problems] == rendered(theirs, name == "gsm8k-1shot", chat)
    if name not in STOPS_OF_THEIR_OWN:
        assert list(task.stop) == theirs.config.generation_kwargs["until"]


@pytest.mark.parametrize("name", CASES)
def test_prompts_and_stop_strings_are_those_of_lm_eval(name: str) -> None:
    compare(name, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_all_prompts_are_those_of_lm_eval(name: str) -> None:
    compare(name, CASES[name][-1])
    assert len(load_task(name, DATA).problems("test", ALL)) == CASES[name][-1]
