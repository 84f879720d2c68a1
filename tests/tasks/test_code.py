"""The embedded task of programs: what is asked, read independently, agrees with the tests and the answers."""

from __future__ import annotations

import importlib
import itertools
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d3llm_ray.judging import judge_all, sandbox_reason
from d3llm_ray.models import Ragged, load_model, load_tokenizer
from d3llm_ray.tasks import EMBEDDED, SPLITS, arith, load_task
from d3llm_ray.tasks.code import FAMILIES, problems, vocabulary_texts
from d3llm_ray.tasks.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]
N = r"(\d+)"
# What the sentences mean, apart from the task's own bodies.
MEANING: list[tuple[str, Callable[..., Any]]] = [
    (rf"adds {N} to x\b", lambda n: lambda x: x + n),
    (rf"returns x plus {N}", lambda n: lambda x: x + n),
    (rf"subtracts {N} from x", lambda n: lambda x: x - n),
    (rf"returns x minus {N}", lambda n: lambda x: x - n),
    (rf"multiplies x by {N} and then adds {N}", lambda m, n: lambda x: m * x + n),
    (rf"returns {N} plus {N} times x", lambda n, m: lambda x: m * x + n),
    (rf"multiplies x by {N}", lambda n: lambda x: x * n),
    (rf"returns {N} times x", lambda n: lambda x: x * n),
    (rf"sum of x and y minus {N}|adds x and y and subtracts {N}", lambda n: lambda x, y: x + y - n),
    (rf"product of x and y plus {N}", lambda n: lambda x, y: x * y + n),
    (rf"adds {N} to each of the items|all items plus {N}", lambda n: lambda items: list(map(lambda i: i + n, items))),
    (rf"each of the items by {N}|all items times {N}", lambda n: lambda items: list(map(lambda i: i * n, items))),
    (rf"larger than {N}|items above {N}", lambda n: lambda items: list(filter(lambda i: i > n, items))),
    (rf"sum of the items plus {N}", lambda n: lambda items: n + sum(items)),
    (rf"largest of the items minus {N}", lambda n: lambda items: sorted(items)[-1] - n),
    (rf"leaves out the first {N} items|after the first {N}", lambda n: lambda items: [*itertools.islice(items, n, 99)]),
    (rf"repeats the text {N} times", lambda n: lambda text: "".join([text] * n)),
    (rf"puts (\w+) after the text {N} times", lambda w, n: lambda text: text + "".join([w] * int(n))),
    (rf"repeats (\w+) {N} times behind the text", lambda w, n: lambda text: text + "".join([w] * int(n))),
    (rf"puts (\w+) before the text without its first {N}", lambda w, n: lambda text: w + "".join(list(text)[int(n) :])),
    (r"in upper case, followed by (\w+)", lambda w: lambda text: "".join(c.upper() for c in text) + w),
    (rf"length of the text plus {N}", lambda n: lambda text: sum(1 for _ in text) + n),
]  # fmt: skip


def meaning(question: str) -> Callable[..., Any]:
    for pattern, build in MEANING:
        if match := re.search(pattern, question):
            groups = [group for group in match.groups() if group is not None]
            return build(*(int(group) if group.isdigit() else group for group in groups))
    raise AssertionError(question)


@pytest.mark.parametrize("split", SPLITS)
def test_tests_and_answers_agree_with_the_question(split: Any) -> None:
    rng, families = random.Random(1), set()
    for problem in itertools.islice(problems(split), 300):
        families.add(problem.family)
        exec(problem.tests, {problem.name: meaning(problem.question)})
        space: dict[str, Any] = {}
        exec(re.sub(r"```\w*|Here it is:", "", problem.solution(rng)), space)
        exec(problem.tests, space)
        assert problem.tests.count("assert") == 4
    assert set(FAMILIES) - families <= {"drop"}  # there are four of its kind, none in the validation split


