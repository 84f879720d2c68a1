"""Every parameter of every objective has a value of its own here, and figures by hand that it alone leads to.

A new parameter needs a line in `EFFECTS`: its value, what is looked at, and the figure without and with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from d3llm_ray.distillation.objectives import (
    OBJECTIVES,
    BlockDiffusion,
    DiscreteForcing,
    Moment,
    Objective,
    PseudoTrajectory,
)
from d3llm_ray.distillation.objectives.batches import TrainingSample, pack
from d3llm_ray.distillation.objectives.corruption import Draws
from tests.distillation.toys import family_of

MASK = 4
FIRST = Moment(epoch=0, in_epoch=0, steps_per_epoch=2, step=0, steps=4)
# Position 0 was revealed last, then 2, 3 and 1: the order of the masks is 0, 2, 3, 1.
SAMPLE = TrainingSample("row", np.array([1, 2], "int32"), np.array([1, 2, 3, 1], "int32"), np.array([3, 0, 2, 1]))


class Lowest:
    """A generator whose every draw is the lowest: the first window, the smallest ratio."""

    share = 0.0

    def integers(self, *_: Any) -> int:
        return 0

    def random(self, size: int | None = None) -> Any:
        return self.share if size is None else np.full(size, self.share)

    def uniform(self, low: float, high: float) -> float:
        return low + self.share * (high - low)

    def permutation(self, values: Any) -> Any:
        return np.roll(values, 1)

    def choice(self, values: Any) -> Any:
        return values[0]


class Highest(Lowest):
    """One whose every draw is the highest."""

    share = 1.0


def masked(objective: Objective, moment: Moment | None = FIRST, rng: type[Lowest] = Lowest) -> list[int]:
    """Positions of the answer that the first view hides and has to predict."""
    draws = Draws(rng(), rng())  # type: ignore[arg-type]
    view = objective.views(draws, SAMPLE, moment, family_of("llada")[1])[0]
    return [int(row) - 2 for row in sorted(view.rows)]


def views(objective: Objective) -> int:
    return len(objective.views(Draws(Lowest(), Lowest()), SAMPLE, FIRST, family_of("llada")[1]))  # type: ignore[arg-type]


def whole(**values: Any) -> PseudoTrajectory:
    """The four positions are one window, half of which is masked."""
    half = {"noise_start": 0.5, "noise_end": 0.5, "noise_max": 0.5, "window_sizes": (4,)}
    return PseudoTrajectory(**{**half, "ce_weight": 2.0, "complement_weight": 3.0, "certainty_weight": 5.0, **values})


def order(**values: Any) -> list[int]:
    return masked(whole(**values))


def windows_of(window_domain: str) -> list[tuple[int, int]]:
    """Every window of two that is drawn of an answer of two tokens, its stop token and three of padding."""
    answer = np.array([1, 2, 0, 0, 0, 0], "int32")
    sample = TrainingSample("row", SAMPLE.prompt_ids, answer, np.arange(6))
    objective = whole(window_domain=window_domain, window_sizes=(2,), noise_start=1.0, noise_end=1.0, noise_max=1.0)
    found = set()
    for number in range(4):
        rng = Lowest()
        rng.integers = lambda high, number=number: min(number, int(high) - 1)  # type: ignore[method-assign]
        view = objective.views(Draws(rng, rng), sample, FIRST, family_of("llada")[1])[0]  # type: ignore[arg-type]
        found.add((int(view.rows[0]) - 2, int(view.rows[-1]) - 1))
    return sorted(found)


class Odds:
    """Stands for the student: its logits are those of the packed rows, and say its hidden states."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def hidden(self, _batch: Any, _layout: Any) -> torch.Tensor:
        return self._logits

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def by_token(self, function: Callable[..., Any], *rows: torch.Tensor) -> Any:
        return function(*rows)


