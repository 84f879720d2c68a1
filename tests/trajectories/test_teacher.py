from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from d3llm_ray.config import build
from d3llm_ray.decoding import Completion, DiffusionLLM, Engine, Event, Request
from d3llm_ray.errors import InputError
from d3llm_ray.models import Transformer, save_model
from d3llm_ray.models.families import Family, read_family
from d3llm_ray.trajectories.plan import make_plan, teacher_decoder
from d3llm_ray.trajectories.prompts import Prompt
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.teacher import Ladders, Outcome, Teacher, Verdict

TEMPERATURES = (0.0, 0.1, 0.2, 0.3, 0.4)


class FakeEngine:
    """Finishes a random running request a step; its answer names the prompt and the temperature. Prompt 7 breaks."""

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
        if request.prompt_ids[0] == 7:
            return [Event(request_id, [], 2, error="the logits are NaN")]
        tokens = [request.prompt_ids[0], round(request.temperature * 10)]
        return [Event(request_id, [], 2, Completion(tokens, "stop", 2, tokens, [0, 1], [0.0, 0.0], [0.0, 0.0]))]


@pytest.mark.parametrize("seed", range(20))
def test_ladder_stops_at_the_first_correct_rung(seed: int) -> None:
    """Prompt p becomes right at rung p (5: never, 6: it has no reference, 7: NaN logits, 8: its judge raises)."""
    engine = FakeEngine(seed)

    def judge(prompt: int, completion: Completion) -> Verdict:
        answered, rung = completion.token_ids
        assert answered == prompt
        if prompt == 8:
            raise ZeroDivisionError("no number here")
        return Verdict(None, None) if prompt == 6 else Verdict(str(rung), rung == prompt)

    ladders: Ladders[int] = Ladders(engine, judge)
    outcomes: dict[int, Outcome[int]] = {}
    for p in range(9):  # prompts join while others run
        ladders.submit(p, [Request([p], temperature=t, seed=10 * p + n) for n, t in enumerate(TEMPERATURES)])
        outcomes.update((outcome.key, outcome) for outcome in ladders.step())
    while engine.running:
        for outcome in ladders.step():
            assert outcome.key not in outcomes
            outcomes[outcome.key] = outcome
    assert len(outcomes) == 9
    expected_rungs = [0, 1, 2, 3, 4, 4, 0]
    attempts = [outcomes[p].attempt for p in range(7)]
    assert [attempt.number for attempt in attempts] == expected_rungs
    assert [outcomes[p].verdict.is_correct for p in range(7)] == [True] * 5 + [False, None]
    assert [attempt.request.seed for attempt in attempts] == [10 * p + n for p, n in enumerate(expected_rungs)]
    assert outcomes[7].error == "the logits are NaN"
    assert outcomes[8].error == "ZeroDivisionError: no number here"
    # Nothing beyond the rung that stood was decoded, and every rung before it was, once, in order.
    for p, rung in enumerate([*expected_rungs, 0, 0]):
        assert [t for prompt, t in engine.served if prompt == p] == list(TEMPERATURES[: rung + 1])


def test_vanilla_teacher_reveals_one_position_a_forward_block_by_block_to_the_end(tiny_checkpoint: Path) -> None:
    values = {"teacher": str(tiny_checkpoint), "count": 5, "attempts": 1, "max_tokens": 48}
    plan = make_plan(build(TrajectorySettings, values))
    for row in Teacher(plan.settings, plan.source.task).rows(list(plan.prompts())):
        assert sorted(row["reveal_step"]) == list(range(48)) and row["forwards"] == 48
        for block in range(0, 48, 16):
            assert sorted(row["reveal_step"][block : block + 16]) == list(range(block, block + 16))
        assert len(row["response_ids"]) == 48 and 2 not in row["response_ids"]  # no mask left


def test_rows_equal_single_decodings_through_the_public_api(tiny_checkpoint: Path) -> None:
    """A random model answers wrongly, so that every row ends on the last rung, with its own seed."""
    values = {"teacher": str(tiny_checkpoint), "count": 6, "attempts": 2, "temperatures": [0.0, 0.8], "max_tokens": 32}
    plan = make_plan(build(TrajectorySettings, values))
    rows = Teacher(plan.settings, plan.source.task).rows(list(plan.prompts()))
    llm = DiffusionLLM.from_pretrained(tiny_checkpoint, decoder="vanilla", max_batch_size=1)
    assert any(row["attempt"] == 1 for row in rows)
    for prompt, row in zip(plan.prompts(), rows, strict=True):
        (output,) = llm.generate([prompt.messages], max_tokens=32, temperature=row["temperature"], seed=row["seed"])
        assert row["prompt_id"] == prompt.prompt_id
        assert row["prompt_ids"] == output.prompt_ids and row["response_ids"] == output.response_ids
        assert row["reveal_step"] == output.reveal_steps and row["forwards"] == output.forwards
        assert row["reveal_entropy"] == pytest.approx(output.reveal_entropies, abs=1e-5)
        assert row["answer"] == plan.source.task.extract(output.text)