@pytest.mark.skipif(sandbox_reason() is not None, reason=f"no sandbox: {sandbox_reason()}")
def test_the_judge_agrees() -> None:
    task, rng = load_task("code"), random.Random(1)
    some = list(itertools.islice(problems("test"), 10))
    references = {p.messages[0]["content"]: p.reference for p in task.problems("test", 10)}
    answers = [(p.solution(rng), references[p.question] or "") for p in some if p.question in references]
    assert len(answers) >= 8 and all(judge_all(task.judge, answers))
    swapped = [(text, reference) for (text, _), (_, reference) in itertools.pairwise(answers)]
    assert not any(judge_all(task.judge, swapped))


def test_splits_are_disjoint_by_what_is_computed() -> None:
    bodies: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for p in itertools.islice(problems(split), 2000):
            bodies[split].add(FAMILIES[p.family].bodies[0].format(n=p.n, m=p.m, word=p.word))
    for one, other in itertools.combinations(bodies.values(), 2):
        assert not one & other


def test_problems_are_reproducible_and_distinct() -> None:
    one, two = EMBEDDED["code"].problems("test", 200), EMBEDDED["code"].problems("test", 500)
    assert one == two[:200] and len({problem.messages[0]["content"] for problem in two}) == 500


def test_a_tokenizer_gives_every_text_back() -> None:
    tokenizer, rng = build_tokenizer(vocabulary_texts()), random.Random(2)
    for problem in itertools.islice(problems("train"), 1000):
        for text in (problem.question, problem.solution(rng)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
            assert len(ids) < 48


def test_the_corpus_holds_both_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    corpus = importlib.import_module("pretraining.corpus").Corpus(0, 3, ("arith", "code"))
    losses = importlib.import_module("pretraining.losses")
    answers = []
    for _ in range(200):
        example = corpus.example(0)
        answers.append(corpus.tokenizer.decode(example.response))
        mask, target = losses.targeted_mask(example, 64)
        assert mask[target] and target < len(example.response)
        if "def " in answers[-1]:  # what a function is called, and its numbers and words
            name, _, body = answers[-1].partition("def ")[2].partition("(")
            told = [corpus.tokenizer.decode([example.response[at]]).strip() for at in example.targets]
            numbers = [word for word in body.replace("[", " ").replace(":", " ").split() if word.strip("]").isdigit()]
            assert told[0] == name and {word.strip("]") for word in numbers} <= {word.strip("[") for word in told}
        assert corpus.tokenizer.unk_token_id not in [*example.prompt, *example.response]
    programs = sum("def " in answer for answer in answers)
    assert 60 < programs < 140 and sum("####" in answer for answer in answers) == 200 - programs


def test_words_that_a_model_knows_keep_their_meaning_beside_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `tiny-llada` says of a sum is what it says with the words of programs added, at their new numbers."""
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    with_vocabulary = importlib.import_module("pretraining.vocabulary").with_vocabulary
    model, family = load_model("tiny-llada")
    have = load_tokenizer("tiny-llada", family)
    want = build_tokenizer([*arith.vocabulary_texts(), *vocabulary_texts()])
    assert have is not None and len(want) > len(have)
    more = with_vocabulary(model, have, want)
    text, logits = "Tom has 3 apples. Tom buys 4 more. <|mdm_mask|>", []
    for tokenizer, network in ((have, model), (want, more)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        of_words = network.logits(network(torch.tensor(ids), Ragged.build([len(ids)])))
        logits.append(of_words[:, [tokenizer.get_vocab()[word] for word in sorted(have.get_vocab())]])
    assert torch.equal(*logits)
    assert with_vocabulary(model, have, have) is model


@pytest.mark.slow
def test_a_few_steps_of_tiny_coder(tmp_path: Path) -> None:
    small = "--hidden-size 16 --num-layers 1 --num-heads 2 --intermediate-size 16 --batch 4 --accumulate 1 --facts 2"
    steps = "--causal-steps 2 --adapt-steps 2 --device cpu"
    script = [sys.executable, str(ROOT / "jobs" / "pretrain_tiny.py"), "--output", str(tmp_path / "runs")]
    done = subprocess.run(
        [*script, "--tasks", "arith,code", *small.split(), *steps.split()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert {"tiny-coder", "tiny-coder-ar"} <= {path.name for path in (tmp_path / "runs").iterdir()}
    refused = subprocess.run([*script, "--tasks", "code"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "accepted: arith, then any of code" in refused.stderr
