from __future__ import annotations

import pytest

from d3llm_ray.distillation.objectives.curriculum import learning_rate, noise_floor, window_size

LLADA = (16, 16, 24, 24, 32, 32)


@pytest.mark.parametrize(
    ("epoch", "step", "expected"),
    [
        (0, 0, 16),
        (0, 79, 16),
        (1, 0, 16),
        (1, 9, 16),
        (1, 10, 17),  # an eighth of the epoch: 16 + 8 / 8, exactly
        (1, 45, 20),  # 20.5 is rounded down
        (1, 79, 23),
        (2, 0, 24),
        (3, 40, 28),
        (4, 79, 32),
        (5, 79, 32),
        (9, 40, 32),  # beyond the list: its last value
    ],
)
def test_window_grows_linearly_inside_an_epoch(epoch: int, step: int, expected: int) -> None:
    assert window_size(LLADA, epoch, step, 80) == expected


def test_every_integer_size_occurs() -> None:
    sizes = {window_size((16, 24, 32), epoch, step, 100) for epoch in range(3) for step in range(100)}
    assert sizes == set(range(16, 33))


def test_window_may_shrink() -> None:
    # int(32 - 16 * 1/3) = int(26.67)
    assert window_size((32, 16), 0, 1, 3) == 26


def test_noise_floor_at_first_middle_last_step() -> None:
    assert noise_floor(0.0, 0.8, 0, 200) == 0.0
    assert noise_floor(0.0, 0.8, 100, 200) == pytest.approx(0.4)
    assert noise_floor(0.0, 0.8, 199, 200) == pytest.approx(0.796)
    assert noise_floor(0.2, 0.8, 50, 200) == pytest.approx(0.35)


def test_learning_rate_constant_has_no_decay() -> None:
    rates = [learning_rate(n, 10, peak=2e-5, schedule="constant", warmup_ratio=0.0) for n in range(10)]
    assert rates == [2e-5] * 10


def test_learning_rate_warms_up_and_falls_as_a_cosine() -> None:
    rates = [learning_rate(n, 100, peak=1.0, schedule="cosine", warmup_ratio=0.2) for n in range(100)]
    assert rates[0] == pytest.approx(1 / 21)
    assert rates[19] == pytest.approx(20 / 21)
    assert rates[20] == 1.0
    assert rates[60] == pytest.approx(0.5)  # half of the way down
    assert rates[99] == pytest.approx(0.0003854, abs=1e-6)  # (1 + cos(pi * 79 / 80)) / 2
    assert rates[20:] == sorted(rates[20:], reverse=True)
