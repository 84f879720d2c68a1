from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from d3llm_ray.config import build
from d3llm_ray.decoding import Completion, DiffusionLLM, Engine, Event, Request
from d3llm_ray.models import Transformer, save_model
from d3llm_ray.models.families import read_family
from d3llm_ray.trajectories.plan import make_plan
from d3llm_ray.trajectories.prompts import Prompt
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.teacher import Teacher, Verdict, climb, teacher_decoder


class FakeEngine:
    """Finishes a random running request a step; its answer names the prompt and the temperature."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.running: dict[int, Request] = {}
        self.served: list[tuple[int, float]] = []

    def submit(self, request: Request) -> int:
        self.served.append((request.prompt_ids[0], request.temperature))
        self.running[len(self.served)] = request
        return len(self.served)

    def step(self) -> list[Event]:
        request_id = self.rng.choice(list(self.running))
        if self.rng.random() < 0.5:
            return [Event(request_id, [1], 1)]  # progress without a completion
        request = self.running.pop(request_id)
        tokens = [request.prompt_ids[0], round(request.temperature * 10)]
        return [Event(request_id, [], 2, Completion(tokens, "stop", 2, tokens, [0, 1], [0.0, 0.0], [0.0, 0.0]))]


@pytest.mark.parametrize("seed", range(20))
def test_ladder_stops_at_the_first_correct_rung(seed: int) -> None:
    """Prompt p becomes right at rung p (p = 5: never, p = 6: it has no reference)."""
    temperatures = (0.0, 0.1, 0.2, 0.3, 0.4)
    engine = FakeEngine(seed)
    ladders = [[Request([p], temperature=t, seed=10 * p + n) for n, t in enumerate(temperatures)] for p in range(7)]

    def judge(index: int, completion: Completion) -> Verdict:
        prompt, rung = completion.token_ids
        assert prompt == index
        return Verdict(None, None) if index == 6 else Verdict(str(rung), rung == index)

    results = {index: (attempt, verdict) for index, attempt, verdict in climb(engine, ladders, judge)}
    expected_rungs = [0, 1, 2, 3, 4, 4, 0]
    assert [results[p][0].number for p in range(7)] == expected_rungs
    assert [results[p][1].is_correct for p in range(7)] == [True] * 5 + [False, None]
    assert [results[p][0].request.seed for p in range(7)] == [10 * p + n for p, n in enumerate(expected_rungs)]
    # Nothing beyond the rung that stood was decoded, and every rung before it was, once, in order.
    for p, rung in enumerate(expected_rungs):
        assert [t for prompt, t in engine.served if prompt == p] == list(temperatures[: rung + 1])


def test_vanilla_without_early_stop_reveals_one_position_a_forward_block_by_block(tiny_checkpoint: Path) -> None:
    values = {"teacher": str(tiny_checkpoint), "count": 5, "attempts": 1, "early_stop": False, "max_tokens": 48}
    plan = make_plan(build(TrajectorySettings, values))
    for row in Teacher(plan.settings, plan.task).rows(plan.prompts):
        assert sorted(row["reveal_step"]) == list(range(48)) and row["forwards"] == 48
        for block in range(0, 48, 16):
            assert sorted(row["reveal_step"][block : block + 16]) == list(range(block, block + 16))
        assert len(row["response_ids"]) == 48 and 2 not in row["response_ids"]  # no mask left


def test_rows_equal_single_decodings_through_the_public_api(tiny_checkpoint: Path) -> None:
    """A random model answers wrongly, so that every row ends on the last rung, with its own seed."""
    values = {"teacher": str(tiny_checkpoint), "count": 6, "attempts": 2, "temperatures": [0.0, 0.8], "max_tokens": 32}
    plan = make_plan(build(TrajectorySettings, values))
    rows = Teacher(plan.settings, plan.task).rows(plan.prompts)
    llm = DiffusionLLM.from_pretrained(tiny_checkpoint, decoder="vanilla", max_batch_size=1)
    assert any(row["attempt"] == 1 for row in rows)
    for prompt, row in zip(plan.prompts, rows, strict=True):
        (output,) = llm.generate(
            [prompt.messages], max_tokens=32, temperature=row["temperature"], seed=row["seed"], early_stop=True
        )
        assert row["prompt_id"] == prompt.prompt_id
        assert row["prompt_ids"] == output.prompt_ids and row["response_ids"] == output.response_ids
        assert row["reveal_step"] == output.reveal_steps and row["forwards"] == output.forwards
        assert row["reveal_entropy"] == pytest.approx(output.reveal_entropies, abs=1e-5)
        assert row["answer"] == plan.task.extract(output.text)


def test_prompt_beyond_the_context_becomes_an_error_row_and_spares_its_neighbours(tiny_checkpoint: Path) -> None:
    plan = make_plan(build(TrajectorySettings, {"teacher": str(tiny_checkpoint), "count": 2, "attempts": 1}))
    teacher = Teacher(plan.settings, plan.task)
    poison = Prompt("f" * 16, [{"role": "user", "content": "apples " * 300}], "1")
    first, error, last = teacher.rows([plan.prompts[0], poison, plan.prompts[1]])
    assert error["prompt_id"] == "f" * 16 and "exceed the model's context of 256" in error["error"]
    assert [first, last] == teacher.rows(plan.prompts)


@pytest.mark.parametrize(("model_type", "name"), [("llada", "vanilla"), ("Dream", "dparallel")])
def test_every_family_teaches_one_token_a_forward_in_its_own_order(model_type: str, name: str, tmp_path: Path) -> None:
    config = {
        "model_type": model_type, "vocab_size": 30, "mask_token_id": 28, "eos_token_id": 29, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 16, "max_sequence_length": 64,
        "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16,
        "max_position_embeddings": 64,
    }  # fmt: skip
    shape, family = read_family(config, {"block_size": 8})
    torch.manual_seed(0)
    model = Transformer(shape)
    save_model(model, family, tmp_path)
    chosen = teacher_decoder(TrajectorySettings(teacher=str(tmp_path), output=str(tmp_path / "rows"), early_stop=False))
    assert chosen.name == name
    engine = Engine(model.eval(), family, chosen)
    engine.submit(Request([3, 4, 5], 16))
    events = []
    while engine.active or engine.waiting:
        events += engine.step()
    steps = events[-1].completion.reveal_steps
    assert sorted(steps) == list(range(16)) and max(steps[:8]) < min(steps[8:])