def loss(**values: Any) -> float:
    """One token in either view, both right: logits ln 2, 0, 0 in view A, and ln 8, 0, 0 in view B."""
    logits = torch.log(torch.tensor([[2.0, 1.0, 1.0], [8.0, 1.0, 1.0]]))
    batch = SimpleNamespace(layout=None, labels=torch.tensor([0, 0]), second=torch.tensor([False, True]))
    return float(whole(**values).loss(Odds(logits), batch)[0])  # type: ignore[arg-type]


def entropy(odds: float, temperature: float) -> float:
    """In nats, of the odds `odds` : 1 : 1 cooled to `temperature`."""
    heads = odds ** (1 / temperature)
    shares = [heads / (heads + 2), 1 / (heads + 2), 1 / (heads + 2)]
    return -sum(share * math.log(share) for share in shares)


CE_A, CE_B = math.log(4 / 2), math.log(10 / 8)
LOSS = 2 * CE_A + 3 * CE_B + 5 * entropy(2, 0.5)


class Rising(Lowest):
    """One whose first block has the lowest ratio and whose last one has the highest; everything is masked."""

    def random(self, size: int | None = None) -> Any:
        return np.full(size or 1, 1.0 if size == 1 else 0.0)


def forcing(block_size: int = 2, noise: tuple[float, float] = (0.25, 0.5)) -> tuple[list[int], list[float]]:
    """What every token of two of prompt and four of answer sees under D2F, and the mask ratios of the answer's."""
    objective = DiscreteForcing(block_size, noise)
    (view,) = made = objective.views(Draws(Rising(), Rising()), SAMPLE, None, family_of("llada")[1])  # type: ignore[arg-type]
    mask = objective.layout(pack(["row"], [2], [made]), torch.device("cpu")).mask
    assert mask is not None
    return mask[0, 0].sum(-1).tolist(), [1 / float(weight) for weight in view.weights]


def copies(block_size: int) -> tuple[int | None, int]:
    """The student's own block size, from a causal teacher, and the tokens of its row of two and four tokens."""
    objective = BlockDiffusion(block_size)
    _, family = objective.student(*family_of("qwen2"), lambda: MASK)
    return family.block_size, int(objective.views(Draws(Rising(), Rising()), SAMPLE, None, family)[0].token_ids.size)  # type: ignore[arg-type]