def test_prompt_beyond_the_context_becomes_an_error_row_and_spares_its_neighbours(tiny_checkpoint: Path) -> None:
    plan = make_plan(build(TrajectorySettings, {"teacher": str(tiny_checkpoint), "count": 2, "attempts": 1}))
    teacher = Teacher(plan.settings, plan.source.task)
    poison = Prompt(9, "f" * 16, [{"role": "user", "content": "apples " * 300}], "1", "mine")
    before, after = plan.prompts()
    first, error, last = teacher.rows([before, poison, after])
    reason = error.pop("error")
    assert error == {"row": 9, "prompt_id": "f" * 16, "messages": poison.messages, "reference": "1", "id": "mine"}
    assert "exceed the model's context of 256" in reason
    assert [first, last] == teacher.rows([before, after])


def tiny_family(model_type: str, folder: Path) -> tuple[Transformer, Family]:
    config = {
        "model_type": model_type, "vocab_size": 30, "mask_token_id": 28, "eos_token_id": 29, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "d_model": 16, "n_heads": 2, "n_layers": 1, "mlp_hidden_size": 16, "max_sequence_length": 64,
        "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16,
        "max_position_embeddings": 64, "bd_size": 8,
    }  # fmt: skip
    shape, family = read_family(config, {"block_size": 8})
    torch.manual_seed(0)
    model = Transformer(shape).eval()
    save_model(model, family, folder)
    return model, family


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("llada", "vanilla"), ("Dream", "dparallel"), ("Fast_dLLM_Qwen", "fast-dllm-v2"), ("qwen2", "autoregressive")],
)
def test_every_family_teaches_one_token_a_forward_in_its_own_order(model_type: str, name: str, tmp_path: Path) -> None:
    model, family = tiny_family(model_type, tmp_path)
    chosen = teacher_decoder(TrajectorySettings(teacher=str(tmp_path)), family)
    assert chosen.name == name
    engine = Engine(model, family, chosen)
    engine.submit(Request([3, 4, 5, 6, 7, 8, 9, 10], 16, ignore_eos=True))
    events = []
    while engine.active or engine.waiting:
        events += engine.step()
    steps = events[-1].completion.reveal_steps
    assert len(set(steps)) == 16 and max(steps[:8]) < min(steps[8:])


def test_teacher_may_reveal_several_tokens_a_forward_or_use_a_cached_decoder(tmp_path: Path) -> None:
    _, family = tiny_family("llada", tmp_path)
    few = teacher_decoder(TrajectorySettings(decoder_settings={"steps": 4, "block_size": 8}), family)
    assert (few.name, few.settings()["steps"], few.block_size) == ("vanilla", 4, 8)
    assert teacher_decoder(TrajectorySettings(decoder="fast-dllm-dual"), family).caching.uses_cache
    (tmp_path / "mine.yaml").write_text("decoder: d3llm\nentropy_threshold: 0.1\n")
    mine = teacher_decoder(TrajectorySettings(decoder=str(tmp_path / "mine.yaml")), family)
    assert (mine.name, mine.settings()["entropy_threshold"], mine.early_stop) == ("d3llm", 0.1, False)
    with pytest.raises(InputError, match="steps: no setting of decoder 'fast-dllm-dual'"):
        teacher_decoder(TrajectorySettings(decoder="fast-dllm-dual", decoder_settings={"steps": 4}), family)
    with pytest.raises(InputError, match="'autoregressive' cannot decode a 'llada' model"):
        teacher_decoder(TrajectorySettings(decoder="autoregressive"), family)


@pytest.mark.parametrize(
    ("written", "given", "early_stop"),
    [
        ("decoder: vanilla", {}, False),
        ("decoder: d3llm", {}, False),
        ("decoder: vanilla\nearly_stop: false", {}, False),
        ("decoder: vanilla\nearly_stop: false", {"early_stop": True}, True),
        ("decoder: vanilla\nearly_stop: true", {"early_stop": False}, False),
        ("decoder: vanilla\nearly_stop: true", {}, True),
        (None, {}, False),
        (None, {"early_stop": True}, True),
    ],
)
def test_a_row_fills_its_canvas_unless_settings_or_file_say_otherwise(
    written: str | None, given: dict[str, bool], early_stop: bool, tmp_path: Path
) -> None:
    _, family = tiny_family("llada", tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(written or "")
    for name in ["vanilla", "d3llm"] if written is None else [str(file)]:
        assert (
            teacher_decoder(TrajectorySettings(decoder=name, decoder_settings=given), family).early_stop == early_stop
        )


def test_cheap_teacher_reveals_as_many_a_forward_as_it_was_told(tiny_checkpoint: Path) -> None:
    values = {"teacher": str(tiny_checkpoint), "count": 3, "attempts": 1}
    values |= {"decoder_settings": {"steps": 8}}
    plan = make_plan(build(TrajectorySettings, {**values, "max_tokens": 32}))
    assert plan.metadata["decoder"]["steps"] == 8
    for row in Teacher(plan.settings, plan.source.task).rows(list(plan.prompts())):
        assert row["forwards"] == 8 and sorted(row["reveal_step"]) == [step for step in range(8) for _ in range(4)]