# (objective, parameter) -> looks at something, given the parameter: (value, figure) of two values
Effect = tuple[Callable[..., Any], tuple[Any, Any], tuple[Any, Any]]
EFFECTS: dict[tuple[str, str], Effect] = {
    ("windows", "order"): (order, ("trajectory", [0, 2]), ("reversed", [1, 3])),
    ("windows", "inverted_pairs"): (
        # With all pairs the wrong way round, the order is reversed.
        lambda inverted_pairs: order(order="inverted", inverted_pairs=inverted_pairs),
        (0.0, [0, 2]),
        (1.0, [1, 3]),
    ),
    # What was hidden after the step int(0.5 x 4) = 2: one position of the four.
    ("windows", "ratio_rounding"): (order, ("exact", [0, 2]), ("published", [0])),
    # The stop token is the third: two windows begin in the answer, and the last of them runs on into padding.
    ("windows", "window_domain"): (
        windows_of,
        ("answer", [(0, 2), (2, 6)]),
        ("canvas", [(0, 2), (2, 4), (4, 6)]),
    ),
    # Of the first two positions the one that was revealed last; of three, round(1.5) = 2.
    ("windows", "window_sizes"): (order, ((2, 4), [0]), ((3, 4), [0, 2])),
    ("windows", "noise_start"): (
        lambda noise_start: masked(whole(noise_start=noise_start, noise_end=0.9, noise_max=1.0)),
        (0.25, [0]),
        (0.75, [0, 2, 3]),
    ),
    ("windows", "noise_end"): (
        lambda noise_end: masked(whole(noise_start=0.0, noise_end=noise_end, noise_max=1.0), moment=None),
        (0.25, [0]),
        (0.75, [0, 2, 3]),
    ),
    ("windows", "noise_max"): (
        lambda noise_max: masked(whole(noise_start=0.0, noise_end=0.0, noise_max=noise_max), rng=Highest),
        (0.25, [0]),
        (0.75, [0, 2, 3]),
    ),
    ("windows", "ce_weight"): (loss, (2.0, LOSS), (7.0, LOSS + 5 * CE_A)),
    ("windows", "complement_weight"): (loss, (3.0, LOSS), (7.0, LOSS + 4 * CE_B)),
    ("windows", "certainty_weight"): (loss, (5.0, LOSS), (7.0, LOSS + 2 * entropy(2, 0.5))),
    ("windows", "certainty_views"): (loss, ("a", LOSS), ("both", LOSS + 5 * entropy(8, 0.5))),
    ("windows", "certainty_temperature"): (
        loss,
        (0.5, LOSS),
        (1.0, 2 * CE_A + 3 * CE_B + 5 * entropy(2, 1.0)),
    ),
    ("d2f", "block_size"): (
        forcing,
        (2, ([2, 2, 4, 4, 6, 6], [0.25, 0.25, 0.5, 0.5])),
        (3, ([2, 2, 5, 5, 5, 6], [0.25, 0.25, 0.25, 0.5])),
    ),
    ("d2f", "noise"): (
        lambda noise: forcing(noise=noise)[1],
        ((0.25, 0.5), [0.25, 0.25, 0.5, 0.5]),
        ((0.5, 1.0), [0.5, 0.5, 1.0, 1.0]),
    ),
    # Blocks of 4: 4 clean tokens, and twice all 6. Blocks of 6: no clean ones, and twice 6.
    ("block-diffusion", "block_size"): (copies, (4, (4, 4 + 2 * 6)), (6, (6, 2 * 6))),
}
PARAMETERS = [
    (name, field.name)
    for name, objective in OBJECTIVES.items()
    for field in dataclasses.fields(objective)  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("objective", "parameter"), PARAMETERS)
def test_every_parameter_of_an_objective_acts(objective: str, parameter: str) -> None:
    known = (objective, parameter)
    assert known in EFFECTS, f"{objective}.{parameter}: a new parameter needs two values and their figures in EFFECTS"
    look, *cases = EFFECTS[known]
    for value, figure in cases:
        found = look(**{parameter: value})
        assert found == (pytest.approx(figure, rel=1e-5) if isinstance(figure, float) else figure), value


def test_a_view_without_weight_is_not_made() -> None:
    assert (views(whole()), views(whole(complement_weight=0.0))) == (2, 1)


def test_the_window_and_the_noise_follow_the_steps() -> None:
    """Half of the first epoch's two steps: half-way from 2 to 4 tokens; the third of four: half-way from 0.2 to 0.8."""
    objective = PseudoTrajectory(window_sizes=(2, 4), noise_start=0.2, noise_end=0.8)
    assert objective.curriculum(Moment(0, 1, 2, 2, 4)) == {"window": 3, "noise_floor": pytest.approx(0.5)}
    assert masked(objective, Moment(0, 1, 2, 2, 4)) == [0, 2]  # round(0.5 x 3) of the first three
    assert masked(objective, Moment(1, 0, 2, 2, 4)) == [0, 2]  # round(0.5 x 4) of all four


def test_what_follows_the_window_is_masked_and_not_predicted() -> None:
    draws = Draws(Lowest(), Lowest())  # type: ignore[arg-type]
    view, other = whole(window_sizes=(2,)).views(draws, SAMPLE, FIRST, family_of("llada")[1])
    assert view.token_ids.tolist() == [1, 2, MASK, 2, MASK, MASK] and view.labels.tolist() == [1]
    assert other.token_ids.tolist() == [1, 2, 1, MASK, MASK, MASK] and other.labels.tolist() == [2]
